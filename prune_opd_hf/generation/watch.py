"""The drift watch over one generation: from the student's candidates and tokens to a record of drift.

It knows tensors, teachers and drift settings. It does not know who samples: an engine reports to it (`engine.py`), and so do the
hooks beside `model.generate` (`monitor.py`). At the lengths of `check_lengths.py` one teacher pass scores the tokens since the
last, and `algorithm.drift` decides who ends where.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from prune_opd_hf.algorithm.drift import STOP_REASONS, ScoredPositions, drift_stops, find_drift_events
from prune_opd_hf.algorithm.overlap import topk_overlap
from prune_opd_hf.errors import MonitorStateError, NonFiniteLogitsError
from prune_opd_hf.generation.blocks import ScoredBlock, make_rollouts, observed_tokens
from prune_opd_hf.generation.check_lengths import RowLengths
from prune_opd_hf.generation.student_logits import StudentLogitsBuffer
from prune_opd_hf.generation.teacher_contexts import NO_CONTEXTS, TeacherContexts
from prune_opd_hf.generation.watch_settings import DriftProgress, WatchSettings
from prune_opd_hf.models.compatibility import check_left_padding
from prune_opd_hf.models.vocabulary import id_tensor
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.base import TeacherScores

ROOM = 256
"""Tokens of a block that room is made for at first; doubled as they come."""

RUNNING = -1
EOS, DRIFT, LENGTH, CRITERION = (STOP_REASONS.index(name) for name in ("eos", "drift", "length", "criterion"))

CHANGED_TOKENS = (
    "the generated tokens are not those that were observed: beam search reorders rows and assisted decoding takes tokens "
    "back. Use greedy decoding or sampling (num_beams=1, no assistant model)."
)


class DriftWatch:
    """The state of one generation. Made by `DriftMonitor.begin`; an engine reports to it. Rows are numbered as they are added.

    Between `add_rows` and the next, all running rows advance together, one token at a time. For every token: the student's
    candidates by one of the two `observe` methods, where `needs_candidates`; then `append_tokens`.

    Args:
        settings: what does not change.
        device: of the tokens.
        contexts: what the teacher reads of each row, and which teacher it is.

    Attributes:
        steps: tokens appended so far to a row that runs since the beginning.
        sampled_by: engine and weights, for the record.
        is_finished: whether the record was made.
    """

    def __init__(
        self, settings: WatchSettings, device: torch.device, *, contexts: TeacherContexts = NO_CONTEXTS
    ) -> None:
        self.settings, self.device, self.contexts = settings, device, contexts
        self.is_finished = False
        self._prompts: list[tuple[Tensor, Tensor]] = []
        self._teacher_prompts: list[tuple[Tensor, Tensor]] = []
        self._eos = torch.tensor(settings.eos_token_ids, dtype=torch.long, device=device)
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        self._reason = self._length = self._scored = self._events = self._followed = self._read_prompts = nothing
        self._checks = settings.check_lengths()
        self._pending = self._observed = self._discarded = self.steps = 0
        self._excluded: Tensor | None = None
        self.sampled_by = ("generate", "")
        self._blocks: list[ScoredBlock] = []
        self._candidates_observed = False
        self._teacher_batch = -1
        self._student: StudentLogitsBuffer | None = None
        self._tokens = torch.zeros(0, 0, dtype=torch.long, device=device)
        self._width = settings.check_every  # of the block

    # ------------------------------------------------------------------ what an engine asks

    @property
    def needs_candidates(self) -> bool:
        """Whether the student's logits or candidates must be observed: not where `settings.student` scores them."""
        return self.settings.student is None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens after which a row has ended."""
        return self.settings.eos_token_ids

    @property
    def can_add_rows(self) -> bool:
        """Whether rows may join while others run: teacher and student's scorer allow it."""
        scorers = (self.settings.teacher, self.settings.student)
        return all(scorer.capabilities.adds_rows for scorer in scorers if scorer is not None)

    @property
    def pending_tokens(self) -> int:
        """Tokens of each running row that are not scored yet."""
        return self._pending

    @property
    def next_token_is_scored(self) -> bool:
        """Whether the next token ends a block."""
        return self._pending + 1 >= self._width

    @property
    def prompt_columns(self) -> int:
        """Columns of the first prompts, padding included."""
        return self._prompts[0][0].shape[1]

    @property
    def rows(self) -> int:
        """Rows that were added so far."""
        return len(self._reason)

    @property
    def stopped(self) -> Bool[Tensor, " rows"]:
        """Rows that drift has stopped."""
        return self._reason == DRIFT

    @property
    def lengths(self) -> Int[Tensor, " rows"]:
        """Response tokens that each row keeps, as far as is known: all of those taken while it runs."""
        return torch.where(self._reason == RUNNING, self._scored + self._pending, self._length)

    def ending(self, row: int) -> tuple[int, str]:
        """Response tokens that a row keeps, and why it ended; final once nothing of it is pending."""
        reason = int(self._reason[row])
        return int(self.lengths[row]), STOP_REASONS[LENGTH if reason == RUNNING else reason]

    @property
    def progress(self) -> DriftProgress:
        """Where the generation stands."""
        ended = self._reason != RUNNING
        running = self._scored[~ended]
        return DriftProgress(
            tokens=int(running.max()) if len(running) else int(self._scored.max()) if self.rows else 0,
            rows=self.rows,
            running_rows=len(running),
            drifted_rows=int((self._reason == DRIFT).sum()),
            ended_rows=int((ended & (self._reason != DRIFT)).sum()),
            kept_tokens=int(torch.where(ended, self._length, self._scored).sum()),
            discarded_tokens=self._discarded,
        )

    # ------------------------------------------------------------------ what an engine reports

    def add_rows(self, prompt_ids: Int[Tensor, "rows prompt"], prompt_mask: Int[Tensor, "rows prompt"]) -> None:
        """Prompts of the student that are answered from now on, padded on the left.

        Raises:
            InputError: empty or right-padded prompts, or more rows than there are contexts for.
            MonitorStateError: rows join while tokens are not scored yet, or a scorer cannot add rows.
        """
        if self._pending:
            raise MonitorStateError(
                f"rows join between blocks, and {self._pending} tokens are not scored yet: score_pending()"
            )
        check_left_padding(prompt_mask)
        teacher, student, begins = self.settings.teacher, self.settings.student, len(self._followed) == 0
        if not begins:
            self._check_teacher_is_ours()
        pad_token_id = self.settings.pad_token_id or 0
        ids, mask = self.contexts.padded_prompts(self.rows, prompt_ids, prompt_mask, pad_token_id)
        named = self.contexts.named(self.rows, len(prompt_ids))
        (teacher.start if begins else teacher.add_rows)(ids, mask, **named)
        self._teacher_batch = teacher.batches
        if student is not None:
            (student.start if begins else student.add_rows)(prompt_ids, prompt_mask)
        self._followed = torch.cat([self._followed, self.rows + torch.arange(len(prompt_ids), device=self.device)])
        self._note_rows((prompt_ids, prompt_mask.bool()), (ids, mask.bool()))
        self._every_row = torch.arange(self.rows, device=self.device)
        self._new_block()

    def _note_rows(self, prompts: tuple[Tensor, Tensor], read: tuple[Tensor, Tensor]) -> None:
        """Rows with these prompts, ids and mask, of which the teacher reads others perhaps."""
        self._prompts.append(prompts)
        self._teacher_prompts.append(read)
        self._read_prompts = torch.cat([self._read_prompts, read[1].sum(dim=-1).to(self.device)])
        fresh = torch.zeros(len(prompts[0]), dtype=torch.long, device=self.device)
        self._reason = torch.cat([self._reason, fresh + RUNNING])
        self._length, self._scored, self._events = (
            torch.cat([values, fresh]) for values in (self._length, self._scored, self._events)
        )

    def observe_logits(self, logits: Float[Tensor, "rows vocab"], rows: Int[Tensor, " rows"] | None = None) -> None:
        """The student's logits of the next token of these rows (all by default), before any warper.

        They are read later, when the block is scored, so they must not be changed in place.
        """
        teacher = self.settings.teacher
        if self._observed != self._pending:
            raise MonitorStateError(f"the student was observed twice for one token: {CHANGED_TOKENS}")
        if not self._candidates_observed:
            teacher.restrict_vocabulary(logits.shape[-1])
            self._excluded = id_tensor(teacher.excluded_ids, self.device)
            self._candidates_observed = True
            self._new_block()
        self._make_room()
        self._observed += 1
        assert self._student is not None
        rows = self._every_row if rows is None else rows
        self._student.add_logits(logits[:, : teacher.vocab_size], rows, self._pending)

    def append_tokens(self, token_ids: Int[Tensor, " rows"], rows: Int[Tensor, " rows"] | None = None) -> bool:
        """The token that every given row got next; at the end of a block it is scored and judged.

        Returns:
            Whether a block was scored, so that `stopped` may have changed.
        """
        self._make_room()
        self._tokens[slice(None) if rows is None else rows, self._pending] = token_ids
        self._pending += 1
        self.steps += 1
        if self._student is not None and self._student.is_full:
            self._student.reduce(self._tokens)
        if self._pending < self._width:
            return False
        self._score_block()
        return True

    def end_rows(self, rows: Int[Tensor, " ended"], reason: str = "criterion") -> None:
        """These rows ended with their newest token. End tokens are found without it."""
        newest = self._scored[rows] + self._pending
        ends = self._reason[rows] == RUNNING
        if reason == "criterion":  # drift may have stopped them at this very token, before this was known
            ends |= (self._reason[rows] == DRIFT) & (self._length[rows] == newest)
        rows, newest = rows[ends], newest[ends]
        self._reason[rows] = STOP_REASONS.index(reason)
        self._length[rows] = newest
        if not self._pending:
            self._follow_running()

    def score_pending(self) -> None:
        """Score and judge what is not scored yet."""
        if self._pending:
            self._score_block()

    def check_sampled_from(self) -> None:
        """Name the row and the position, where logits observed lately are the reason that nothing can be sampled from them."""
        found = None if self._student is None else self._student.first_non_finite()
        if found is not None:
            row, column = found
            raise self._non_finite("student", row, int(self._scored[row]) + column)

    def rollouts(self) -> Rollouts:
        """The record of a generation whose engine reported every token.

        Raises:
            MonitorStateError: no row was added, or no token was reported.
        """
        self._score_the_rest()
        if not self._blocks:
            raise MonitorStateError("no generation was observed")
        self.is_finished = True
        lengths = torch.where(self._reason == RUNNING, self._scored, self._length)
        time = int(lengths.max())
        return self._record(observed_tokens(self._blocks, self.rows, time), lengths, self._reason)

    def _score_the_rest(self) -> None:
        with torch.inference_mode(self._tokens.is_inference()):  # as the engine ran
            self.score_pending()

    # ------------------------------------------------------------------ scoring

    def _new_block(self) -> None:
        of = self._followed
        lengths = (self._read_prompts[of], self._scored[of], torch.zeros_like(of), self._events[of])
        self._width = self._checks.block_width(RowLengths(*lengths))
        room = min(self._width, max(ROOM, self.settings.check_every))
        self._tokens = torch.zeros(self.rows, room, dtype=torch.long, device=self.device)
        if self._candidates_observed:
            shape = self.rows, room, self.settings.teacher.top_k
            self._student = StudentLogitsBuffer(*shape, self.device, self._excluded)

    def _make_room(self) -> None:
        """For one more token of the block."""
        room = self._tokens.shape[1]
        if self._pending == room:
            self._tokens = pad(self._tokens, (0, room))
            if self._student is not None:
                self._student.widen(2 * room)

    def _score_block(self) -> None:
        """One teacher pass over the block; then drift events, reliability, and who ends where."""
        if self._student is not None:
            self._student.reduce(self._tokens)
        if len(self._followed):
            self._judge(*self._scores_of(self._followed, self._pending))
        self._scored += self._pending  # counts on for rows that have ended, whose length is known
        self._pending = self._observed = 0
        self._new_block()
        if self.settings.on_check is not None:
            self.settings.on_check(self.progress)

    def _scores_of(self, rows: Tensor, width: int) -> tuple[ScoredBlock, Tensor]:
        """The block of the rows that are followed, and a mask of its response tokens."""
        tokens = self._tokens[rows, :width]
        wanted = self._positions_before_end(rows, tokens)
        observed: dict[str, Tensor] = {}
        if self._student is not None:
            self._check_finite(rows, self._student.normalizers[rows, :width], wanted)
            observed = self._student.columns(rows, width)
        return self._score(rows, tokens, wanted, observed), wanted

    def _score(self, rows: Tensor, tokens: Tensor, wanted: Tensor, observed: dict[str, Tensor]) -> ScoredBlock:
        """What both models say of a block, the student what was observed of it, and its drift events."""
        settings, columns = self.settings, {"token_ids": tokens, **observed}
        if settings.student is not None:
            scores = self._ask("student", rows, tokens, None, wanted)
            columns["student_topk_ids"], columns["student_topk_log_probs"] = scores.topk_ids, scores.topk_log_probs
            columns["token_log_probs"] = scores.token_log_probs
        self._check_teacher_is_ours()
        candidates = columns.get("student_topk_ids")
        scores = self._ask("teacher", rows, tokens, candidates, wanted)
        columns["teacher_token_log_probs"] = scores.token_log_probs
        columns["teacher_topk_ids"], columns["teacher_topk_log_probs"] = scores.topk_ids, scores.topk_log_probs
        if scores.candidate_log_probs is not None:
            columns["teacher_log_probs"] = scores.candidate_log_probs
        if candidates is not None:
            k = settings.config.top_k
            columns["overlap"] = topk_overlap(candidates[..., :k], scores.topk_ids[..., :k])
        log_probs = columns.get("student_topk_log_probs")
        of_teacher = scores.candidate_log_probs, scores.token_log_probs
        positions = ScoredPositions(tokens, scores.topk_ids, scores.topk_log_probs, candidates, log_probs, *of_teacher)
        columns["drift_events"] = find_drift_events(settings.config, wanted, positions)
        return ScoredBlock(rows, self._scored[rows], columns)

    def _judge(self, block: ScoredBlock, mask: Tensor) -> None:
        """Count events, stop exhausted rows, and follow only those that run on."""
        rows, events = block.rows, block.columns["drift_events"]
        self._blocks.append(block)
        if self.settings.truncate:
            ended = (self._reason[rows] == EOS) | (self._reason[rows] == CRITERION)
            stops = drift_stops(
                events,
                mask,
                self.settings.config,
                ended=ended,
                events_before=self._events[rows],
                tokens_before=block.first,
            )
            self._discarded += int((block.first + mask.sum(dim=-1) - stops.lengths).sum())
            self._length[rows] = torch.where(stops.drifted, stops.lengths, self._length[rows])
            self._reason[rows] = torch.where(stops.drifted, DRIFT, self._reason[rows])
        self._events[rows] += events.sum(dim=-1)
        read = self._read_prompts[rows] + block.first + mask.sum(dim=-1)
        self._checks.note_read(read, self._reason[rows] != RUNNING)
        self._follow_running()

    def _follow_running(self) -> None:
        running = self._reason[self._followed] == RUNNING
        if not bool(running.all()):
            kept = running.nonzero().squeeze(-1)
            self._followed = self._followed[kept]
            if len(kept):
                self.settings.teacher.keep_rows(kept)
                if self.settings.student is not None:
                    self.settings.student.keep_rows(kept)

    def _positions_before_end(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Positions of the block that belong to the response; notes rows whose end token lies in the block."""
        width, scored = tokens.shape[1], self._scored[rows]
        columns = torch.arange(width, device=tokens.device)
        first_eos = torch.where(torch.isin(tokens, self._eos), columns, width).amin(dim=-1)
        ends_here = (self._reason[rows] == RUNNING) & (first_eos < width)
        # A row that met its own cap, or another criterion, with an end token has ended by itself.
        ends_here |= (self._reason[rows] != RUNNING) & (scored + first_eos < self._length[rows])
        self._length[rows] = torch.where(ends_here, scored + first_eos + 1, self._length[rows])
        self._reason[rows] = torch.where(ends_here, EOS, self._reason[rows])
        limit = torch.where(self._reason[rows] == RUNNING, width, self._length[rows] - scored)
        return columns < limit.unsqueeze(-1)

    def _scores_by(self, role: str, rows: Tensor, tokens: Any, candidates: Any, wanted: Any) -> TeacherScores:
        return getattr(self.settings, role).score(tokens, candidates, wanted=wanted)

    def _ask(self, role: str, rows: Tensor, *block: Tensor | None) -> TeacherScores:
        try:
            return self._scores_by(role, rows, *block)
        except NonFiniteLogitsError as error:
            if error.row is None or error.token is None:
                raise
            row = int(rows[error.row])
            raise self._non_finite(role, row, int(self._scored[row]) + error.token) from error

    def _check_teacher_is_ours(self) -> None:
        if self.settings.teacher.batches != self._teacher_batch:
            raise MonitorStateError(
                "the teacher has begun another batch since, and this generation's last tokens are not scored yet: call finish "
                "before the next generation, or give each monitor a teacher of its own"
            )

    def _check_finite(self, rows: Tensor, of_student: Tensor, wanted: Tensor) -> None:
        bad = ~of_student.isfinite() & wanted
        if bool(bad.any()):
            line, column = bad.nonzero()[0].tolist()
            row = int(rows[line])
            raise self._non_finite("student", row, int(self._scored[row]) + column)

    @staticmethod
    def _non_finite(role: str, row: int, token: int) -> NonFiniteLogitsError:
        message = f"the {role} returned NaN or infinite logits for row {row}, response token {token}"
        return NonFiniteLogitsError(message, row=row, token=token)

    def _record(self, tokens: Tensor, lengths: Tensor, reasons: Tensor) -> Rollouts:
        names = tuple(STOP_REASONS[LENGTH if reason == RUNNING else reason] for reason in reasons.tolist())
        teacher, config, pad = self.settings.teacher, self.settings.config, self.settings.pad_token_id or 0
        read = self._teacher_prompts if self.contexts.has_prompts else ()
        teachers, excluded, by = self.contexts.names(self.rows), teacher.excluded_ids, self.sampled_by
        return make_rollouts(
            self._blocks, self._prompts, read, tokens, lengths, names, teachers, config, pad, excluded, by
        )
