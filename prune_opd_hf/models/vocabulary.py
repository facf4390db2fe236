"""Which token ids mean the same to student and teacher.

Vocabularies are compared by their tokenizers, never by `vocab_size`: checkpoints of one family share a tokenizer but pad their
embedding matrices differently (Qwen2.5: 151,936 and 152,064 rows for 151,665 tokens). Equal size does not prove equal vocabulary,
and unequal size does not disprove it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prune_opd_hf.errors import VocabularyMismatchError

NAMED_TOKENS = 12
"""So many renamed tokens are named in a message."""


class RenamedToken(NamedTuple):
    """An id that means different tokens; None where a tokenizer has none."""

    token_id: int
    student: str | None
    teacher: str | None

    def __str__(self) -> str:
        return f"token id {self.token_id} is {self.student!r} for the student and {self.teacher!r} for the teacher"


@dataclass(frozen=True)
class SharedVocabulary:
    """The ids that mean the same token to student and teacher: those below `size` that are not renamed.

    Others enter neither a top-k nor a normalisation, and are never sampled.

    Attributes:
        size: one tokenizer may know further tokens beyond it.
        renamed: added or special ids below `size` of different meaning.
    """

    size: int
    renamed: tuple[RenamedToken, ...] = ()

    @property
    def excluded_ids(self) -> tuple[int, ...]:
        """The ids below `size` that are not shared."""
        return tuple(token.token_id for token in self.renamed)

    def with_shared(self, token_ids: Collection[int]) -> "SharedVocabulary":
        """The same, where these ids do mean the same whatever they are called: what ends a response of either model."""
        return SharedVocabulary(self.size, tuple(token for token in self.renamed if token.token_id not in token_ids))

    def describe(self) -> str:
        """What is shared, in one line."""
        if not self.renamed:
            return f"{self.size:,} ids mean the same tokens"
        rest = len(self.renamed) - NAMED_TOKENS
        named = "; ".join(map(str, self.renamed[:NAMED_TOKENS])) + (f"; and {rest} more" if rest > 0 else "")
        return (
            f"{self.size - len(self.renamed):,} ids mean the same tokens, {len(self.renamed)} renamed special tokens do not, and "
            f"are neither sampled nor compared: {named}. In a prompt each model reads its own meaning of them"
        )


def shared_vocabulary(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    allow_renamed_special_tokens: bool = False,
) -> SharedVocabulary:
    """The ids, counted from 0, that mean the same token in both tokenizers.

    Args:
        allow_renamed_special_tokens: let added and special ids of different meaning pass, as not shared; all but the end token of
            both tokenizers, which does the same whatever it is called.

    Raises:
        VocabularyMismatchError: an id below the size of both means different tokens; names the first one, ordinary ones first.

    Example:
        >>> class Words:
        ...     def __init__(self, *words): self.words = words
        ...     def get_vocab(self): return {word: index for index, word in enumerate(self.words)}
        >>> shared_vocabulary(Words("a", "b"), Words("a", "b", "<extra>")).size
        2
        >>> try:
        ...     shared_vocabulary(Words("a", "b"), Words("a", "c"))
        ... except VocabularyMismatchError as error:
        ...     print(str(error).split(": ")[1])
        token id 1 is 'b' for the student and 'c' for the teacher. Choose two models of one family.
    """
    student = {index: token for token, index in student_tokenizer.get_vocab().items()}
    teacher = {index: token for token, index in teacher_tokenizer.get_vocab().items()}
    size = min(max(student, default=-1), max(teacher, default=-1)) + 1
    renamed = [
        RenamedToken(index, student.get(index), teacher.get(index))
        for index in range(size)
        if student.get(index) != teacher.get(index)
    ]
    sides = [(student, _special_ids(student_tokenizer)), (teacher, _special_ids(teacher_tokenizer))]
    ordinary = [
        token
        for token in renamed
        if any(token.token_id in known and token.token_id not in special for known, special in sides)
    ]
    refusal = "student and teacher have different tokenizers: "
    if ordinary:
        raise VocabularyMismatchError(f"{refusal}{ordinary[0]}. Choose two models of one family.")
    if renamed and not allow_renamed_special_tokens:
        raise VocabularyMismatchError(
            f"{refusal}{renamed[0]}. They differ in {len(renamed)} added or special tokens alone: set "
            "allow_renamed_special_tokens to go on without these, which are then neither sampled nor compared"
        )
    ends = [getattr(tokenizer, "eos_token_id", None) for tokenizer in (student_tokenizer, teacher_tokenizer)]
    both_end = {ends[0]} if ends[0] == ends[1] and ends[0] is not None else ()
    return SharedVocabulary(size, tuple(renamed)).with_shared(both_end)


def _special_ids(tokenizer: Any) -> set[int]:
    return {*getattr(tokenizer, "added_tokens_decoder", ()), *getattr(tokenizer, "all_special_ids", ())}


def id_tensor(ids: Collection[int], device: torch.device) -> Int[Tensor, " ids"] | None:
    """Ids for `without_ids`, None where there are none; made once, since every copy to a device makes the host wait."""
    return torch.tensor(list(ids), device=device) if ids else None


def without_ids(
    logits: Float[Tensor, "*positions vocab"], ids: Int[Tensor, " ids"] | None
) -> Float[Tensor, "*positions vocab"]:
    """Logits with -inf at these ids: as if the vocabulary had no such tokens."""
    return logits if ids is None else logits.index_fill(-1, ids.to(logits.device), -torch.inf)
