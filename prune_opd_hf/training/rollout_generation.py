"""The rollouts of one step: requests to an engine, and what becomes of the completions while the teacher watches.

Under FSDP2 each forward pass is a collective: the layers' weights are gathered from all processes. Responses end
unevenly, so one process may have no rows left while another goes on. There every process announces each forward pass
beforehand, and one that has finished makes passes over a dummy token until no other process announces any more.

It knows engines and monitors; it does not know settings, losses or the optimizer.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from prune_opd_hf.generation import DriftMonitor, Request, RolloutEngine
from prune_opd_hf.generation.engine import request_seed
from prune_opd_hf.models.lm_head import input_device
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.base import TeacherContext

T = TypeVar("T")

SECONDS_BEFORE_BAR = 5.0


def generate_rollouts(
    engine: RolloutEngine,
    monitor: DriftMonitor,
    model: nn.Module,
    prompts: Sequence[tuple[int, ...]],
    limits: Int[Tensor, " rows"],
    *,
    seed: int,
    step: int,
    process: int,
    contexts: Sequence[TeacherContext] = (),
    progress: bool = False,
) -> Rollouts:
    """Sample one response to each prompt with the bare student's weights, of at most `limits` tokens, while the teacher watches.

    The run's seed, the optimizer steps done so far, the process and the number of a row decide what it samples.
    """
    requests = [
        Request(prompt, request_seed(seed, "rollouts", step, process, row), limit)
        for row, (prompt, limit) in enumerate(zip(prompts, limits.tolist(), strict=True))
    ]
    device = input_device(model)
    engine.update_weights(model, step)
    watch = monitor.begin(device=device, ragged=engine.ragged, contexts=contexts)
    with equal_forward_passes(model, device):
        for _ in with_bar(
            engine.generate(requests, watch), len(requests), f"rollouts of step {step + 1}", shown=progress
        ):
            pass  # the watch has the tokens
    rollouts = watch.rollouts()
    monitor.teacher.release()
    return rollouts


def with_bar(completions: Iterable[T], total: int, name: str, *, shown: bool) -> Iterable[T]:
    """The same, with a bar where they take long and it is `shown`."""
    looks: dict[str, Any] = {"leave": False, "dynamic_ncols": True, "unit": "response"}
    return tqdm(completions, total=total, desc=name, delay=SECONDS_BEFORE_BAR, disable=not shown, **looks)


# ---------------------------------------------------------------------- sharded students


def passes_are_collective(model: nn.Module) -> bool:
    """Whether a forward pass of this model needs the other processes."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return any(isinstance(part, FSDPModule) for part in model.modules())


@contextmanager
def equal_forward_passes(model: nn.Module, device: torch.device) -> Iterator[None]:
    """While this lasts, every process makes as many forward passes of a sharded model as the one that makes most of them.

    All processes enter and leave it together. A failure on one leaves the others waiting until the process group's time limit, as
    any collective does. A model that is not sharded is left alone.
    """
    if not passes_are_collective(model):
        yield
        return

    def announced(passes: int) -> Tensor:
        """The number of forward passes that all processes are about to make, this one's included."""
        count = torch.tensor(passes, device=device)
        dist.all_reduce(count)
        return count

    def announce_pass(*_: Any) -> None:
        announced(1)

    # In front of the hook that gathers weights, so that the order of collectives is the same on every process.
    hook = model.register_forward_pre_hook(announce_pass, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    training = model.training
    model.eval()
    with torch.no_grad():
        while announced(0):
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    model.train(training)
