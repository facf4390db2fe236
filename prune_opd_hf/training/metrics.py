"""What a training run counts and logs, under one vocabulary. Pure functions and records over rollouts."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from prune_opd_hf.records.rollouts import Rollouts

POSITION_BINS = 12


@dataclass(frozen=True)
class TokenCounts:
    """Totals of a run over all processes.

    Attributes:
        rollouts: responses sampled.
        generated: response tokens sampled, those that were cut again included.
        kept: response tokens that entered the loss.
        saved: tokens that stopped responses left unsampled below the cap of their step (an upper bound of the saving: some
            would have ended by themselves).
    """

    rollouts: int = 0
    generated: int = 0
    kept: int = 0
    saved: int = 0

    @classmethod
    def of(cls, rollouts: Rollouts, cap: int, discarded: int) -> "TokenCounts":
        """The counts of one step's rollouts on one process.

        Args:
            cap: the response budget of the step.
            discarded: tokens that were sampled and cut again.
        """
        kept = int(rollouts.lengths.sum())
        left = int((cap - rollouts.lengths.cpu())[stopped_by_pruning(rollouts, cap)].sum()) - discarded
        return cls(len(rollouts), kept + discarded, kept, left)

    def plus(self, other: "TokenCounts") -> "TokenCounts":
        """Both together."""
        return TokenCounts(*(mine + theirs for mine, theirs in zip(self.as_list(), other.as_list(), strict=True)))

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)

    def as_list(self) -> list[int]:
        """In the order of the fields."""
        return list(self.as_dict().values())

    @classmethod
    def from_list(cls, values: list[int]) -> "TokenCounts":
        """What `as_list` returned."""
        return cls(*(int(value) for value in values))


def stopped_by_pruning(rollouts: Rollouts, cap: int) -> Bool[Tensor, " batch"]:
    """Rows that pruning ended: by drift, or cut below the cap by a control ("fixed", "random")."""
    reasons, lengths = rollouts.stop_reason, rollouts.lengths.tolist()
    return torch.tensor(
        [
            reason == "drift" or (reason == "length" and length < cap)
            for reason, length in zip(reasons, lengths, strict=True)
        ]
    )


class MetricMeans:
    """Weighted means and maxima of named values between two log calls, on all processes together.

    Example:
        >>> means = MetricMeans()
        >>> means.add("reward/mean", 1.0, weight=3); means.add("reward/mean", 5.0, weight=1)
        >>> means.take(), means.take()
        ({'reward/mean': 2.0}, {})
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """One value; NaN and zero weight are left out."""
        if math.isnan(value) or weight <= 0:
            return
        self._sums[name] = self._sums.get(name, 0.0) + value * weight
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def add_all(self, values: Mapping[str, float | tuple[float, float]]) -> None:
        """Several values, each with its weight or of weight 1."""
        for name, value in values.items():
            self.add(name, *(value if isinstance(value, tuple) else (value,)))

    def add_max(self, name: str, value: float) -> None:
        """One value of which the largest counts."""
        self._maxima[name] = max(self._maxima.get(name, -math.inf), value)

    def take(self, gather: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None) -> dict[str, float]:
        """The means and maxima so far; starts anew.

        Args:
            gather: brings together what `state_dict` returns on every process; None where there is one.
        """
        merged = MetricMeans()
        for state in [self.state_dict()] if gather is None else gather(self.state_dict()):
            merged._merge(state)
        self._sums, self._weights, self._maxima = {}, {}, {}
        return {**{name: total / merged._weights[name] for name, total in merged._sums.items()}, **merged._maxima}

    def _merge(self, state: dict[str, Any]) -> None:
        for name, total in state["sums"].items():
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._weights[name] = self._weights.get(name, 0.0) + state["weights"][name]
        for name, value in state["maxima"].items():
            self.add_max(name, value)

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed between two log lines needs."""
        return {"sums": dict(self._sums), "weights": dict(self._weights), "maxima": dict(self._maxima)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._sums, self._weights, self._maxima = (dict(state[name]) for name in ("sums", "weights", "maxima"))


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are numbers; what could not be measured is left out of a log line."""
    return {name: value for name, value in values.items() if not (isinstance(value, float) and math.isnan(value))}


def rollout_metrics(rollouts: Rollouts, cap: int, longest: int) -> dict[str, tuple[float, float]]:
    """Means over one step's rollouts, each with its weight: tokens, or rows.

    Args:
        rollouts: of one step on one process.
        cap: the longest response they could have had.
        longest: the largest response length of the run; it sets the bins of the overlap by position.
    """
    mask, lengths = rollouts.response_mask, rollouts.lengths.float()
    reasons, rows, tokens = rollouts.stop_reason, float(len(rollouts)), float(lengths.sum())
    metrics = {
        "prune/reliability": (float(rollouts.reliability[mask].mean()), tokens),
        "prune/drift_event_share": (float(rollouts.drift_events[mask].float().mean()), tokens),
        "prune/effective_length_mean": (float(rollouts.effective_lengths.float().mean()), rows),
        "prune/stopped_share": (float(stopped_by_pruning(rollouts, cap).float().mean()), rows),
        "prune/ended_share": (reasons.count("eos") / rows, rows),
        "prune/response_length_mean": (float(lengths.mean()), rows),
        "budget/cap": (float(cap), 1.0),
    }
    if rollouts.token_log_probs is not None:
        # The single-sample estimate of the reverse KL along the student's own tokens: log p(y_t) - log q(y_t).
        log_ratio = (rollouts.token_log_probs - rollouts.teacher_token_log_probs)[mask]
        metrics["kl/sampled"] = (float(log_ratio.mean()), tokens)
    if rollouts.overlap is not None:
        metrics["prune/overlap"] = (float(rollouts.overlap[mask].mean()), tokens)
        metrics |= overlap_by_position(rollouts, longest)
    return metrics


def bin_width(longest: int, bins: int = POSITION_BINS) -> int:
    """Positions in one bin, where `bins` of them reach up to `longest`.

    Example:
        >>> bin_width(112), bin_width(5)
        (10, 1)
    """
    return max(1, -(-longest // bins))


def overlap_by_position(rollouts: Rollouts, longest: int, bins: int = POSITION_BINS) -> dict[str, tuple[float, float]]:
    """Mean overlap in up to `bins` equal ranges of response positions, under `prune/overlap_by_position/FIRST`, each with its
    tokens."""
    assert rollouts.overlap is not None
    width = bin_width(longest, bins)
    metrics = {}
    for first in range(0, rollouts.overlap.shape[1], width):
        inside = rollouts.response_mask[:, first : first + width]
        if bool(inside.any()):
            values = rollouts.overlap[:, first : first + width][inside]
            metrics[f"prune/overlap_by_position/{first:05d}"] = (float(values.mean()), float(len(values)))
    return metrics
