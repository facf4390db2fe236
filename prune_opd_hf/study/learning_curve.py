"""Training under a budget with a learning curve: a callback that evaluates along the way and stops training when everything it
was given is spent.

It knows the trainer's counters; it knows neither tasks nor what is compared with what.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.training import PruneOPDTrainer


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


class BudgetedTraining(TrainerCallback):
    """Evaluates along the way, and stops training once every one of its budgets is spent.

    Evaluations come at the start, at equal steps of the progress towards the slowest budget, and in the step in which any
    budget is spent, so that runs can be compared there without interpolating far.

    Args:
        budgets: amounts by axis, see `AXES`.
        points: evaluations on the way to the slowest budget.
        on_step: called after each step with what was spent, the newest accuracy, and the share of the slowest budget.

    Attributes:
        curve: the points so far.
    """

    def __init__(
        self,
        budgets: Mapping[str, float],
        points: int,
        on_step: Callable[[CurvePoint, float], None] | None = None,
    ) -> None:
        self.budgets, self.points, self.on_step = dict(budgets), points, on_step
        self.curve: list[CurvePoint] = []
        self.trainer: PruneOPDTrainer | None = None
        self._reached: set[str] = set()
        self._cpu_seconds, self._cpu_mark = 0.0, 0.0

    def train(self, trainer: PruneOPDTrainer) -> list[CurvePoint]:
        """Train until the budgets are spent. The trainer must have been made with this callback.

        Returns:
            The learning curve.
        """
        self.trainer = trainer
        trainer.remove_callback(PrinterCallback)  # standard output belongs to the caller
        trainer.train()
        return self.curve

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first point, before any step."""
        assert self.trainer is not None
        self.trainer.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step, and decide whether to evaluate and whether to stop."""
        now = time.process_time()
        self._cpu_seconds, self._cpu_mark = self._cpu_seconds + now - self._cpu_mark, now
        point = self._point(state.global_step, self.curve[-1].accuracy)
        progress = {axis: spent(point, axis) / amount for axis, amount in self.budgets.items()}
        reached = {axis for axis, share in progress.items() if share >= 1}
        slowest = min(progress.values())
        control.should_training_stop = slowest >= 1
        control.should_evaluate = len(self.curve) <= slowest * self.points or bool(reached - self._reached)
        self._reached = reached
        if self.on_step is not None:
            self.on_step(point, slowest)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Add a point; the time of the evaluation is not counted."""
        self.curve.append(self._point(state.global_step, metrics["eval_accuracy"]))
        self._cpu_mark = time.process_time()

    def _point(self, step: int, accuracy: float) -> CurvePoint:
        assert self.trainer is not None
        counts = self.trainer.counts
        return CurvePoint(
            step=step,
            seconds=sum(self.trainer.phase_seconds.values()),
            generated_tokens=counts.generated,
            accuracy=accuracy,
            cpu_seconds=self._cpu_seconds,
            kept_tokens=counts.kept,
            rollouts=counts.rollouts,
        )


def check_budgets(budgets: Mapping[str, float]) -> None:
    """Refuse budgets that no run could end by.

    Raises:
        ConfigError: names the budget.

    Example:
        >>> check_budgets({"steps": 0})
        Traceback (most recent call last):
            ...
        prune_opd_hf.errors.ConfigError: the budget of steps must be a finite number above 0, got 0
    """
    if not budgets:
        raise ConfigError(f"at least one budget is needed: {', '.join(AXES)}")
    for axis, amount in budgets.items():
        if axis not in AXES:
            raise ConfigError(f"a budget is counted in {', '.join(AXES)}, got {axis!r}")
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 < amount < float("inf"):
            raise ConfigError(f"the budget of {axis} must be a finite number above 0, got {amount!r}")


def accuracy_at(curve: Sequence[CurvePoint], axis: str, amount: float) -> float | None:
    """Accuracy once so much has been spent, on the straight line between two points; None beyond the curve's end.

    Example: half-way between 10 and 20 steps.
        >>> curve = [CurvePoint(10, 1.0, 0, 0.4), CurvePoint(20, 2.0, 0, 0.8)]
        >>> round(accuracy_at(curve, "steps", 15), 3), accuracy_at(curve, "seconds", 2.5)
        (0.6, None)
    """
    return _first_crossing([(spent(point, axis), point.accuracy) for point in curve], amount)


def spent_to_reach(curve: Sequence[CurvePoint], axis: str, accuracy: float) -> float | None:
    """What had been spent when an accuracy was first reached, on the straight line between two points; None if never.

    Example: half-way between 10 s and 20 s.
        >>> curve = [CurvePoint(0, 0.0, 0, 0.1), CurvePoint(5, 10.0, 0, 0.4), CurvePoint(9, 20.0, 0, 0.8)]
        >>> spent_to_reach(curve, "seconds", 0.6), spent_to_reach(curve, "seconds", 0.9)
        (15.0, None)
    """
    return _first_crossing([(point.accuracy, spent(point, axis)) for point in curve], accuracy)


def _first_crossing(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """y where x first reaches the level, on the straight line from the point before; the first y if x begins there."""
    before: tuple[float, float] | None = None
    for x, y in points:
        if x >= level:
            if before is None or x == before[0]:
                return y
            return before[1] + (level - before[0]) / (x - before[0]) * (y - before[1])
        before = (x, y)
    return None
