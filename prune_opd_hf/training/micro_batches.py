"""What the updates of one step are made of: its rollouts in micro-batches.

It knows rollouts; it does not know models, losses or the optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from prune_opd_hf.records.rollouts import Rollouts


@dataclass(frozen=True)
class StepRollouts:
    """The rollouts of one step on one process, ready for its updates.

    Attributes:
        rollouts: all of them.
        micro_batches: as `micro_batch` makes them, longest responses first.
        token_count: response tokens of the step, over all processes.
        weight_sum: sum of the loss weights of all those tokens.
    """

    rollouts: Rollouts
    micro_batches: list[dict[str, Any]]
    token_count: Float[Tensor, ""]
    weight_sum: float


def micro_batch(rollouts: Rollouts, old_log_probs: Tensor | None = None) -> dict[str, Any]:
    """The inputs of `compute_loss`: "rollouts", their "input_ids" (the Trainer counts them), and "old", where the first pass over
    them leaves its "log_probs" for further updates."""
    old = {} if old_log_probs is None else {"log_probs": old_log_probs}
    return {"input_ids": rollouts.sequences, "rollouts": rollouts, "old": old}


def split_by_length(rollouts: Rollouts, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Micro-batches of so many rows, rows of like length together, longest first."""
    order = rollouts.lengths.argsort(descending=True, stable=True)
    return [micro_batch(rollouts.select(rows)) for rows in order.split(list(sizes))]
