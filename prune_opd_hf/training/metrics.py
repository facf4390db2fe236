"""What a training run counts and logs, under one vocabulary. Pure functions and records over rollouts."""

import math
from dataclasses import asdict, dataclass

import torch

from prune_opd_hf.rollouts import Rollouts

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
        stopped = torch.tensor([reason == "drift" for reason in rollouts.stop_reason])
        left = int((cap - rollouts.lengths.cpu())[stopped].sum()) - discarded
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


class MetricMeans:
    """Weighted means of named values between two log calls.

    Example:
        >>> means = MetricMeans()
        >>> means.add("reward/mean", 1.0, weight=3); means.add("reward/mean", 5.0, weight=1)
        >>> means.take(), means.take()
        ({'reward/mean': 2.0}, {})
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """One value; NaN and zero weight are left out."""
        if math.isnan(value) or weight <= 0:
            return
        self._sums[name] = self._sums.get(name, 0.0) + value * weight
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def add_all(self, values: dict[str, float]) -> None:
        """Several values of weight 1."""
        for name, value in values.items():
            self.add(name, value)

    def take(self) -> dict[str, float]:
        """The means so far; starts anew."""
        means = {name: total / self._weights[name] for name, total in self._sums.items()}
        self._sums, self._weights = {}, {}
        return means


def rollout_metrics(rollouts: Rollouts, cap: int, longest: int) -> dict[str, float]:
    """Means over one step's rollouts.

    Args:
        rollouts: of one step on one process.
        cap: the response budget they were generated under.
        longest: the largest response length of the run; it sets the bins of the overlap by position.
    """
    mask, lengths = rollouts.response_mask, rollouts.lengths.float()
    effective = rollouts.effective_lengths.float()
    reasons = rollouts.stop_reason
    metrics = {
        "prune/reliability": float(rollouts.reliability[mask].mean()),
        "prune/drift_event_share": float(rollouts.drift_events[mask].float().mean()),
        "prune/effective_length_mean": float(effective.mean()),
        "prune/effective_length_max": float(effective.max()),
        "prune/stopped_share": reasons.count("drift") / len(reasons),
        "prune/ended_share": reasons.count("eos") / len(reasons),
        "prune/kept_tokens": float(lengths.sum()),
        "prune/response_length_mean": float(lengths.mean()),
        "budget/cap": float(cap),
    }
    if rollouts.overlap is not None:
        metrics["prune/overlap"] = float(rollouts.overlap[mask].mean())
        metrics |= overlap_by_position(rollouts, longest)
    return metrics


def bin_width(longest: int, bins: int = POSITION_BINS) -> int:
    """Positions in one bin, where `bins` of them reach up to `longest`.

    Example:
        >>> bin_width(112), bin_width(5)
        (10, 1)
    """
    return max(1, -(-longest // bins))


def overlap_by_position(rollouts: Rollouts, longest: int, bins: int = POSITION_BINS) -> dict[str, float]:
    """Mean overlap in up to `bins` equal ranges of response positions, under `prune/overlap_by_position/FIRST`."""
    assert rollouts.overlap is not None
    width = bin_width(longest, bins)
    metrics = {}
    for first in range(0, rollouts.overlap.shape[1], width):
        inside = rollouts.response_mask[:, first : first + width]
        if bool(inside.any()):
            values = rollouts.overlap[:, first : first + width][inside]
            metrics[f"prune/overlap_by_position/{first:05d}"] = float(values.mean())
    return metrics
