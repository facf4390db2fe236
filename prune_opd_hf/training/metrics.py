"""What a training run counts, times and logs, under one vocabulary. Records and functions over rollouts, and a clock."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import TrainerCallback

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.several import rows_by_name

POSITION_BINS = 12
PHASES = ("generate", "teacher", "update")


@dataclass(frozen=True)
class TokenCounts:
    """Totals of a run over all processes.

    Attributes:
        rollouts: responses sampled.
        generated: response tokens sampled, those discarded past the end of a drifted row included.
        kept: response tokens that entered the loss.
        saved: tokens that stopped responses left unsampled below the cap of their step (an upper bound of the saving: some
            would have ended by themselves).
    """

    rollouts: int = 0
    generated: int = 0
    kept: int = 0
    saved: int = 0

    def plus(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class StepTotals:
    """Totals of one step: tokens, rows that drift stopped or that met the run's longest response, sum of the loss weights, drift
    events."""

    tokens: TokenCounts
    drifted: int
    capped: int
    weight_sum: float
    events: int = 0

    @classmethod
    def of(
        cls,
        rollouts: Rollouts,
        weights: Float[Tensor, "batch time"],
        stopped: Bool[Tensor, " batch"],
        *,
        cap: int,
        longest: int,
        discarded: int,
    ) -> "StepTotals":
        """The totals of one process, where pruning ended the rows `stopped`, and `discarded` tokens were sampled past the end of
        drifted rows; `cap` and `longest` are the longest response of the step and of the run."""
        kept = int(rollouts.lengths.sum())
        saved = int((cap - rollouts.lengths.cpu())[stopped].sum()) - discarded
        ends = zip(rollouts.stop_reason, rollouts.lengths.tolist(), strict=True)
        return cls(
            TokenCounts(len(rollouts), kept + discarded, kept, saved),
            drifted=rollouts.stop_reason.count("drift"),
            capped=sum(reason == "length" and length == longest for reason, length in ends),
            weight_sum=float(weights.sum()),
            events=int(rollouts.drift_events[rollouts.response_mask].sum()),
        )

    def over_processes(self, accelerator: Accelerator) -> "StepTotals":
        """The sum of every process's."""
        mine = [*astuple(self.tokens), self.drifted, self.capped, self.events, self.weight_sum]
        summed = accelerator.reduce(torch.tensor(mine, dtype=torch.float64).to(accelerator.device), reduction="sum")
        *whole, weight_sum = summed.tolist()
        *tokens, drifted, capped, events = map(int, whole)
        return StepTotals(TokenCounts(*tokens), drifted, capped, weight_sum, events)


@dataclass
class MetricMeans:
    """Weighted means and maxima of named values between two log calls, as one process has measured them."""

    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if {*self.sums} != {*self.weights} or min([1.0, *self.weights.values()]) <= 0:
            raise ConfigError("means must hold sums and weights above 0 of the same names")

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """One value; NaN, infinity and zero weight are left out."""
        if not math.isfinite(value) or weight <= 0:
            return
        self.sums[name] = self.sums.get(name, 0.0) + value * weight
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def add_all(self, values: Mapping[str, float | tuple[float, float]]) -> None:
        """Several values, each with its weight or of weight 1."""
        for name, value in values.items():
            self.add(name, *(value if isinstance(value, tuple) else (value,)))

    def add_max(self, name: str, value: float) -> None:
        """One value of which the largest counts."""
        self.maxima[name] = max(self.maxima.get(name, -math.inf), value)

    def take(self, of_processes: Sequence["MetricMeans"] | None = None) -> dict[str, float]:
        """The means and maxima so far, over those of every process, or of this one; starts anew."""
        merged = MetricMeans()
        for means in [self] if of_processes is None else of_processes:
            for name, total in means.sums.items():
                merged.sums[name] = merged.sums.get(name, 0.0) + total
                merged.weights[name] = merged.weights.get(name, 0.0) + means.weights[name]
            for name, value in means.maxima.items():
                merged.add_max(name, value)
        self.sums, self.weights, self.maxima = {}, {}, {}
        return {**{name: total / merged.weights[name] for name, total in merged.sums.items()}, **merged.maxima}


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are numbers; what could not be measured is left out of a log line."""
    return {name: value for name, value in values.items() if not (isinstance(value, float) and math.isnan(value))}


def rollout_metrics(
    rollouts: Rollouts, stopped: Bool[Tensor, " batch"], *, cap: int, longest: int, teachers: Iterable[str] = ()
) -> dict[str, tuple[float, float]]:
    """Means over one step's rollouts, each with its weight: tokens, or rows.

    Arguments as of `StepTotals.of`; `teachers` are the names of several, also of those that no row names.
    """
    mask, lengths = rollouts.response_mask, rollouts.lengths.float()
    reasons, rows, tokens = rollouts.stop_reason, float(len(rollouts)), float(lengths.sum())
    metrics = {
        "prune/reliability": (float(rollouts.reliability[mask].mean()), tokens),
        "prune/drift_event_share": (float(rollouts.drift_events[mask].float().mean()), tokens),
        "prune/effective_length_mean": (float(rollouts.effective_lengths.float().mean()), rows),
        "prune/stopped_share": (float(stopped.float().mean()), rows),
        "prune/ended_share": (reasons.count("eos") / rows, rows),
        "prune/criterion_share": (reasons.count("criterion") / rows, rows),
        "prune/response_length_mean": (float(lengths.mean()), rows),
        "budget/cap": (float(cap), 1.0),
    }
    found = agreement_metrics(rollouts)
    if "kl" in found:
        metrics["kl/sampled"] = found["kl"]
    if "overlap" in found:
        metrics["prune/overlap"] = found["overlap"]
        metrics |= overlap_by_position(rollouts, longest)
    return metrics | metrics_by_teacher(rollouts, teachers)


def metrics_by_teacher(rollouts: Rollouts, names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Of each of several teachers: its share of the rollouts, how often they drift from it, and how well both agree."""
    metrics: dict[str, tuple[float, float]] = {}
    if rollouts.teachers:
        share = {name: rollouts.teachers.count(name) / len(rollouts) for name in names}
        metrics = {f"teacher/{name}/rollouts_share": (value, float(len(rollouts))) for name, value in share.items()}
    for name, rows in rows_by_name(rollouts.teachers):
        part = rollouts.select(rows)
        found, mask = agreement_metrics(part), part.response_mask
        found["drift_event_share"] = (float(part.drift_events[mask].float().mean()), float(mask.sum()))
        metrics |= {f"teacher/{name}/{metric}": value for metric, value in found.items()}
    return metrics


def agreement_metrics(rollouts: Rollouts) -> dict[str, tuple[float, float]]:
    """How well both models agree on the response tokens, each with their number, as far as that was recorded.

    "kl" is the single-sample estimate of the reverse KL along the student's own tokens, the mean of log p(y_t) - log q(y_t);
    "teacher_log_prob" is the mean of log q(y_t).
    """
    mask, found = rollouts.response_mask, {}
    tokens = float(mask.sum())
    if rollouts.token_log_probs is not None:
        log_ratio = (rollouts.token_log_probs - rollouts.teacher_token_log_probs)[mask]
        found["kl"] = (float(log_ratio.mean()), tokens)
        found["teacher_log_prob"] = (float(rollouts.teacher_token_log_probs[mask].mean()), tokens)
    if rollouts.overlap is not None:
        found["overlap"] = (float(rollouts.overlap[mask].mean()), tokens)
    return found


def overlap_by_position(rollouts: Rollouts, longest: int) -> dict[str, tuple[float, float]]:
    """Mean overlap in up to 12 equal ranges of response positions, under `prune/overlap_by_position/FIRST`, each with its
    tokens."""
    assert rollouts.overlap is not None
    width = -(-longest // POSITION_BINS)
    metrics = {}
    for first in range(0, rollouts.overlap.shape[1], width):
        inside = rollouts.response_mask[:, first : first + width]
        if bool(inside.any()):
            values = rollouts.overlap[:, first : first + width][inside]
            metrics[f"prune/overlap_by_position/{first:05d}"] = (float(values.mean()), float(len(values)))
    return metrics


class StepClock(TrainerCallback):
    """Counts seconds by phase; "update" is from the end of a step's preparation to the end of its optimizer step."""

    def __init__(self) -> None:
        self.phase_seconds = dict.fromkeys(PHASES, 0.0)
        self._in_step = dict.fromkeys(PHASES, 0.0)
        self._since_taken, self._steps = dict.fromkeys(PHASES, 0.0), 0
        self._update_started = 0.0

    def prepared(self, generate: float = 0.0, teacher: float = 0.0) -> None:
        """The rollouts of the next step are there, and took so many seconds of each phase."""
        self._in_step = {"generate": generate, "teacher": teacher, "update": 0.0}
        self._update_started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Add the step's seconds to the totals."""
        self._in_step["update"] = time.perf_counter() - self._update_started
        self._steps += 1
        for phase, seconds in self._in_step.items():
            self.phase_seconds[phase] += seconds
            self._since_taken[phase] += seconds

    def take(self) -> dict[str, float]:
        """Mean seconds of a step by phase since the last call, as `time/PHASE`; starts anew."""
        means = {f"time/{phase}": seconds / max(self._steps, 1) for phase, seconds in self._since_taken.items()}
        self._since_taken, self._steps = dict.fromkeys(PHASES, 0.0), 0
        return means
