"""What repositories, branches and tags on the Hub can be called."""

import re
from pathlib import Path

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


def is_local(name: str | None) -> bool:
    """Whether `name` has the form of a Hub id but leads to a file or folder from where this process stands.

    Transformers and Datasets take such a name for the path, too.
    """
    return is_hub_id(name) and (Path.cwd() / str(name)).exists()


def is_ref_name(name: str) -> bool:
    """Whether Git takes `name` for a branch or tag (git-check-ref-format(1), whose rules these are).

    Example:
        >>> is_ref_name("v1.0"), is_ref_name("refs/pr/1"), is_ref_name("v 1"), is_ref_name("a..b"), is_ref_name("-x")
        (True, True, False, False, False)
    """
    if re.fullmatch("[0-9a-f]{40}", name):  # would be taken for a commit
        return False
    if (
        re.search(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//", name)
        or name.startswith(("-", "/"))
        or name in {"", "@", "HEAD"}
    ):
        return False
    return not name.endswith(("/", ".")) and not any(
        part.startswith(".") or part.endswith(".lock") for part in name.split("/")
    )
