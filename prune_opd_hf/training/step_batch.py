"""The rollouts of one optimizer step: cut into micro-batches by length, counted over all processes, reused by further updates."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.training.checkpoints import load_reused, save_reused
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.data import merge_left_padded
from prune_opd_hf.training.objective import Objective


class StepBatch:
    """What the updates of one step, or of several on the same rollouts, are made of.

    Args:
        args: the settings of the run.
        objective: says what each token weighs.
        accelerator: of the run; counts are those of all processes.
        pad_token_id: of the prompts.

    Attributes:
        samples: micro-batches, longest responses first; "old" gets what the first update finds.
        rollouts: all of this process; None before the first step.
        token_count: response tokens of the step.
        weight_sum: sum of the loss weights of all response tokens of the step.
        ends: rows; rows that drift stopped; rows that met the run's longest length; response tokens kept.
    """

    def __init__(self, args: PruneOPDConfig, objective: Objective, accelerator: Accelerator, pad_token_id: int) -> None:
        self.args, self.objective, self.accelerator, self.pad_token_id = args, objective, accelerator, pad_token_id
        self.samples: list[dict[str, Any]] = []
        self.rollouts: Rollouts | None = None
        self.token_count: Tensor | None = None
        self.weight_sum = 0.0
        self.ends: tuple[int, int, int, int] = (0, 0, 0, 0)

    def is_reused(self, step: int) -> bool:
        """Whether the step after `step` steps works on the rollouts that are here already."""
        return step % self.args.num_iterations != 0 and bool(self.samples)

    def fill(self, generate: Callable[[Mapping[str, Tensor]], Rollouts], prompts: list[dict[str, Tensor]]) -> None:
        """Answer the prompts of all micro-batches together, and cut the record by length.

        Args:
            generate: makes rollouts of left-padded prompts.
            prompts: of each micro-batch.
        """
        self.rollouts = generate(merge_left_padded(prompts, self.pad_token_id))
        order = self.rollouts.lengths.argsort(descending=True, stable=True)
        self.samples = []
        for rows in order.split([len(batch["input_ids"]) for batch in prompts]):
            part = self.rollouts.select(rows)
            self.samples.append({"input_ids": part.sequences, "rollouts": part, "old": {}})
        self._count()

    def _count(self) -> None:
        parts: list[Rollouts] = [sample["rollouts"] for sample in self.samples]
        longest = self.args.max_completion_length
        drifted = sum(part.stop_reason.count("drift") for part in parts)
        capped = sum(
            reason == "length" and length == longest
            for part in parts
            for reason, length in zip(part.stop_reason, part.lengths.tolist(), strict=True)
        )
        kept = sum(int(part.lengths.sum()) for part in parts)
        weights = sum(float(self.objective.weights(part).sum()) for part in parts)
        mine = torch.tensor(
            [sum(map(len, parts)), drifted, capped, kept, weights], dtype=torch.float64, device="cpu"
        ).to(self.args.device)
        *ends, self.weight_sum = self.accelerator.reduce(mine, reduction="sum").tolist()
        rows, drifted, capped, kept = (int(number) for number in ends)
        self.ends = (rows, drifted, capped, kept)
        self.token_count = torch.tensor(float(kept), device=self.args.device)

    def save(self, checkpoint: str | os.PathLike) -> None:
        """Write this process's micro-batches, for a run that is resumed between two updates on them."""
        save_reused(checkpoint, self.args.process_index, self.samples)

    def load(self, checkpoint: str | os.PathLike, weight_sum: float) -> None:
        """Restore what `save` wrote."""
        self.samples = load_reused(checkpoint, self.args.process_index, self.args.device)
        if self.samples:
            self.rollouts = Rollouts.cat([sample["rollouts"] for sample in self.samples])
            self._count()
        self.weight_sum = weight_sum
