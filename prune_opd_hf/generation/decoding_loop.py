"""The decoding loop: continuous batching with row compaction.

A row that has ended is removed from the batch and the KV cache, and the next request takes its slot. The loop knows models,
caches and requests; it does not know teachers or drift.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache

from prune_opd_hf.errors import InputError, NonFiniteLogitsError
from prune_opd_hf.generation.decoding_step import DecodingStep, new_cache
from prune_opd_hf.generation.draw import UniformStreams, inverse_transform
from prune_opd_hf.generation.engine import Completion, Request, cap_of, final_completion
from prune_opd_hf.generation.generate_call import GenerationPlan
from prune_opd_hf.generation.logits_processors import ended_rows, exclude_padding_inplace, is_row_local
from prune_opd_hf.generation.prompts import left_padded
from prune_opd_hf.generation.watch import DriftWatch
from prune_opd_hf.models.kv_cache import (
    RowMoves,
    can_join,
    kept_order,
    use_growing_layers_inplace,
)
from prune_opd_hf.models.lm_head import text_config

REFILL_SHARE = 0.125
"""Free slots are refilled when they are this share of all: each time moves the running rows' cache once."""

REFILL_SHARE_INSIDE_A_BLOCK = 0.5
"""The same where a watch has to score a block before its end, so that rows can join."""


@dataclass(frozen=True)
class PreparedBatch:
    """A first batch as `generate` prepared it; all rows have one limit."""

    input_ids: Int[Tensor, "batch prompt"]
    model_kwargs: dict[str, Any]
    limit: int
    seeds: list[int]


def steps_between_compactions(device: torch.device) -> int:
    """How often the host looks for rows that have ended; on an accelerator each look waits for the device."""
    return 1 if device.type == "cpu" else 8


class DecodingLoop:
    """One generation. Rows 0..n-1 of every buffer are the running ones; all sequences end in the same column.

        row 0   . . p p p r r r        p prompt, r response, . masked
        row 1   p p p p p p p r        `length` columns so far; `rows` says which request each row is

    Args:
        plan: what `generate` prepared.
        watch: observes every token, and ends rows.
        slots: rows decoded at a time.
        device: of the tokens.
        student: a decoding step to use, over an empty cache; None makes one.
    """

    def __init__(
        self,
        plan: GenerationPlan,
        watch: DriftWatch | None,
        *,
        slots: int,
        device: torch.device,
        student: DecodingStep | None = None,
    ) -> None:
        self.plan, self.watch, self.slots, self.device = plan, watch, slots, device
        self.eos = plan.eos.to(device)
        self.compact_every = steps_between_compactions(device)
        self.waiting: deque[tuple[int, Request]] = deque()
        self.step = self.length = self.batch_first = self.started = 0
        self.rows = torch.zeros(0, dtype=torch.long, device=device)
        self.live = torch.zeros(0, 0, dtype=torch.long, device=device)
        self.done = torch.zeros(0, dtype=torch.bool, device=device)
        self.undrawable = torch.zeros_like(self.done)
        self.ends_at = torch.zeros(0, dtype=torch.long, device=device)  # columns of rows that are done
        self.positions = torch.zeros(0, 1, dtype=torch.long, device=device)
        self.mask: Tensor | None = None  # over the columns that were there when the newest rows joined
        self.starts: list[int] = []  # the column in which each row's response begins
        self.deadlines: list[int] = []  # the step after which each row has met its cap
        self.uniforms = UniformStreams(device)
        self.student = student or DecodingStep(plan.model)
        self.whole: Tensor | None = None  # the batch as `generate` would show it, for processors that want to see it
        self.whole_columns = 0
        self.pending: list[tuple[int, Tensor, str]] = []  # rows that left, until the watch has scored their last tokens

    def run(self, work: "PreparedBatch | Sequence[Request]") -> Iterator[Completion]:
        """Decode until every row has ended, and yield each when it is final."""
        first = work if isinstance(work, PreparedBatch) else None
        if not isinstance(work, PreparedBatch):
            self.waiting.extend(enumerate(work))
        with self._naming_the_context():
            while first is not None or len(self.rows) or self.waiting:
                refill = first is None and self._refill_is_due()
                yield from self._final()
                logits = [self._next_logits()] if len(self.rows) else []
                if first is not None:
                    logits.append(self._admit_prepared(first))
                    first = None
                elif refill:
                    logits.append(self._admit_waiting())
                elif not logits:
                    continue
                scored = self._append(self._choose(logits[0] if len(logits) == 1 else torch.cat(logits)))
                if scored or self.step in self.deadlines or self.step % self.compact_every == 0:
                    self._compact()
                yield from self._final()
        if self.watch is not None:
            self.watch.score_pending()
        yield from self._final()

    # ------------------------------------------------------------------ rows join

    def _refill_is_due(self) -> bool:
        """Whether waiting requests take free slots now. A watch scores what is pending first, and may end further rows."""
        if not self.waiting:
            return False
        pending = 0 if self.watch is None else self.watch.pending_tokens
        if len(self.rows):
            if not self._rows_may_join():
                return False
            share = REFILL_SHARE_INSIDE_A_BLOCK if pending else REFILL_SHARE
            if self.slots - len(self.rows) < max(1, round(self.slots * share)):
                return False
        if pending:
            assert self.watch is not None
            self.watch.score_pending()
            self._note_stopped()
            self._compact()
        return True

    def _rows_may_join(self) -> bool:
        watch_allows = self.watch is None or self.watch.can_add_rows
        return self.plan.rows_may_join and watch_allows and can_join(self.student.cache)

    def _admit_prepared(self, work: PreparedBatch) -> Tensor:
        """The first batch, as `generate` prepared it; the logits after its prompts."""
        ids, kwargs = work.input_ids, dict(work.model_kwargs)
        mask = kwargs.get("attention_mask")
        prompt_mask = torch.ones_like(ids) if mask is None else mask
        given, cache = kwargs.get("position_ids"), kwargs["past_key_values"]
        positions = prompt_mask.sum(dim=-1, keepdim=True) if given is None else given[:, -1:] + 1
        use_growing_layers_inplace(cache)
        self._begin_batch(ids, prompt_mask, cache, work.limit)
        logits = self.student.read(
            self.plan.model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs), self.device
        )
        self._number_rows(range(len(ids)), positions, [work.limit] * len(ids), work.seeds)
        return logits

    def _admit_waiting(self) -> Tensor:
        """Requests take the free slots; the logits after their prompts. A prompt is read once for all its requests."""
        free = self.slots - len(self.rows)
        taken = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        prompts = [request.prompt_ids for _, request in taken]
        joining, cache = len(self.rows) > 0, new_cache(self.plan.model)
        shareable = can_join(cache)
        read = list(dict.fromkeys(prompts)) if shareable else prompts
        cap = self.plan.config.max_new_tokens or self.plan.max_length
        # Processors that ask for columns were made for prompts of one width.
        width = 0 if self.plan.rows_may_join else self.plan.max_length - cap
        ids, mask = left_padded(read, self.plan.pad, self.device, width=width)
        limits = [cap_of(request, cap) for _, request in taken]
        places = [read.index(prompt) for prompt in prompts] if shareable else list(range(len(prompts)))
        lines = torch.tensor(places, device=self.device)
        if not joining:
            self._begin_batch(ids, mask, cache, max(limits), lines)
        logits = self._read(ids, mask, cache)
        if joining:
            self._join(ids, mask, cache, lines, max(limits))
        elif shareable and (len(read) < len(prompts) or self.student.copies_prompts):
            self._share(cache, mask, lines, max(limits))
        if self.watch is not None:
            self.watch.add_rows(ids[lines], mask[lines])
        seeds = [request.seed for _, request in taken] if self.plan.do_sample else []
        self._number_rows((number for number, _ in taken), mask[lines].sum(dim=-1, keepdim=True), limits, seeds)
        return logits[lines]

    def _read(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if self.student.takes_positions:
            inputs["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        return self.student.read(inputs, self.device)

    def _begin_batch(
        self, ids: Tensor, mask: Tensor, cache: DynamicCache, room: int, lines: Tensor | None = None
    ) -> None:
        """Rows where none are running."""
        self.length = ids.shape[1]
        ids, self.mask = (ids, mask.clone()) if lines is None else (ids[lines], mask[lines])
        self.live = ids.new_full((len(ids), self.length + room), self.plan.pad)
        self.live[:, : self.length] = ids
        padded = None if bool(self.mask.bool().all()) else self.mask
        self.student.use(cache, padded, max_length=self.length + room)
        self.whole = self.live.clone() if self.plan.shows_whole_batch else None
        self.whole_columns = self.length
        exclude_padding_inplace(self.plan.processors, self.mask)

    def _share(self, cache: DynamicCache, mask: Tensor, lines: Tensor, room: int) -> None:
        """One line for each request of prompts that were read once."""
        joined = self.student.add_rows(mask[:0], cache, mask, lines, least_columns=self.length)
        self._use(joined.cache, joined.mask, room)

    def _join(self, ids: Tensor, mask: Tensor, cache: DynamicCache, lines: Tensor, room: int) -> None:
        """New rows below the running ones, right ends aligned."""
        assert self.mask is not None
        rows = len(self.rows)
        since = self.mask.new_ones(rows, self.length - self.mask.shape[1])
        running = torch.cat([self.mask, since], dim=1)
        joined = self.student.add_rows(running, cache, mask, lines)
        before, width = self.length, joined.mask.shape[1]
        room = max(room, *(deadline - self.step for deadline in self.deadlines))
        live = self.live.new_full((rows + len(lines), width + room), self.plan.pad)
        for part, at in ((self.live[:rows, :before], slice(rows)), (ids[lines], slice(rows, None))):
            kept = min(width, part.shape[1])
            live[at, width - kept : width] = part[:, part.shape[1] - kept :]
        self.live, self.length = live, width
        self.starts = [start + width - before for start in self.starts]
        self.ends_at += width - before
        self._use(joined.cache, joined.mask, room)

    def _use(self, cache: DynamicCache, mask: Tensor, room: int) -> None:
        self.mask = mask = mask.clone()  # made in inference mode, and moved outside of it
        padded = None if bool(mask.bool().all()) else mask
        self.student.use(cache, padded, max_length=self.length + room)

    def _number_rows(self, numbers: Iterable[int], positions: Tensor, limits: list[int], seeds: list[int]) -> None:
        new = torch.tensor(list(numbers), dtype=torch.long, device=self.device)
        if len(self.rows) == 0:
            self.batch_first = int(new[0])
        self.started += len(new)
        self.rows = torch.cat([self.rows, new])
        self.done = torch.cat([self.done, torch.zeros_like(new, dtype=torch.bool)])
        self.undrawable, self.ends_at = torch.zeros_like(self.done), torch.cat([self.ends_at, torch.zeros_like(new)])
        self.positions = torch.cat([self.positions, positions.expand(len(new), 1)])
        self.starts += [self.length] * len(new)
        self.deadlines += [self.step + limit for limit in limits]
        if seeds:
            self.uniforms.add(seeds)

    # ------------------------------------------------------------------ one token

    def _next_logits(self) -> Tensor:
        logits = self.student.next(self.tokens.unsqueeze(-1), self.positions, self.length, self.device)
        self.positions += 1
        return logits

    def _choose(self, logits: Tensor) -> Int[Tensor, " rows"]:
        if self.watch is not None and self.watch.needs_candidates:
            self.watch.observe_logits(logits, self._rows_if_fewer())
        scores = self._process(logits) if self.plan.processors else logits
        # `max`, since `argmax` is slower
        tokens = self._draw(scores.softmax(dim=-1)) if self.plan.do_sample else scores.max(dim=-1).indices
        return tokens if self.compact_every == 1 else torch.where(self.done, self.plan.pad, tokens)

    def _rows_if_fewer(self) -> Tensor | None:
        """Which rows are left; None while all that were started are, which is cheaper to write to."""
        return None if len(self.rows) == self.started else self.rows

    def _draw(self, probabilities: Tensor) -> Int[Tensor, " rows"]:
        tokens, vocabulary = inverse_transform(probabilities, self.uniforms.next()), probabilities.shape[-1]
        if self.compact_every == 1:
            if int(tokens.max()) == vocabulary:
                self._refuse_undrawable(tokens == vocabulary)
            return tokens
        self.undrawable |= (tokens == vocabulary) & ~self.done
        return tokens.clamp(max=vocabulary - 1)

    def _refuse_undrawable(self, rows: Bool[Tensor, " rows"]) -> None:
        if not bool(rows.any()):
            return
        if self.watch is not None:
            self.watch.check_sampled_from()
        place = int(rows.nonzero()[0, 0])
        row, token = int(self.rows[place]), self.length - self.starts[place]
        at = f"at response token {token}" if self.compact_every == 1 else f"before response token {token}"
        raise NonFiniteLogitsError(
            f"the student's logits, as its logits processors leave them, are NaN or infinite for row {row} {at}, so nothing "
            "can be sampled: check its weights and the processors",
            row=row,
            token=token,
        )

    def _process(self, scores: Tensor) -> Tensor:
        ids = self.live[: len(self.rows), : self.length]
        for processor in self.plan.processors:
            if is_row_local(processor):
                scores = processor(ids, scores)
            else:
                batch, place = self._whole_batch(), self.rows - self.batch_first
                whole = scores.new_zeros(len(batch), scores.shape[-1])
                whole[place] = scores
                scores = processor(batch, whole)[place]
        return scores

    def _whole_batch(self) -> Tensor:
        """Every sequence of the batch as `generate` would show it: those that have ended padded."""
        assert self.whole is not None
        fresh = slice(self.whole_columns, self.length)
        self.whole[self.rows - self.batch_first, fresh] = self.live[: len(self.rows), fresh]
        self.whole_columns = self.length
        return self.whole[:, : self.length]

    def _append(self, tokens: Tensor) -> bool:
        """Write the tokens down and note which rows end with them. Returns whether the watch scored a block."""
        n = len(self.rows)
        self.tokens = tokens
        self.live[:n, self.length] = tokens
        self.length += 1
        self.step += 1
        scored = self.watch is not None and self.watch.append_tokens(tokens, self._rows_if_fewer())
        ends = torch.isin(tokens, self.eos)
        for criterion in self.plan.criteria:
            ends |= self._ask(criterion)
        if self.watch is not None and self.plan.criteria:
            newly = ends & ~self.done
            if bool(newly.any()):
                self.watch.end_rows(self.rows[newly], "criterion")
        if self.step in self.deadlines:
            capped = torch.tensor([deadline == self.step for deadline in self.deadlines], device=self.device)
            if self.watch is not None:
                self.watch.end_rows(self.rows[capped & ~ends & ~self.done], "length")
            ends |= capped
        self._mark_done(ends)
        if scored:
            self._note_stopped()
        return scored

    def _ask(self, criterion: Any) -> Tensor:
        if is_row_local(criterion):
            return ended_rows(criterion, self.live[: len(self.rows), : self.length])
        return ended_rows(criterion, self._whole_batch())[self.rows - self.batch_first]

    def _note_stopped(self) -> None:
        """Rows that the watch has ended."""
        assert self.watch is not None
        self._mark_done(self.watch.stopped[self.rows])

    def _mark_done(self, ends: Tensor) -> None:
        if self.compact_every > 1:
            self.ends_at = torch.where(ends & ~self.done, self.length, self.ends_at)
        self.done |= ends

    # ------------------------------------------------------------------ row compaction

    def _compact(self) -> None:
        """Remove rows that are done from the batch and the cache."""
        if self.compact_every > 1:
            self._refuse_undrawable(self.undrawable)
        leaving = self.done.tolist()
        if not any(leaving):
            return
        if self.whole is not None:
            self._whole_batch()
        self._note_ended([place for place, leaves in enumerate(leaving) if leaves])
        order = kept_order(leaving)
        index = torch.tensor(order, dtype=torch.long, device=self.device)
        moves = RowMoves.to(index)
        for buffer in (self.live, self.positions, self.mask, self.ends_at):
            if buffer is not None:
                moves.apply_inplace(buffer)
        kept = len(order)
        self.live, self.positions, self.ends_at = self.live[:kept], self.positions[:kept], self.ends_at[:kept]
        self.mask = None if self.mask is None else self.mask[:kept]
        self.rows, self.tokens = self.rows[index], self.tokens[index]
        self.done = torch.zeros(kept, dtype=torch.bool, device=self.device)
        self.undrawable = torch.zeros_like(self.done)
        self.starts = [self.starts[place] for place in order]
        self.deadlines = [self.deadlines[place] for place in order]
        if self.plan.do_sample:
            self.uniforms.keep_rows(index)
        self.student.keep_rows_inplace(index, moves)

    def _note_ended(self, places: list[int]) -> None:
        ends = self.ends_at.tolist() if self.compact_every > 1 else [self.length] * len(self.rows)
        numbers, eos = self.rows.tolist(), set(self.plan.eos.tolist())
        for place in places:
            tokens = self.live[place, self.starts[place] : ends[place]].clone()
            joined_at = self.step - (self.length - self.starts[place])  # the step before its first response token
            reason = "length" if len(tokens) >= self.deadlines[place] - joined_at else "criterion"
            self.pending.append((numbers[place], tokens, "eos" if int(tokens[-1]) in eos else reason))

    def _final(self) -> Iterator[Completion]:
        """Rows that have left and whose last tokens are scored."""
        if self.watch is not None and self.watch.pending_tokens:
            return
        for number, tokens, reason in self.pending:
            yield final_completion(self.watch, number, tokens.tolist(), reason)
        self.pending = []

    @contextmanager
    def _naming_the_context(self) -> Iterator[None]:
        try:
            yield
        except IndexError as error:  # an embedding's: the ids have been through the teacher or `generate`
            context = getattr(text_config(self.plan.model), "max_position_embeddings", None)
            longest = int(self.positions.max()) + 1 if len(self.positions) else self.length
            if context is None or longest <= context:
                raise
            raise InputError(
                f"the student's context holds {context} tokens, and a sequence of {longest} would have to be read: "
                "lower max_new_tokens or shorten the prompts"
            ) from error
