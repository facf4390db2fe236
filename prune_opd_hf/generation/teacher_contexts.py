"""What the teacher reads of each row of a generation: the student's prompt, or one of its own; and which teacher it is."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from prune_opd_hf.errors import InputError
from prune_opd_hf.generation.prompts import left_padded, repeat_for_sequences
from prune_opd_hf.models.compatibility import check_left_padding
from prune_opd_hf.teachers.base import TeacherContext


class TeacherContexts:
    """Those of all rows of one generation.

    Args:
        contexts: one for each row, in their order; none where all rows are read as the student reads them, by the one teacher.
    """

    def __init__(self, contexts: Sequence[TeacherContext] = ()) -> None:
        self._contexts = contexts
        self.has_prompts = any(context.prompt_ids is not None for context in contexts)
        self.has_names = any(context.teacher is not None for context in contexts)

    def prompts(self, first: int, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """What the teacher reads of rows from number `first` on, whose student reads `prompts`."""
        if not self.has_prompts:
            return list(prompts)
        own = [context.prompt_ids for context in self._of(first, len(prompts))]
        return [read if ids is None else ids for ids, read in zip(own, prompts, strict=True)]

    def padded_prompts(
        self, first: int, ids: Int[Tensor, "rows prompt"], mask: Int[Tensor, "rows prompt"], pad_token_id: int
    ) -> tuple[Int[Tensor, "rows teacher_prompt"], Int[Tensor, "rows teacher_prompt"]]:
        """The same as one batch, padded on the left."""
        if not self.has_prompts:
            return ids, mask
        rows = [line[inside.bool()].tolist() for line, inside in zip(ids, mask, strict=True)]
        return left_padded(self.prompts(first, rows), pad_token_id, ids.device)

    def named(self, first: int, rows: int) -> dict[str, Any]:
        """The argument that names the teachers of these rows, for one that is several."""
        return {"names": [context.teacher for context in self._of(first, rows)]} if self.has_names else {}

    def names(self, rows: int) -> tuple[str, ...]:
        """The teacher of each row; nothing where there is one."""
        return tuple(context.teacher or "" for context in self._of(0, rows)) if self.has_names else ()

    def _of(self, first: int, count: int) -> Sequence[TeacherContext]:
        found = self._contexts[first : first + count]
        if len(found) < count:
            raise InputError(
                f"the generation has more rows than the {len(self._contexts)} that the teacher was given contexts for"
            )
        return found

    @classmethod
    def of_sequences(cls, prompt_ids: Tensor, ids: Tensor | None, mask: Tensor | None) -> "TeacherContexts":
        """Of one generate call with these prompts: left-padded prompts for the teacher and their mask, one for each sequence or for
        each prompt."""
        if ids is None:
            return cls()
        mask = torch.ones_like(ids) if mask is None else mask.to(ids.device)
        check_left_padding(mask)
        ids, mask = (
            repeat_for_sequences(of, prompt_ids, f"teacher_prompt_{what}")
            for of, what in ((ids, "ids"), (mask, "mask"))
        )
        return cls([TeacherContext(line[inside.bool()].tolist()) for line, inside in zip(ids, mask, strict=True)])


NO_CONTEXTS = TeacherContexts()
"""All rows are read as the student reads them."""
