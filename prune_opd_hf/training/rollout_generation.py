"""Rollouts: requests to an engine, and what becomes of the completions while the teacher watches.

Under FSDP2 each forward pass is a collective: the layers' weights are gathered from all processes. Responses end unevenly, so one
process may have no rows left while another goes on, and a teacher may be asked by one process and not by another. There every
process announces each forward pass beforehand, and makes those of the others over a dummy token (`equal_forward_passes`).

It knows engines and monitors; it does not know settings, losses or the optimizer.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from prune_opd_hf.generation import Completion, DriftMonitor, Request, RolloutEngine
from prune_opd_hf.models.lm_head import evaluating, input_device
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.base import Teacher, TeacherContext
from prune_opd_hf.teachers.sharded import backbones

SECONDS_BEFORE_BAR = 5.0


def generate_rollouts(
    engine: RolloutEngine,
    monitor: DriftMonitor,
    model: nn.Module,
    requests: Sequence[Request],
    contexts: Sequence[TeacherContext],
    *,
    name: str,
    progress: bool,
) -> tuple[Rollouts, list[Completion]]:
    """Sample one response to each request with the bare student's weights, which the engine has, while the teacher watches.

    Where they take long and `progress` is to be shown, there is a bar of this name.
    """
    device = input_device(model)
    watch = monitor.begin(device=device, ragged=engine.ragged, contexts=contexts)
    looks: dict[str, Any] = {"leave": False, "dynamic_ncols": True, "unit": "response", "delay": SECONDS_BEFORE_BAR}
    with equal_forward_passes(model, monitor.teacher, device):
        answers = engine.generate(requests, watch)
        completions = sorted(tqdm(answers, desc=name, total=len(requests), disable=not progress, **looks))
        rollouts = watch.rollouts()
    monitor.teacher.release()
    return rollouts, completions


# ---------------------------------------------------------------------- sharded models


def passes_are_collective(model: nn.Module) -> bool:
    """Whether a forward pass of this model needs the other processes."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return any(isinstance(part, FSDPModule) for part in model.modules())


@contextmanager
def equal_forward_passes(student: nn.Module, teacher: Teacher, device: torch.device) -> Iterator[None]:
    """While this lasts, every process makes as many forward passes of each sharded model as the one that makes most of them, in one
    order.

    A process that is about to make a pass asks all others which model they are about to pass through. All then pass through each
    of those, a process over a dummy token where it has nothing to ask.

    All processes enter and leave it together. A failure on one leaves the others waiting until the process group's time limit, as
    any collective does. Models that are not sharded are left alone.
    """
    inside = {*map(id, student.modules())}
    others = [backbone for backbone in backbones(teacher) if id(backbone) not in inside]
    models = [model for model in (student, *others) if passes_are_collective(model)]
    if not models:
        yield
        return
    wanted: list[int] = []
    is_passing = False

    def announce(number: int | None = None) -> list[int]:
        """The models that any process is about to pass through, this one through that of a number."""
        counts = torch.zeros(len(models), device=device)
        if number is not None:
            counts[number] = 1
        dist.all_reduce(counts)
        return counts.nonzero().flatten().tolist()

    def pass_through(numbers: Iterable[int]) -> None:
        nonlocal is_passing
        is_passing = True
        for number in numbers:
            with torch.no_grad(), evaluating(models[number]):
                models[number](input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
        is_passing = False

    def before(number: int, *_: Any) -> None:
        nonlocal wanted
        if not is_passing:
            wanted = announce(number)
            pass_through(other for other in wanted if other < number)

    def after(number: int, *_: Any) -> None:
        if not is_passing:
            pass_through(other for other in wanted if other > number)

    hooks = []
    for number, model in enumerate(models):
        # In front of the hook that gathers weights, so that the order of collectives is the same on every process.
        hooks.append(model.register_forward_pre_hook(partial(before, number), prepend=True))
        hooks.append(model.register_forward_hook(partial(after, number)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    while numbers := announce():
        pass_through(numbers)
