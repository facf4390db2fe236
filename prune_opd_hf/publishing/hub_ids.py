"""What a repository on the Hub can be called."""

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def is_hub_id(name: str | None) -> bool:
    """Whether `name` has the form owner/name that the Hub gives to repositories.

    Example:
        >>> is_hub_id("Qwen/Qwen3-1.7B"), is_hub_id("qwen (local)"), is_hub_id("gpt2"), is_hub_id(None)
        (True, False, False, False)
    """
    if not name or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
