"""What an engine is asked for and what it gives back."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Request:
    """One sample to generate.

    Attributes:
        prompt_ids: the prompt's tokens.
        seed: of this sample alone, see `sample_seed`.
    """

    prompt_ids: tuple[int, ...]
    seed: int


class Completion(NamedTuple):
    """One generated sample.

    Attributes:
        request: index of its request.
        token_ids: the response, the token that ended it included.
        ended: whether it ended by itself; otherwise it was cut at the length limit.
    """

    request: int
    token_ids: list[int]
    ended: bool
