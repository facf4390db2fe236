"""A teacher of this process whose weights wait in the CPU's memory while nobody asks it: `offload_teacher`.

They go to the accelerator when a batch begins and come back with `release`, or for as long as a loss asks for whole distributions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prune_opd_hf.teachers.local import LocalTeacher
from prune_opd_hf.teachers.ragged import RaggedRows


class OffloadedTeacher(LocalTeacher):
    """A `LocalTeacher` that is on its device only while it works."""

    def __init__(self, model: nn.Module, compute_device: torch.device, **arguments: Any) -> None:
        self._compute_device, self._resting_device = compute_device, torch.device("cpu")
        super().__init__(model, **arguments)

    @property
    def device(self) -> torch.device:
        return self._compute_device

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor | None = None) -> None:
        self.model.to(self._compute_device)
        super().start(prompt_ids, prompt_mask)

    def follow_rows(self) -> RaggedRows:
        self.model.to(self._compute_device)
        return super().follow_rows()

    def release(self) -> None:
        super().release()
        self.model.to(self._resting_device)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        was_resting = next(self.model.parameters()).device != self._compute_device
        self.model.to(self._compute_device)
        try:
            with super()._alone():
                yield
        finally:
            if was_resting:  # a loss asked in the middle of an update
                self.model.to(self._resting_device)
