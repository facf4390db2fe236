"""From the prompts of one optimizer step to their rollouts: who is cut where, what it cost, what there is to log.

It drives the generation under the teacher's eye and keeps what must survive from step to step: the response budget, the cut
plan, the counts. It does not know losses or the optimizer.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from prune_opd_hf.generation import DriftMonitor, DriftProgress
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.base import Teacher
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.metrics import MetricMeans, TokenCounts, rollout_metrics
from prune_opd_hf.training.pruning import RowLimits, stop_reasons
from prune_opd_hf.training.sampling import StudentSampler


@dataclass(frozen=True)
class Collected:
    """The rollouts of one step on one process.

    Attributes:
        rollouts: one row for each prompt.
        generate_seconds, teacher_seconds: what they took, apart.
    """

    rollouts: Rollouts
    generate_seconds: float
    teacher_seconds: float


class RolloutCollector:
    """Collects rollouts, step after step, under one of the ways of pruning.

    Args:
        args: the settings of the run.
        sampler, teacher: who answers, and who watches.
        accelerator: of the run; counts and lengths are those of all processes.

    Attributes:
        budget: the response budget; it moves only with `pruning="drift"`.
        cuts: the cut plan of "fixed" and "random"; None otherwise.
        counts: totals of the run.
    """

    def __init__(
        self, args: PruneOPDConfig, sampler: StudentSampler, teacher: Teacher, accelerator: Accelerator
    ) -> None:
        self.args, self.sampler, self.teacher, self.accelerator = args, sampler, teacher, accelerator
        self.drift = args.drift_config()
        self.budget = args.make_budget()
        self.cuts = args.make_cut_plan()
        self.counts = TokenCounts()

    @property
    def cap(self) -> int:
        """The longest response of the next step, before any cut of its own, in tokens."""
        return self.budget.length if self.args.pruning == "drift" else self.args.max_completion_length

    def collect(self, model: nn.Module, prompts: Mapping[str, Tensor], step: int, means: MetricMeans) -> Collected:
        """Sample one response to each prompt of a left-padded batch while the teacher watches.

        Args:
            model: the bare student.
            prompts: `input_ids` and `attention_mask`.
            step: optimizer steps done so far; decides the random draws.
            means: gets what there is to log.
        """
        started, cap, teacher_seconds = time.perf_counter(), self.cap, self.teacher.wall_seconds
        rows = len(prompts["input_ids"])
        at_once = self.args.generation_batch_size or rows
        limits = None if self.cuts is None else self.cuts.lengths(rows, step=step, process=self.args.process_index)
        parts, discarded = [], 0
        with self.sampler.mode(model, "rollouts", step):
            for first in range(0, rows, at_once):
                chunk = slice(first, first + at_once)
                part, lost = self._generate(
                    model,
                    {name: values[chunk] for name, values in prompts.items()},
                    cap,
                    None if limits is None else limits[chunk],
                )
                parts.append(part)
                discarded += lost
        rollouts = Rollouts.cat(parts)
        teacher_seconds = self.teacher.wall_seconds - teacher_seconds
        generate_seconds = time.perf_counter() - started - teacher_seconds
        self._note(rollouts, cap, discarded, means)
        return Collected(rollouts, generate_seconds, teacher_seconds)

    def _generate(
        self, model: nn.Module, prompts: Mapping[str, Tensor], cap: int, limits: Tensor | None
    ) -> tuple[Rollouts, int]:
        """The record of one generation, and the tokens that were sampled and cut again."""
        seen: list[DriftProgress] = []
        monitor = DriftMonitor(
            self.teacher,
            self.drift,
            check_every=self._check_every(len(prompts["input_ids"]), cap),
            truncate=self.args.pruning == "drift",
            pad_token_id=self.sampler.pad_token_id,
            eos_token_id=self.sampler.eos_token_ids,
            on_check=seen.append,
        )
        own: dict[str, Any] = {}
        if limits is not None:
            cap = min(cap, int(limits.max()))
            if int(limits.min()) < cap:
                own["stopping_criteria"] = [RowLimits(limits, prompts["input_ids"].shape[1])]
        sequences = self.sampler.generate(model, prompts, cap, drift_monitor=monitor, **own)
        rollouts = monitor.finish(sequences)
        if limits is not None:
            rollouts = replace(rollouts, stop_reason=stop_reasons(rollouts, limits, self.sampler.eos_token_ids))
        return rollouts, seen[-1].discarded_tokens

    def _check_every(self, rows: int, cap: int) -> int:
        """Tokens between two teacher passes. Where drift stops nobody, the teacher need not look before the end: its passes
        are as long as suits its device."""
        if self.args.pruning == "drift":
            return self.args.check_every
        return max(self.args.check_every, min(cap, self.teacher.block_tokens // rows))

    def _note(self, rollouts: Rollouts, cap: int, discarded: int, means: MetricMeans) -> None:
        if self.args.pruning == "drift":
            judged = torch.stack([rollouts.effective_lengths, rollouts.ended_naturally.long()], dim=1)
            judged = self.accelerator.gather(judged)
            means.add_all(self.budget.update(judged[:, 0], judged[:, 1].bool()))
        counts = TokenCounts.of(rollouts, cap, discarded)
        totals = self.accelerator.reduce(
            torch.tensor(counts.as_list(), device=rollouts.response_ids.device), reduction="sum"
        )
        step_counts = TokenCounts.from_list(totals.tolist())
        self.counts = self.counts.plus(step_counts)
        if self.cuts is not None:
            self.cuts.update(step_counts.kept / step_counts.rollouts)
        means.add_all(rollout_metrics(rollouts, cap, self.args.max_completion_length))
        means.add_max("prune/effective_length_max", float(rollouts.effective_lengths.max()))
        means.add_all({"prune/kept_tokens": float(step_counts.kept), "prune/saved_tokens": float(step_counts.saved)})

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "budget": self.budget.state_dict(),
            "cuts": None if self.cuts is None else self.cuts.state_dict(),
            "counts": self.counts.as_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ConfigError: it does not fit the settings.
        """
        self.budget.load_state_dict(state["budget"])
        if self.cuts is not None and state.get("cuts") is not None:
            self.cuts.load_state_dict(state["cuts"])
        self.counts = TokenCounts(**state["counts"])
