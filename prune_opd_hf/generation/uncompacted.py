"""Transformers' own loop over one batch, for models whose rows stay in the batch when they have ended."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from prune_opd_hf.generation.generate_call import GenerationPlan
from prune_opd_hf.generation.logits_processors import ended_rows, exclude_padding_inplace
from prune_opd_hf.generation.watch import DriftWatch


def sample_batch(
    plan: GenerationPlan,
    input_ids: Tensor,
    model_kwargs: dict[str, Any],
    watch: DriftWatch | None,
    *,
    first: int,
    limits: list[int],
) -> list[tuple[list[int], str]]:
    """Transformers' own loop over one batch: rows stay in it until all have ended.

    Args:
        watch: has the rows already, numbered from `first` on.
        limits: response tokens of each row.

    Returns:
        For each row its response and why it ended, before any drift.
    """
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        exclude_padding_inplace(plan.processors, mask)
    report = _Report(plan, watch, first, limits, input_ids)
    observers = [_Observe(watch, report.rows, plan.do_sample)] if watch is not None and watch.needs_candidates else []
    processors = LogitsProcessorList([*observers, *plan.processors])
    criteria = StoppingCriteriaList([MaxLengthCriteria(plan.max_length), report])
    outputs = GenerationMixin._sample(plan.model, input_ids, processors, criteria, plan.config, **model_kwargs)
    if watch is not None:
        watch.score_pending()
    sequences = getattr(outputs, "sequences", outputs)
    responses = sequences[:, input_ids.shape[1] :].tolist()
    return [
        (tokens[:length], reason)
        for tokens, length, reason in zip(responses, report.lengths, report.reasons, strict=True)
    ]


class _Report(StoppingCriteria):
    """Tells a watch of every token of plain `_sample`, and ends rows for all reasons but the length of the whole batch."""

    def __init__(
        self, plan: GenerationPlan, watch: DriftWatch | None, first: int, limits: list[int], input_ids: Tensor
    ) -> None:
        self.plan, self.watch, self.prompt = plan, watch, input_ids.shape[1]
        self.eos_token_id = plan.pad  # its presence makes `_sample` pad rows that have ended
        self.eos = plan.eos.to(input_ids.device)
        self.rows = first + torch.arange(len(input_ids), device=input_ids.device)
        self.limits = torch.tensor(limits, device=input_ids.device)
        self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.lengths, self.reasons = list(limits), ["length"] * len(limits)

    def __call__(self, input_ids: torch.LongTensor, scores: Any = None, **kwargs: Any) -> torch.BoolTensor:
        tokens, time = input_ids[:, -1], input_ids.shape[1] - self.prompt
        ends, ended = torch.isin(tokens, self.eos), torch.zeros_like(self.done)
        for criterion in self.plan.criteria:
            ended |= ended_rows(criterion, input_ids, scores)
        capped = self.limits <= time
        for reason, rows in (("eos", ends), ("criterion", ended), ("length", capped)):
            newly = rows & ~self.done
            for row in newly.nonzero().squeeze(-1).tolist():
                self.lengths[row], self.reasons[row] = time, reason
            self.done |= newly
        if self.watch is not None:
            self.watch.append_tokens(tokens, self.rows)
            self.watch.end_rows(self.rows[ended & ~ends], "criterion")
            self.watch.end_rows(self.rows[capped & ~ends & ~ended], "length")
            self.done |= self.watch.stopped[self.rows]
        return self.done.clone()


class _Observe(LogitsProcessor):
    """Shows the watch the student's logits."""

    def __init__(self, watch: DriftWatch, rows: Tensor, sampled: bool) -> None:
        self.watch, self.rows, self.sampled = watch, rows, sampled

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.watch.observe_logits(scores.clone(), self.rows)
        if self.sampled and scores.device.type == "cpu" and not bool(scores.amax(-1).isfinite().all()):
            self.watch.check_sampled_from()
        return scores
