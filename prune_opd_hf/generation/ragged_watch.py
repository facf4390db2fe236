"""The drift watch over rows that come at a pace of their own, as serving engines stream them.

What arrives of a row is kept until it is `check_every` tokens, or its last ones. All rows that have as much are scored together,
in one pass of the teacher. Who ends where is decided by the code of `watch.py`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prune_opd_hf.algorithm.drift import STOP_REASONS
from prune_opd_hf.errors import MonitorStateError
from prune_opd_hf.generation.check_lengths import RowLengths
from prune_opd_hf.generation.engine import NewTokens
from prune_opd_hf.generation.prompts import left_padded
from prune_opd_hf.generation.teacher_contexts import NO_CONTEXTS, TeacherContexts
from prune_opd_hf.generation.watch import RUNNING, DriftWatch
from prune_opd_hf.generation.watch_settings import WatchSettings
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.base import TeacherScores

NO_TOKEN = -1
"""Stands in a block behind the tokens of a row that has fewer of them."""


@dataclass
class _Arrived:
    """What has arrived of a row and is not scored yet."""

    parts: list[NewTokens] = field(default_factory=list)
    tokens: int = 0
    end: str | None = None


class RaggedDriftWatch(DriftWatch):
    """The state of one generation. Made by `DriftMonitor.begin(ragged=True)`.

    Args:
        settings: what does not change.
        device: of the record. Until then everything is kept where tokens arrive.
        contexts: as for `DriftWatch`.
    """

    def __init__(
        self, settings: WatchSettings, device: torch.device, *, contexts: TeacherContexts = NO_CONTEXTS
    ) -> None:
        super().__init__(settings, torch.device("cpu"), contexts=contexts)
        self._device_of_record = device
        self._scorers = {"teacher": settings.teacher.follow_rows()}
        self._of_student: tuple[str, ...] = ()
        if settings.student is not None:
            self._scorers["student"] = settings.student.follow_rows()
            teachers = getattr(settings.teacher, "teachers", {"": settings.teacher}).values()
            shared = any(getattr(one, "model", None) is settings.student.model for one in teachers)
            self._of_student = ("student", "teacher") if shared else ("student",)
        self._teacher_batch = settings.teacher.batches
        self._prompt_ids: dict[str, list[Sequence[int]]] = {"student": [], "teacher": []}
        self._arrived: dict[int, _Arrived] = {}
        self._undisturbed: Callable[[], AbstractContextManager] = nullcontext

    @property
    def check_every(self) -> int:
        """Tokens of a block."""
        return self.settings.check_every

    @property
    def earliest_stop(self) -> int | None:
        """Response tokens before which drift stops no row; None where it stops none."""
        stops = self.settings.truncate and self.settings.config.weight_drop > 0
        return self.settings.config.min_length if stops else None

    def add_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Prompts that are answered from now on, one for each row."""
        read = self.contexts.prompts(self.rows, prompts)
        self._prompt_ids["student"] += prompts
        self._prompt_ids["teacher"] += read
        padded = (left_padded(of, self.settings.pad_token_id or 0, self.device) for of in (prompts, read))
        self._note_rows(*((ids, mask.bool()) for ids, mask in padded))

    def append(self, new: NewTokens) -> None:
        """What a row got. Tokens of a row that has ended are counted as discarded."""
        row = new.row
        if self._reason[row] != RUNNING:
            self._discarded += len(new.token_ids)
            return
        if new.start == 0 and (self._scored[row] > 0 or row in self._arrived):  # the engine began it anew
            self._arrived.pop(row, None)
            for scorer in self._scorers.values():
                scorer.drop_rows([row])
            self._scored[row] = self._events[row] = 0
        arrived = self._arrived.setdefault(row, _Arrived())
        if int(self._scored[row]) + arrived.tokens != new.start:
            raise MonitorStateError(
                f"row {row} has {int(self._scored[row]) + arrived.tokens} tokens, and the engine goes on at {new.start}"
            )
        arrived.parts.append(new)
        arrived.tokens += len(new.token_ids)
        arrived.end = new.end

    def score_ready(self, undisturbed: Callable[[], AbstractContextManager] = nullcontext) -> list[int]:
        """Score the rows that have a block, or their last tokens.

        Args:
            undisturbed: entered while the student's model is used, here as the student or as its own teacher.

        Returns:
            the rows that have ended now.
        """
        self._undisturbed = undisturbed
        due = self._due()
        ready = {row: arrived for row, arrived in self._arrived.items() if row in due or arrived.end is not None}
        for row, arrived in ready.items():
            del self._arrived[row]
            if arrived.end is not None:
                self._reason[row] = STOP_REASONS.index(arrived.end)
                self._length[row] = self._scored[row] + arrived.tokens
        scored = [row for row, arrived in ready.items() if arrived.tokens]
        if scored:
            self._score_rows(scored, [part for row in scored for part in ready[row].parts])
        ended = [row for row in ready if self._reason[row] != RUNNING]
        for scorer in self._scorers.values():
            scorer.drop_rows(ended)
        if self.settings.on_check is not None and scored:
            self.settings.on_check(self.progress)
        return ended

    def rollouts(self) -> Rollouts:
        """The record."""
        running = (self._reason == RUNNING).nonzero().flatten().tolist()
        if running:
            raise MonitorStateError(f"row {running[0]} has not ended yet: take all completions of the engine first")
        self._scorers.clear()  # with their caches, before an update needs the room
        return super().rollouts().to(self._device_of_record)

    # ------------------------------------------------------------------ scoring

    def _due(self) -> set[int]:
        """Running rows that are scored now, although they go on."""
        running = [row for row, arrived in self._arrived.items() if arrived.end is None]
        rows = torch.tensor(running, dtype=torch.long, device=self.device)
        pending = torch.tensor([self._arrived[row].tokens for row in running], dtype=torch.long, device=self.device)
        due = self._checks.due(RowLengths(self._read_prompts[rows], self._scored[rows], pending, self._events[rows]))
        return set(rows[due].tolist())

    def _score_rows(self, numbers: list[int], parts: list[NewTokens]) -> None:
        rows = torch.tensor(numbers, device=self.device)
        tokens = self._padded([part.token_ids for part in parts], parts, torch.long, NO_TOKEN)
        given = tokens != NO_TOKEN
        for row in numbers:
            if self._scored[row] == 0:
                for role, scorer in self._scorers.items():
                    named = self.contexts.named(row, 1) if role == "teacher" else {}
                    scorer.start_row(row, self._prompt_ids[role][row], **named)
        wanted = self._positions_before_end(rows, tokens) & given
        observed: dict[str, Tensor] = {}
        if parts[0].candidates is not None:
            some = [part.candidates for part in parts if part.candidates is not None]
            names = {"student_topk_ids": "ids", "student_topk_log_probs": "log_probs"}
            names["token_log_probs"] = "token_log_probs"
            for column, name in names.items():
                dtype = torch.long if name == "ids" else torch.float32
                observed[column] = self._padded([getattr(candidates, name) for candidates in some], parts, dtype)
            self._check_finite(rows, observed["token_log_probs"], wanted)
        self._judge(self._score(rows, tokens, wanted, observed), wanted)
        self._scored[rows] += given.sum(dim=-1)

    def _padded(self, values: list[list], parts: list[NewTokens], dtype: torch.dtype, filler: int = 0) -> Tensor:
        """Values of each part, one for each token, as one line for each row."""
        lines: dict[int, list] = {}
        for part, of_part in zip(parts, values, strict=True):
            lines.setdefault(part.row, []).extend(of_part)
        return pad_sequence([torch.tensor(line, dtype=dtype) for line in lines.values()], True, filler).to(self.device)

    def _scores_by(self, role: str, rows: Tensor, tokens: Any, candidates: Any, wanted: Any) -> TeacherScores:
        with self._undisturbed() if role in self._of_student else nullcontext():
            return self._scorers[role].score(rows.tolist(), tokens, candidates, wanted=wanted)

    def _follow_running(self) -> None:
        """`score_ready` drops the rows that have ended."""
