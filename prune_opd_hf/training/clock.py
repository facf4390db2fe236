"""Callbacks that mark moments of a run: where the seconds of a step go, and when a run begins or must end."""

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

PHASES = ("generate", "teacher", "update")


class StepClock(TrainerCallback):
    """Books seconds by phase; "update" runs from the end of a step's preparation to the end of its optimizer step.

    Attributes:
        phase_seconds: totals of the run.
    """

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
        """Close the books of the step."""
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


class RunHooks(TrainerCallback):
    """Tells the trainer that a run begins, after the Trainer has reset its own counters, and ends it where it must stop.

    Args:
        begin: called when a run begins.
        must_stop: asked after each step; True ends the run with a checkpoint.
    """

    def __init__(self, begin: Callable[[], None], must_stop: Callable[[], bool]) -> None:
        self.begin, self.must_stop = begin, must_stop

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """A run begins."""
        self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step ended."""
        if self.must_stop():
            control.should_save = control.should_training_stop = True
