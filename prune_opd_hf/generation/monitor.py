"""The drift monitor: the state of one `generate` call, from the student's logits and tokens to a record of drift.

It knows tensors, the teacher and the drift settings. It does not know who drives it: the pair beside `model.generate`
(`pair.py`) and the decoding loop that drops finished rows (`loop.py`) both call `open`, then `watch` and `take` for every
token, and read `stopped`. Every `check_every` tokens one teacher pass scores the block, and drift decides who ends where.

Departures
1. The reference stops nothing while it generates: it only caps the length of the next step's rollouts. Here a sequence ends
   at its exhausted token, the first with R_t <= 1e-8 at or beyond `min_length`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prune_opd_hf.algorithm.drift import (
    RELIABILITY_FLOOR,
    DriftConfig,
    ScoredPositions,
    find_drift_events,
    reliability,
    reliability_of_counts,
)
from prune_opd_hf.algorithm.overlap import topk_overlap
from prune_opd_hf.errors import ConfigError, InputError, MonitorStateError, NonFiniteLogitsError
from prune_opd_hf.generation.blocks import ScoredBlock, join_blocks
from prune_opd_hf.generation.prompts import mask_from_padding, repeat_for_sequences, special_token_ids
from prune_opd_hf.models.compatibility import check_left_padding, shared_vocabulary_size
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.base import Teacher, TeacherScores
from prune_opd_hf.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from prune_opd_hf.generation.hooks import DriftStoppingCriteria, StudentTopKLogitsProcessor

RUNNING, BY_ITSELF, DRIFTED = 0, 1, 2
REASONS = {RUNNING: "length", BY_ITSELF: "eos", DRIFTED: "drift"}

SHOWN_ELEMENTS = 2**22
"""The student's logits are read for several tokens at once, up to so many of them: 16 MiB. A small vocabulary gains by fewer
calls; of a large one each token's are read at once, and nothing is kept."""

CHANGED_TOKENS = (
    "the generated tokens are not those that were watched: beam search reorders rows and assisted decoding takes tokens "
    "back. Use greedy decoding or sampling (num_beams=1, no assistant model)."
)


@dataclass(frozen=True)
class DriftProgress:
    """Where a generation stands after a check, for progress bars.

    Attributes:
        tokens: response tokens generated in each running row so far.
        rows: sequences in the batch.
        running_rows, drifted_rows, ended_rows: still generating; stopped by drift; ended by themselves.
        kept_tokens: response tokens kept so far, over all rows.
        discarded_tokens: tokens generated past the end of a drifted row inside a block, over all rows.
    """

    tokens: int
    rows: int
    running_rows: int
    drifted_rows: int
    ended_rows: int
    kept_tokens: int
    discarded_tokens: int


class DriftMonitor:
    """Watches one `generate` call: what the student says, what the teacher says, and who has drifted too far.

    Args:
        teacher: a causal LM, or a `Teacher` (which carries `top_k`, the candidates recorded at each position).
        config: when a token counts as drift, and what that costs.
        check_every: tokens between two teacher passes. Results do not depend on it; the number of discarded tokens and
            the cost of the teacher do.
        truncate: stop rows whose reliability is used up. False only records.
        pad_token_id: padding token; by default that of the `generate` call, else the teacher's, else its EOS.
        eos_token_id: the token or tokens that end a sequence; by default those of the `generate` call, else the teacher's.
        attention_mask: of the prompts, as given to `generate`. Needed beside plain `generate` when prompts are padded with
            a token that also ends sequences; otherwise found from the padding.
        teacher_prompt_ids, teacher_prompt_mask: another prompt for the teacher (its own chat template, a hint, an answer),
            one for each sequence, or for each prompt where `num_return_sequences` repeats them.
        student: score the student's side of each block with this model, instead of recording it from the logits.
        tokenizer, teacher_tokenizer: when both are given, their vocabularies are compared before anything is generated.
        on_check: called with a `DriftProgress` after every check.

    Raises:
        ConfigError: settings that contradict each other or the vocabulary.
        VocabularyMismatchError: the two tokenizers differ; names the first differing token.

    Example: the pair beside `generate`.
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, eos_token_id=1, pad_token_id=0)
        >>> student, teacher = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config)
        >>> monitor = DriftMonitor(teacher, DriftConfig(top_k=4), check_every=8)
        >>> sequences = student.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False,
        ...                              logits_processor=[monitor.logits_processor],
        ...                              stopping_criteria=[monitor.stopping_criterion])
        >>> rollouts = monitor.finish(sequences)
        >>> rollouts.overlap.shape, bool((rollouts.response_ids == sequences[:, 3:]).all())
        (torch.Size([1, 4]), True)
    """

    def __init__(
        self,
        teacher: "Teacher | nn.Module",
        config: DriftConfig = DriftConfig(),
        *,
        check_every: int = 32,
        truncate: bool = True,
        pad_token_id: int | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        attention_mask: Int[Tensor, "prompts prompt"] | None = None,
        teacher_prompt_ids: Int[Tensor, "prompts teacher_prompt"] | None = None,
        teacher_prompt_mask: Int[Tensor, "prompts teacher_prompt"] | None = None,
        student: nn.Module | None = None,
        tokenizer: Any = None,
        teacher_tokenizer: Any = None,
        on_check: Callable[[DriftProgress], None] | None = None,
    ) -> None:
        if isinstance(check_every, bool) or not isinstance(check_every, int) or check_every < 1:
            raise ConfigError(f"check_every must be at least 1 token, and a whole number; got {check_every!r}")
        if teacher_prompt_mask is not None and teacher_prompt_ids is None:
            raise ConfigError("teacher_prompt_mask was given without teacher_prompt_ids")
        self.teacher = LocalTeacher(teacher, top_k=config.top_k) if isinstance(teacher, nn.Module) else teacher
        if self.teacher.top_k < config.top_k:
            raise ConfigError(
                f"the Teacher records {self.teacher.top_k} candidates, the drift metric needs {config.top_k}: "
                f"make it with Teacher(model, top_k={config.top_k})"
            )
        if tokenizer is not None and teacher_tokenizer is not None:
            self.teacher.restrict_vocabulary(shared_vocabulary_size(tokenizer, teacher_tokenizer))
        self.config = config
        self.check_every = check_every
        self.truncate = truncate
        self.on_check = on_check
        ends_of = self.teacher.model if student is None else student
        self.eos_token_ids = special_token_ids(eos_token_id, ends_of, "eos_token_id")
        pads = special_token_ids(pad_token_id, ends_of, "pad_token_id") or self.eos_token_ids
        self.pad_token_id = pads[0] if pads else None
        self.chosen_tokens = {"eos": eos_token_id is not None, "pad": pad_token_id is not None}
        self._student_scorer: LocalTeacher | None = None
        if student is not None:
            self._student_scorer = LocalTeacher(student, top_k=self.teacher.top_k, role="student")
            self.teacher.restrict_vocabulary(self._student_scorer.vocab_size)
            self._student_scorer.restrict_vocabulary(self.teacher.vocab_size)
        self._given_mask = attention_mask
        self._teacher_prompt = (teacher_prompt_ids, teacher_prompt_mask)
        self._blocks: list[ScoredBlock] = []
        self._is_open = self._is_finished = False

    # ------------------------------------------------------------------ the pair

    @property
    def logits_processor(self) -> "StudentTopKLogitsProcessor":
        """Goes into `generate(logits_processor=[...])`: records the student's candidates, changes nothing."""
        from prune_opd_hf.generation.hooks import StudentTopKLogitsProcessor

        return StudentTopKLogitsProcessor(self)

    @property
    def stopping_criterion(self) -> "DriftStoppingCriteria":
        """Goes into `generate(stopping_criteria=[...])`: stops rows whose reliability is used up."""
        from prune_opd_hf.generation.hooks import DriftStoppingCriteria

        return DriftStoppingCriteria.of(self)

    # ------------------------------------------------------------------ what a driver calls

    @property
    def is_open(self) -> bool:
        """Whether a generation has begun."""
        return self._is_open

    @property
    def needs_logits(self) -> bool:
        """Whether the drift metric needs `watch` to be called: not for "nucleus", nor when `student` was given."""
        return self.config.metric != "nucleus" and self._student_scorer is None

    @property
    def stopped(self) -> Bool[Tensor, " batch"]:
        """Rows that drift has stopped."""
        return self._reason == DRIFTED

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Response tokens that each row keeps, as far as is known: all of those taken while it runs."""
        return torch.where(self._reason == RUNNING, self._taken, self._length)

    @property
    def taken(self) -> int:
        """Response tokens taken so far in each running row."""
        return self._taken

    @property
    def prompt_length(self) -> int:
        """Columns of the prompt."""
        return self._prompt_ids.shape[1]

    def open(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        attention_mask: Tensor | None = None,
        *,
        ends_are_told: bool = False,
        eos_token_ids: Int[Tensor, " ends"] | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        """Begin: prompts of every sequence, padded on the left, already repeated for `num_return_sequences`.

        Args:
            prompt_ids, attention_mask: of the student.
            ends_are_told: the driver calls `end_rows` for rows that end otherwise than by EOS. Where it does not, a run of
                padding up to the end of a row is taken to mean that the row had ended before it.
            eos_token_ids, pad_token_id: the tokens that end a row and pad it in this generation, where the driver knows; they
                replace the monitor's.

        Raises:
            MonitorStateError: this monitor has served a call already.
            InputError: empty or right-padded prompts, padding that cannot be told from text without the mask, or a mask or
                teacher's prompts that do not fit the sequences.
        """
        if self._is_open or self._is_finished:
            raise MonitorStateError("a drift monitor serves one generate call: make a new one for each call")
        batch = prompt_ids.shape[0]
        if prompt_ids.shape[1] == 0:
            raise InputError("generate was called without a prompt; the teacher needs at least one prompt token")
        if eos_token_ids is not None:
            self.eos_token_ids = tuple(eos_token_ids.tolist())
        if pad_token_id is not None:
            self.pad_token_id = pad_token_id
        mask = self._given_mask if attention_mask is None else attention_mask
        mask = (
            self._mask_from_padding(prompt_ids)
            if mask is None
            else repeat_for_sequences(mask.to(prompt_ids.device), prompt_ids, "attention_mask")
        )
        if mask.shape != prompt_ids.shape:
            raise InputError(
                f"attention_mask has the shape {tuple(mask.shape)}, the prompts {tuple(prompt_ids.shape)}: "
                "give the monitor the mask that generate gets"
            )
        check_left_padding(mask)
        teacher_ids, teacher_mask = self._teacher_prompt
        if teacher_ids is None:
            self.teacher.start(prompt_ids, mask)
        else:
            teacher_mask = torch.ones_like(teacher_ids) if teacher_mask is None else teacher_mask
            self.teacher.start(
                repeat_for_sequences(teacher_ids, prompt_ids, "teacher_prompt_ids"),
                repeat_for_sequences(teacher_mask, prompt_ids, "teacher_prompt_mask"),
            )
        if self._student_scorer is not None:
            self._student_scorer.start(prompt_ids, mask)
        self._teacher_batch = self.teacher.batches
        device = prompt_ids.device
        self._prompt_ids, self._prompt_mask = prompt_ids, mask.bool()
        self._eos = torch.tensor(self.eos_token_ids, dtype=torch.long, device=device)
        self._reason = torch.full((batch,), RUNNING, device=device)
        self._length = torch.zeros(batch, dtype=torch.long, device=device)  # of rows that have ended
        self._event_counts = torch.zeros(batch, dtype=torch.long, device=device)
        self._followed = torch.arange(batch, device=device)  # rows that the teacher still follows
        self._taken = self._checked = self._watched = self._discarded = 0
        self._ends_are_told = ends_are_told
        self._every_row = torch.arange(batch, device=device)
        self._shown: list[tuple[Tensor, int, Tensor]] = []  # rows, column of the block and logits, not read yet
        self._is_open = True
        self._new_block()

    def watch(self, logits: Float[Tensor, "rows vocab"], rows: Int[Tensor, " rows"] | None = None) -> None:
        """Record the student's candidates for the next token.

        Args:
            logits: before any warper. Read later, when the block is checked, so they must not be changed in place.
            rows: which sequences these are; all by default.
        """
        if self._watched == 0:
            self.teacher.restrict_vocabulary(logits.shape[-1])
            self._new_block(watched=True)
        if self._watched != self._taken:
            raise MonitorStateError(f"the student's logits were shown twice for one token: {CHANGED_TOKENS}")
        rows = self._every_row if rows is None else rows
        self._shown.append((rows, self._taken - self._checked, logits[:, : self.teacher.vocab_size].float()))
        self._watched += 1

    def take(self, token_ids: Int[Tensor, " rows"], rows: Int[Tensor, " rows"] | None = None) -> bool:
        """Take the token that every given row got next; at the end of a block, score and judge it.

        Returns:
            Whether a block was checked, so that `stopped` may have changed.
        """
        at = slice(None) if rows is None else rows, self._taken - self._checked
        self._tokens[at] = token_ids
        self._taken += 1
        if self._shown and len(self._shown) * self._shown[0][2].numel() > SHOWN_ELEMENTS:
            self._read_shown()
        if self._taken - self._checked < self.check_every:
            return False
        self._check()
        return True

    def _read_shown(self) -> None:
        """Candidates, normalizers and the tokens' own logits of what was shown since the last call, several tokens at once."""
        if not self._shown:
            return
        rows = torch.cat([rows for rows, _, _ in self._shown])
        # Filled on the device: numbers copied from the host would make every token wait for it.
        columns = torch.cat([torch.full_like(rows, column) for rows, column, _ in self._shown])
        logits = torch.cat([logits for _, _, logits in self._shown]) if len(self._shown) > 1 else self._shown[0][2]
        self._shown = []
        at = rows, columns
        normalizer = logits.logsumexp(dim=-1, keepdim=True)
        top = logits.topk(self.teacher.top_k, dim=-1)
        self._student_ids[at] = top.indices
        self._student_log_probs[at] = top.values - normalizer
        self._normalizer[at] = normalizer.squeeze(-1)
        inside = self._tokens[at].clamp(max=logits.shape[-1] - 1).unsqueeze(-1)
        self._token_logits[at] = logits.gather(-1, inside).squeeze(-1)

    def refuse_rubbish(self) -> None:
        """Name the row and the position, where logits shown lately are the reason that nothing can be sampled from them.

        Raises:
            NonFiniteLogitsError: they are NaN or infinite.
        """
        for rows, column, logits in self._shown:
            bad = ~logits.amax(dim=-1).isfinite()
            if bool(bad.any()):
                raise self._rubbish("student", int(rows[bad][0]), self._checked + column)

    def end_rows(self, rows: Int[Tensor, " ended"]) -> None:
        """Tell that these rows ended by themselves with the token taken last. An EOS token need not be told."""
        rows = rows[self._reason[rows] == RUNNING]
        self._reason[rows] = BY_ITSELF
        self._length[rows] = self._taken

    def settle(self) -> None:
        """Score and judge what is pending, at the end of a generation."""
        if self._taken > self._checked:
            self._check()

    def finish(self, sequences: Any) -> Rollouts:
        """Score what is still pending and return the record.

        Args:
            sequences: what `generate` returned: token ids of shape (batch, prompt + time), or an output with `.sequences`.

        Raises:
            MonitorStateError: no generation was watched, this was called before, or the tokens are not those that were seen
                (beam search reorders them, assisted decoding takes them back).
        """
        sequences = getattr(sequences, "sequences", sequences)
        if self._is_finished or not self._is_open:
            raise MonitorStateError("finish was called twice" if self._is_finished else "no generation was watched")
        time = sequences.shape[1] - self.prompt_length
        if time == self._watched == self._taken + 1 and sequences.shape[0] == len(self._reason):
            self.take(sequences[:, -1])  # without the criterion nobody showed the last token
        if (
            not 0 < time <= self._taken
            or sequences.shape[0] != len(self._reason)
            or not torch.equal(sequences[:, : self.prompt_length], self._prompt_ids)
        ):
            raise MonitorStateError(
                f"finish got sequences of the shape {tuple(sequences.shape)} that are not those of the generation that was "
                f"watched: {len(self._reason)} rows of {self.prompt_length} prompt and {self._taken} response tokens"
            )
        self.settle()
        self._is_finished = True
        return self._record(sequences, time)

    # ------------------------------------------------------------------ inside

    def _new_block(self, watched: bool = False) -> None:
        """Empty buffers for the next block, one line for each sequence."""
        batch, k, device = len(self._reason), self.teacher.top_k, self._prompt_ids.device
        shape = (batch, self.check_every)
        if not watched:
            self._tokens = torch.zeros(shape, dtype=torch.long, device=device)
        if watched or self._watched:
            self._student_ids = torch.zeros(*shape, k, dtype=torch.long, device=device)
            self._student_log_probs = torch.zeros(*shape, k, device=device)
            self._normalizer = torch.zeros(shape, device=device)
            self._token_logits = torch.zeros(shape, device=device)

    def _check(self) -> None:
        """One teacher pass over the block; then drift events, reliability, and who ends where."""
        self._read_shown()
        rows, width = self._followed, self._taken - self._checked
        if len(rows):
            block = self._score(rows, width)
            self._blocks.append(block)
            self._judge(rows, block)
        else:
            with_student = self._student_scorer is not None or self._watched > 0
            shape = len(self._reason), width, self.teacher.top_k
            self._blocks.append(ScoredBlock.empty(*shape, self._prompt_ids.device, with_student=with_student))
        self._checked = self._taken
        self._new_block()
        if self.on_check is not None:
            self.on_check(self._progress())

    def _score(self, rows: Tensor, width: int) -> ScoredBlock:
        tokens = self._tokens[rows, :width]
        wanted = self._positions_before_end(rows, tokens)
        columns: dict[str, Tensor] = {}
        if self._student_scorer is not None:
            student = self._ask(self._student_scorer, rows, tokens, None, wanted)
            columns["student_topk_ids"] = student.topk_ids
            columns["student_topk_log_probs"] = student.topk_log_probs
            columns["token_log_probs"] = student.token_log_probs
        elif self._watched:
            normalizer = self._normalizer[rows, :width]
            self._check_student_logits(rows, normalizer, wanted)
            columns["student_topk_ids"] = self._student_ids[rows, :width]
            columns["student_topk_log_probs"] = self._student_log_probs[rows, :width]
            columns["token_log_probs"] = self._token_logits[rows, :width] - normalizer
        if self.teacher.batches != self._teacher_batch:
            raise MonitorStateError(
                "the Teacher has begun another batch since, and this generation's last tokens are not scored yet: call finish "
                "before the next generation, or give each monitor a Teacher of its own"
            )
        scores = self._ask(self.teacher, rows, tokens, columns.get("student_topk_ids"), wanted)
        columns["teacher_token_log_probs"] = scores.token_log_probs
        columns["teacher_topk_ids"] = scores.topk_ids
        columns["teacher_topk_log_probs"] = scores.topk_log_probs
        k = self.config.top_k
        if scores.candidate_log_probs is not None:
            columns["teacher_log_probs"] = scores.candidate_log_probs
            columns["overlap"] = topk_overlap(columns["student_topk_ids"][..., :k], scores.topk_ids[..., :k])
        positions = ScoredPositions(
            tokens,
            scores.topk_ids,
            scores.topk_log_probs,
            columns.get("student_topk_ids"),
            columns.get("student_topk_log_probs"),
            scores.candidate_log_probs,
        )
        columns["drift_events"] = find_drift_events(self.config, wanted, positions)
        columns["token_ids"] = tokens
        return ScoredBlock.spread(columns, rows, len(self._reason))

    def _ask(
        self, model: Any, rows: Tensor, tokens: Tensor, candidates: Tensor | None, wanted: Tensor
    ) -> TeacherScores:
        try:
            return model.score(tokens, candidates, wanted=wanted)
        except NonFiniteLogitsError as error:
            if error.row is None or error.token is None:
                raise
            raise self._rubbish(model.role, int(rows[error.row]), self._checked + error.token) from error

    @staticmethod
    def _rubbish(role: str, row: int, token: int) -> NonFiniteLogitsError:
        message = f"the {role} returned NaN or infinite logits for row {row}, response token {token}"
        return NonFiniteLogitsError(message, row=row, token=token)

    def _positions_before_end(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Positions of the block that belong to the response; notes rows whose EOS lies in the block."""
        width = tokens.shape[1]
        columns = torch.arange(width, device=tokens.device)
        is_eos = torch.isin(tokens, self._eos)
        first_eos = torch.where(is_eos, columns, width).amin(dim=-1)
        running = self._reason[rows] == RUNNING
        ends_here = running & (first_eos < width)
        self._length[rows] = torch.where(ends_here, self._checked + first_eos + 1, self._length[rows])
        self._reason[rows] = torch.where(ends_here, BY_ITSELF, self._reason[rows])
        ended = self._reason[rows] != RUNNING
        limit = torch.where(ended, self._length[rows] - self._checked, width)
        return columns < limit.unsqueeze(-1)

    def _check_student_logits(self, rows: Tensor, normalizer: Tensor, wanted: Tensor) -> None:
        bad = ~normalizer.isfinite() & wanted
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            raise self._rubbish("student", int(rows[row]), self._checked + column)

    def _judge(self, rows: Tensor, block: ScoredBlock) -> None:
        """Count events, find exhausted tokens, and stop following rows that have ended."""
        events = block.drift_events[rows]
        counts = self._event_counts[rows].unsqueeze(-1) + events.long().cumsum(dim=-1)
        if self.truncate:
            width = events.shape[1]
            lengths = torch.arange(self._checked + 1, self._checked + width + 1, device=events.device)
            ended = self._reason[rows] != RUNNING
            limit = torch.where(ended, self._length[rows], self._checked + width)
            exhausted = reliability_of_counts(counts, self.config.weight_drop) <= RELIABILITY_FLOOR
            exhausted &= (lengths >= self.config.min_length) & (lengths <= limit.unsqueeze(-1))
            first = torch.where(exhausted, lengths, self._checked + width + 1).amin(dim=-1)
            # A row whose last own token is also its exhausted one has ended by itself.
            drifts = (first <= self._checked + width) & ~(ended & (first == limit))
            self._length[rows] = torch.where(drifts, first, self._length[rows])
            self._reason[rows] = torch.where(drifts, DRIFTED, self._reason[rows])
            self._discarded += int(torch.where(drifts, limit - first, 0).sum())
        self._event_counts[rows] = counts[:, -1]
        running = self._reason[rows] == RUNNING
        if not bool(running.all()):
            kept = running.nonzero().squeeze(-1)
            self._followed = rows[kept]
            if len(kept):
                self.teacher.keep_rows(kept)
                if self._student_scorer is not None:
                    self._student_scorer.keep_rows(kept)

    def _progress(self) -> DriftProgress:
        ended = self._reason != RUNNING
        kept = torch.where(ended, self._length, self._checked)
        return DriftProgress(
            tokens=self._checked,
            rows=len(self._reason),
            running_rows=int((~ended).sum()),
            drifted_rows=int((self._reason == DRIFTED).sum()),
            ended_rows=int((self._reason == BY_ITSELF).sum()),
            kept_tokens=int(kept.sum()),
            discarded_tokens=self._discarded,
        )

    def _mask_from_padding(self, prompt_ids: Tensor) -> Tensor:
        starts = special_token_ids(None, self.teacher.model, "bos_token_id")
        return mask_from_padding(prompt_ids, self.pad_token_id, self.eos_token_ids, starts)

    def verify(self, sequences: Int[Tensor, "batch total"]) -> None:
        """Make sure that the tokens seen so far are those that stand there now, in the rows that are still followed.

        Raises:
            MonitorStateError: they are not; beam search and assisted decoding do that.
        """
        seen = torch.cat([*(block.token_ids for block in self._blocks), self._tokens], dim=1)[:, : self._taken]
        there = sequences[:, self.prompt_length : self.prompt_length + self._taken]
        if not torch.equal(seen[self._followed], there[self._followed]):
            raise MonitorStateError(CHANGED_TOKENS)

    def _record(self, sequences: Tensor, time: int) -> Rollouts:
        tokens = sequences[:, self.prompt_length :]
        lengths = torch.where(self._reason == RUNNING, time, self._length).clamp(max=time)
        reasons = self._reason.clone()
        if not self._ends_are_told and self.pad_token_id is not None and self.pad_token_id not in self.eos_token_ids:
            # Beside plain `generate`, a row that another criterion ended shows only as padding up to the end.
            padding = (tokens == self.pad_token_id).flip(-1).long().cumprod(dim=-1).sum(dim=-1)
            earlier = (time - padding < lengths) & (padding < time)
            lengths = torch.where(earlier, time - padding, lengths)
            reasons = torch.where(earlier, BY_ITSELF, reasons)
        columns = torch.arange(time, device=tokens.device)
        mask = columns < lengths.unsqueeze(-1)
        seen = torch.cat([block.token_ids for block in self._blocks], dim=1)[:, :time]
        if not bool(((seen == tokens) | ~mask).all()):
            raise MonitorStateError(CHANGED_TOKENS)
        kept = int(lengths.max())
        mask = mask[:, :kept]
        joined = join_blocks(self._blocks, mask)
        pad = self.pad_token_id or 0
        return Rollouts(
            prompt_ids=self._prompt_ids,
            prompt_mask=self._prompt_mask,
            response_ids=torch.where(mask, tokens[:, :kept], pad),
            response_mask=mask,
            reliability=reliability(joined["drift_events"], mask, self.config.weight_drop),
            stop_reason=tuple(REASONS[reason] for reason in reasons.tolist()),
            config=self.config,
            pad_token_id=pad,
            **joined,
        )
