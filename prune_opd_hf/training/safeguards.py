"""What a run does when a step would do harm or nothing: skip it and count it, warn, or stop with a checkpoint.

    a gradient that is not finite    skipped: no weight moves; after several in a row the run stops
    no token carries weight          skipped: a zero gradient would still move weights by momentum and decay
    every row drifted, mostly events a line in the log: pruning is close to a fixed length
    responses grow to the cap        a warning, or a stop with a checkpoint
    mass leaks from the candidates   a warning

Counts over numbers that are the same on every process; it knows neither models nor the optimizer.
"""

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from prune_opd_hf.errors import TrainingStoppedError
from prune_opd_hf.training.metrics import StepTotals

logger = logging.getLogger(__name__)

EXPLOSION_SHARE = 0.9
EXPLOSION_STEPS = 5
"""Length explosion: in so many steps in a row at least this share of the rows met `max_completion_length`, after the run began
with at most half of that share."""

LEAK_STEPS = 5
LEAK_FRACTION = 0.8
"""Leak: the mean student mass inside the candidate set of the last steps is below this fraction of the first steps'."""


@dataclass
class SafeguardsState:
    """What safeguards have counted and seen so far, and a resumed run needs.

    Attributes:
        nonfinite, no_weight: steps skipped, by reason.
        capped_shares: of the first steps.
        masses: of the first `LEAK_STEPS` log lines, then of the last ones.
    """

    nonfinite: int = 0
    no_weight: int = 0
    skipped_in_a_row: int = 0
    capped_in_a_row: int = 0
    capped_shares: list[float] = field(default_factory=list)
    masses: list[float] = field(default_factory=list)


class Safeguards(TrainerCallback):
    """Watches the numbers of each step, and ends a run that must stop; settings as in `PruneOPDConfig`.

    Attributes:
        seen: so far.
        stop_reason: why the run must stop; None while it may go on.
    """

    def __init__(self, max_skipped_steps: int, length_explosion: str) -> None:
        self.max_skipped_steps, self.length_explosion = max_skipped_steps, length_explosion
        self.seen = SafeguardsState()
        self.stop_reason: str | None = None
        self._warned: set[str] = set()

    def judge(self, step: int, grad_norm: float, weight_sum: float) -> bool:
        """Whether the update of this step, from 1, must be left out: its gradient's norm and the sum of the loss weights of its
        response tokens are those over all processes."""
        seen = self.seen
        if not math.isfinite(grad_norm):
            seen.nonfinite += 1
            logger.warning("step %d has a gradient that is not finite (%s): its update is skipped", step, grad_norm)
        elif weight_sum == 0:
            seen.no_weight += 1
            logger.warning(
                "step %d has no token with a weight (all rows drifted at once, and drift_weight_base is 0): its update is "
                "skipped; raise drift_weight_base or drift_min_length, or lower drift_threshold",
                step,
            )
        else:
            seen.skipped_in_a_row = 0
            if grad_norm == 0:
                self._once(
                    logger.warning,
                    "zero",
                    f"the gradient of step {step} is exactly 0: student and teacher agree on every candidate",
                )
            return False
        seen.skipped_in_a_row += 1
        if self.max_skipped_steps and seen.skipped_in_a_row >= self.max_skipped_steps:
            self.stop_reason = (
                f"{seen.skipped_in_a_row} steps in a row were skipped ({seen.nonfinite} for a gradient that is not "
                f"finite, {seen.no_weight} without a token that carries weight, in all). Lower the learning rate, or "
                "look at the drift settings"
            )
        return True

    def watch_rollouts(self, step: int, totals: StepTotals) -> None:
        """Look at how the rows of a step, from 1, ended, over all processes."""
        seen, rows = self.seen, totals.tokens.rollouts
        share = totals.events / max(totals.tokens.kept, 1)
        if totals.drifted == rows and share > 0.5:
            self._once(
                logger.warning,
                "drifted",
                f"all {rows} rollouts of step {step} drifted, and {share:.0%} of the tokens that they kept are drift events: "
                f"pruning cuts them at about {totals.tokens.kept / rows:.0f} tokens wherever they drift. `prune-opd preflight` "
                "says whether other drift settings separate better on this pair, or the teacher is too far from the student",
            )
        share = totals.capped / rows
        if len(seen.capped_shares) < EXPLOSION_STEPS:
            seen.capped_shares.append(share)
        began_low = sum(seen.capped_shares) / len(seen.capped_shares) <= EXPLOSION_SHARE / 2
        seen.capped_in_a_row = seen.capped_in_a_row + 1 if share >= EXPLOSION_SHARE and began_low else 0
        if self.length_explosion == "ignore" or seen.capped_in_a_row < EXPLOSION_STEPS:
            return
        message = (
            f"responses have grown to the cap: for {seen.capped_in_a_row} steps at least {EXPLOSION_SHARE:.0%} of them met "
            "max_completion_length, which few did when the run began. The student may be repeating itself: look at "
            "log_completions, lower the learning rate, or prune by drift"
        )
        if self.length_explosion == "stop":
            self.stop_reason = message
        else:
            self._once(_warn, "explosion", message)

    def watch_mass(self, mass: float | None) -> None:
        """Look at the student's mass inside the candidate set, once a log line."""
        if mass is None:
            return
        masses = [*self.seen.masses, mass]
        self.seen.masses = masses = [*masses[:LEAK_STEPS], *masses[LEAK_STEPS:][-LEAK_STEPS:]]
        if len(masses) < 2 * LEAK_STEPS:
            return
        first, last = (sum(part) / LEAK_STEPS for part in (masses[:LEAK_STEPS], masses[LEAK_STEPS:]))
        if last < LEAK_FRACTION * first:
            self._once(
                _warn,
                "leak",
                f"probability leaks out of the candidate set: the student held {first:.0%} of its mass inside it when the run "
                f"began and holds {last:.0%} now. Tokens outside the set are not pushed back; use loss_centered=True, a larger "
                "loss_top_k, loss_type='topk_kl' with topk_kl_tail='renormalize', or a loss over the full vocabulary",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run with a checkpoint where there is a reason to."""
        if self.stop_reason is not None:
            control.should_save = control.should_training_stop = True

    def raise_if_stopped(self, checkpoint: str | None) -> None:
        """At the end of a run that had to stop, say why, and where the last checkpoint lies."""
        if self.stop_reason is not None:
            where = "no checkpoint was saved" if checkpoint is None else f"the last checkpoint is {checkpoint}"
            raise TrainingStoppedError(f"the run stopped: {self.stop_reason}; {where}")

    def metrics(self) -> dict[str, float]:
        """Steps skipped so far, as `skipped/REASON`."""
        return {"skipped/nonfinite": float(self.seen.nonfinite), "skipped/no_weight": float(self.seen.no_weight)}

    def _once(self, log: Callable[[str], None], key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            log(message)


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
