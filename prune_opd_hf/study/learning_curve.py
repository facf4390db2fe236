"""Training under a budget with a learning curve: the callback that evaluates along the way and ends the run when everything it
was given is spent. The demo and the study share it.

It knows the trainer's counters; it knows neither tasks nor what is compared with what.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import EvalPrediction, PrinterCallback, TrainerCallback

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.tasks import is_correct
from prune_opd_hf.training import PruneOPDTrainer


@dataclass(frozen=True)
class CurvePoint:
    """One point of a learning curve. What had been spent is that of training; evaluations are left out.

    Attributes:
        step: optimizer steps.
        seconds: on the clock.
        generated_tokens: response tokens sampled, those that were cut again included.
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
    "steps": "step",
    "seconds": "seconds",
    "cpu_seconds": "cpu_seconds",
    "tokens": "generated_tokens",
}
"""What a budget may be counted in, and the field of `CurvePoint` that holds it."""


class BudgetedRun(TrainerCallback):
    """Evaluates along the way, and ends the run once every one of its budgets is spent.

    Evaluations come at the start, at equal steps of the progress towards the slowest budget, and in the step in which any
    budget is spent, so that runs can be compared there without interpolating far.

    Args:
        budgets: amounts by axis, see `AXES`.
        points: evaluations on the way to the slowest budget.
        tell: called after each step with the trainer and the newest curve point's accuracy.

    Attributes:
        curve: the points so far.

    Raises:
        ConfigError: an unknown axis, an amount that is not above 0, or no budget.
    """

    def __init__(
        self,
        budgets: Mapping[str, float],
        points: int,
        tell: Callable[[PruneOPDTrainer, "CurvePoint"], None] | None = None,
    ) -> None:
        check_budgets(budgets)
        self.budgets, self.points, self.tell = dict(budgets), points, tell
        self.curve: list[CurvePoint] = []
        self.trainer: PruneOPDTrainer | None = None
        self._reached: set[str] = set()
        self._cpu_seconds, self._cpu_mark = 0.0, 0.0

    def run(self, trainer: PruneOPDTrainer) -> list[CurvePoint]:
        """Train to the end of the budgets. The trainer must have been made with this callback.

        Returns:
            The learning curve.
        """
        self.trainer = trainer
        for callback in list(trainer.callback_handler.callbacks):
            if isinstance(callback, PrinterCallback):
                trainer.remove_callback(callback)  # standard output belongs to the caller
        trainer.train()
        return self.curve

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first point, before any step."""
        assert self.trainer is not None
        self.trainer.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Book the step, and decide whether to evaluate and whether to stop."""
        assert self.trainer is not None
        now = time.process_time()
        self._cpu_seconds, self._cpu_mark = self._cpu_seconds + now - self._cpu_mark, now
        spent = self._spent(state.global_step, self.curve[-1].accuracy)
        progress = {axis: getattr(spent, AXES[axis]) / amount for axis, amount in self.budgets.items()}
        reached = {axis for axis, share in progress.items() if share >= 1}
        control.should_training_stop = reached == set(self.budgets)
        due = len(self.curve) <= min(progress.values()) * self.points
        control.should_evaluate = due or bool(reached - self._reached)
        self._reached = reached
        if self.tell is not None:
            self.tell(self.trainer, spent)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Add a point; the time of the evaluation is nobody's."""
        self.curve.append(self._spent(state.global_step, metrics["eval_accuracy"]))
        self._cpu_mark = time.process_time()

    def _spent(self, step: int, accuracy: float) -> CurvePoint:
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
    return _interpolate([(getattr(point, AXES[axis]), point.accuracy) for point in curve], amount)


def spent_to_reach(curve: Sequence[CurvePoint], axis: str, accuracy: float) -> float | None:
    """What had been spent when an accuracy was first reached, on the straight line between two points; None if never.

    Example: half-way between 10 s and 20 s.
        >>> curve = [CurvePoint(0, 0.0, 0, 0.1), CurvePoint(5, 10.0, 0, 0.4), CurvePoint(9, 20.0, 0, 0.8)]
        >>> spent_to_reach(curve, "seconds", 0.6), spent_to_reach(curve, "seconds", 0.9)
        (15.0, None)
    """
    before: CurvePoint | None = None
    for point in curve:
        spent = float(getattr(point, AXES[axis]))
        if point.accuracy >= accuracy:
            if before is None:
                return spent
            earlier = float(getattr(before, AXES[axis]))
            return earlier + (accuracy - before.accuracy) / (point.accuracy - before.accuracy) * (spent - earlier)
        before = point
    return None


def _interpolate(points: Sequence[tuple[float, float]], at: float) -> float | None:
    before: tuple[float, float] | None = None
    for x, y in points:
        if x >= at:
            if before is None or x == before[0]:
                return y
            return before[1] + (at - before[0]) / (x - before[0]) * (y - before[1])
        before = (x, y)
    return None


def point_from_json(values: Mapping[str, Any]) -> CurvePoint:
    """A point as it was written with `dataclasses.asdict`; unknown fields are left out."""
    known = {item.name for item in fields(CurvePoint)}
    return CurvePoint(**{name: value for name, value in values.items() if name in known})


def exact_match(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of the embedded task: the share of right answers."""
    pairs = list(zip(prediction.predictions, prediction.label_ids, strict=True))
    right = [is_correct(completion.text, row["answer"], ended=completion.ended) for completion, row in pairs]
    return {"accuracy": sum(right) / len(right)}
