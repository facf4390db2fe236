"""Sequences of different lengths that a model of this process follows, each scored when it has new tokens.

A pass takes the rows that have some, right ends aligned, with what each has in its slot of the KV cache. It knows models and
their caches; it does not know who samples, or when.
"""

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prune_opd_hf.errors import InputError
from prune_opd_hf.models.slot_cache import SlotCache
from prune_opd_hf.teachers.base import TeacherScores

if TYPE_CHECKING:
    from prune_opd_hf.teachers.local import LocalTeacher


class RaggedRows:
    """A `RaggedScorer` over a `LocalTeacher`. Made by `LocalTeacher.follow_rows`."""

    def __init__(self, teacher: "LocalTeacher") -> None:
        self._teacher = teacher
        self._cache = SlotCache(teacher.model, teacher.device)
        self._slots: dict[int, int] = {}
        self._unread: dict[int, Tensor] = {}  # the prompt, then the newest token

    def start_row(self, row: int, prompt_ids: Sequence[int]) -> None:
        if not prompt_ids:
            raise InputError("the prompt is empty; it needs at least one token")
        self.drop_rows([row])
        self._teacher.check_context(len(prompt_ids))
        ids = torch.tensor(prompt_ids, device=self._teacher.device)
        self._unread[row] = self._teacher.known_ids(ids, torch.ones_like(ids, dtype=torch.bool), of_prompt=True)

    def drop_rows(self, rows: Sequence[int]) -> None:
        self._cache.free([self._slots.pop(row) for row in rows if row in self._slots])
        for row in rows:
            self._unread.pop(row, None)

    @torch.no_grad()
    def score(
        self,
        rows: Sequence[int],
        token_ids: Int[Tensor, "rows time"],
        candidate_ids: Int[Tensor, "rows time candidates"] | None = None,
        *,
        wanted: Bool[Tensor, "rows time"],
    ) -> TeacherScores:
        """As `RaggedScorer.score`.

        Raises:
            InputError: an id outside the vocabulary, or more tokens than the model's context.
            NonFiniteLogitsError: NaN or infinite logits; names row and position.
        """
        teacher, started, origin = self._teacher, perf_counter(), token_ids.device
        token_ids, wanted = token_ids.to(teacher.device), wanted.to(teacher.device)
        token_ids = teacher.known_ids(token_ids, wanted)
        if candidate_ids is not None:
            inside = wanted.unsqueeze(-1)
            candidate_ids = teacher.known_ids(candidate_ids.to(teacher.device), inside)
        counts = wanted.sum(dim=-1).tolist()
        fed = [torch.cat([self._unread[row], token_ids[line, : counts[line] - 1]]) for line, row in enumerate(rows)]
        fresh = [row for row in rows if row not in self._slots]
        self._slots.update(zip(fresh, self._cache.new_slots(len(fresh)), strict=True))
        slots = torch.tensor([self._slots[row] for row in rows], device=teacher.device)
        lengths = torch.tensor([len(ids) for ids in fed], device=teacher.device)
        teacher.check_context(int((self._cache.lengths[slots] + lengths).max()))
        parts, order = [], []
        with teacher.while_asked():
            for lines in self._passes(lengths.tolist()):
                mask = self._cache.begin_pass(slots[lines], lengths[lines])
                ids = pad_sequence([fed[line] for line in lines], batch_first=True, padding_side="left")
                outputs = teacher.forward_pass(self._cache, mask, ids, bool(mask.all()))
                columns = torch.arange(wanted.shape[1], device=mask.device) - wanted[lines].sum(dim=-1, keepdim=True)
                candidates = None if candidate_ids is None else candidate_ids[lines]
                scored = token_ids[lines], candidates, wanted[lines], columns + ids.shape[1]
                parts.append(teacher.score_span(outputs, 0, *scored))
                order += lines
        for line, row in enumerate(rows):
            self._unread[row] = token_ids[line, counts[line] - 1 : counts[line]]
        scores = TeacherScores.scatter(parts, order).to(origin)
        teacher.wall_seconds += perf_counter() - started
        return scores

    def _passes(self, lengths: list[int]) -> Iterator[list[int]]:
        """Which lines go together: of like length, as many as make an efficient pass or one whose logits fit."""
        at_once = self._teacher.columns_at_once
        order = sorted(range(len(lengths)), key=lambda line: -lengths[line])
        first = 0
        while first < len(order):
            count = max(1, at_once // lengths[order[first]])
            yield order[first : first + count]
            first += count
