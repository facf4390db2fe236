"""The student's weights as vLLM reads them: a folder of safetensors, or of an adapter, gathered from all processes."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers.utils import logging as transformers_logging

from prune_opd_hf.errors import UnsupportedGenerationError
from prune_opd_hf.models.lm_head import is_sharded
from prune_opd_hf.models.loading import is_adapted
from prune_opd_hf.records.folders import naming_full_disk


@dataclass(frozen=True)
class SavedWeights:
    """Weights on disk, of a whole model, or of an adapter over the weights that a server was started with."""

    folder: str
    version: str
    is_adapter: bool


State = tuple[int, tuple[tuple[int, int], ...]]
"""What tells a model's weights from those that it had before: the step, and each parameter's count of changes."""


def state_of(model: nn.Module, step: int) -> State:
    """The state of a model's weights after `step` optimizer steps. A checkpoint that is loaded at the same step changes it."""
    return step, tuple((id(parameter), parameter._version) for parameter in model.parameters())


class WeightFolders:
    """Saves the newest weights, and removes older ones.

    Args:
        weights_dir: an existing folder; a temporary one by default.
        name: of this run among others that use the same servers.
    """

    def __init__(self, weights_dir: str | None, name: str) -> None:
        self._parent = Path(tempfile.mkdtemp(prefix="prune-opd-weights-", dir=weights_dir))
        self._remove = weakref.finalize(self, shutil.rmtree, self._parent, ignore_errors=True)
        self._name, self._saved = name, 0

    def save(self, model: nn.Module, step: int) -> SavedWeights:
        """Save what was trained for `step` steps. All processes call it together; the first one writes.

        Raises:
            UnsupportedGenerationError: DeepSpeed's ZeRO-3, whose shards are not gathered here.
            DiskFullError: no room for them.
        """
        student: Any = model
        is_adapter = is_adapted(model)
        self._saved += 1
        version = f"{self._name}-{self._saved}-step-{step}"
        folder = self._parent / version
        state = _gathered(model)
        if is_main_process():
            arguments = {} if state is None else {"state_dict": state}
            with _without_progress_bar(), naming_full_disk(folder):
                student.save_pretrained(folder, **arguments)
        return SavedWeights(str(folder), version, is_adapter)

    def keep_only(self, weights: SavedWeights) -> None:
        for folder in self._parent.iterdir():
            if folder != Path(weights.folder):
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        self._remove()


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def is_main_process() -> bool:
    """Whether this is the first process, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _gathered(model: nn.Module) -> dict[str, Any] | None:
    """The whole state on the first process; None where it lies there anyway."""
    if not is_sharded(model):
        return None
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UnsupportedGenerationError(
            "weights that DeepSpeed's ZeRO-3 shards cannot be sent to vLLM: use FSDP2 or ZeRO-2, or rollout_engine='loop'"
        )
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
