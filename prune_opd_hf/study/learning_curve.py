"""Learning curves: accuracy against what training had spent. Plain numbers; it knows neither trainers nor tasks."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CurvePoint:
    """One point of a learning curve. What was spent is that of training; evaluation is not counted.

    Attributes:
        step: optimizer steps.
        seconds: wall-clock seconds.
        generated_tokens: response tokens sampled, those that were truncated again included.
        accuracy: on held-out problems.
        cpu_seconds: of the process; with one thread they do not depend on what else the machine does.
        kept_tokens: response tokens that entered the loss.
        rollouts: responses sampled.
    """

    step: int
    seconds: float
    generated_tokens: int
    accuracy: float
    cpu_seconds: float = 0.0
    kept_tokens: int = 0
    rollouts: int = 0


AXES = {
    "steps": ("step", "optimizer steps"),
    "tokens": ("generated_tokens", "sampled tokens"),
    "cpu_seconds": ("cpu_seconds", "CPU seconds"),
    "seconds": ("seconds", "seconds"),
}
"""What a budget may be counted in: the field of `CurvePoint` that holds it, and its name in text."""


def spent(point: CurvePoint, axis: str) -> float:
    """What had been spent at this point, counted in `axis`."""
    return float(getattr(point, AXES[axis][0]))


def accuracy_at(curve: Sequence[CurvePoint], axis: str, amount: float) -> float:
    """Accuracy once so much has been spent, which is no more than the run has, on the straight line between two points."""
    accuracy = _first_crossing([(spent(point, axis), point.accuracy) for point in curve], amount)
    assert accuracy is not None, "a run ends once its budgets are spent"
    return accuracy


def spent_to_reach(curve: Sequence[CurvePoint], axis: str, accuracy: float) -> float | None:
    """What had been spent when an accuracy was first reached, on the straight line between two points; None if never."""
    return _first_crossing([(point.accuracy, spent(point, axis)) for point in curve], accuracy)


def _first_crossing(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """y where x first reaches the level, on the straight line from the point before; the first y if x begins there."""
    before = points[0]
    for x, y in points:
        if x >= level:
            return y if x == before[0] else before[1] + (level - before[0]) / (x - before[0]) * (y - before[1])
        before = (x, y)
    return None
