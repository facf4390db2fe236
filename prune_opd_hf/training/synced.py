"""Generation with a sharded student: every process keeps calling the model until all are done.

Under FSDP or ZeRO-3 each forward pass is a collective: the layers' weights are gathered from all processes. Responses end
unevenly, by drift above all, so one process may have no rows left while another goes on. Here every process announces each
forward pass beforehand, and one that has finished steps along on a dummy token until nobody announces any more.

It knows torch.distributed and modules that can be called; it does not know drift.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers.integrations import is_deepspeed_zero3_enabled

from prune_opd_hf.generation import DriftMonitor, pruned_generate


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of this model needs the other processes.

    Example:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    kinds = (FSDPModule, FullyShardedDataParallel)
    return is_deepspeed_zero3_enabled() or any(isinstance(part, kinds) for part in model.modules())


def synced_generate(
    model: Any,
    input_ids: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    drift_monitor: DriftMonitor | None = None,
    **model_kwargs: Any,
) -> Any:
    """`pruned_generate` for `model.generate(custom_generate=...)` on a sharded model; all processes call it together.

    A failure on one process leaves the others waiting until the process group's time limit, as any collective does.
    """
    announce = _Announcement(input_ids.device)
    # In front of the hook that gathers weights, so that the order of collectives is the same on every process.
    hook = model.register_forward_pre_hook(lambda *_: announce(True), prepend=True)
    try:
        sequences = pruned_generate(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            drift_monitor=drift_monitor,
            **model_kwargs,
        )
    finally:
        hook.remove()
    with torch.no_grad():
        while announce(False):
            model(input_ids=input_ids[:1, -1:], use_cache=False)
    return sequences


class _Announcement:
    """Tells all processes whether this one is about to call the model, and learns whether any is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, calls_model: bool) -> int | None:
        calling = torch.tensor(int(calls_model), device=self.device)
        dist.all_reduce(calling)
        return None if calls_model else int(calling)
