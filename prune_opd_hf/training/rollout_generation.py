"""The rollouts of one step, and the answers of an evaluation: requests to an engine, and what becomes of the completions.

The teacher watches over rollouts; an evaluation is not pruned, and `compute_metrics` decides what a right answer is.

Under FSDP or ZeRO-3 each forward pass is a collective: the layers' weights are gathered from all processes. Responses end
unevenly, so one process may have no rows left while another goes on. There every process announces each forward pass
beforehand, and one that has finished makes passes over a dummy token until no other process announces any more.

It knows engines and monitors; it does not know settings, losses or the optimizer.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import EvalPrediction, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from prune_opd_hf.generation import DriftMonitor, Request, RolloutEngine
from prune_opd_hf.generation.engine import request_seed
from prune_opd_hf.models.lm_head import input_device
from prune_opd_hf.records.rollouts import Rollouts


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
    watch = monitor.begin(device=device)
    with equal_forward_passes(model, device):
        for _ in engine.generate(requests, watch):
            pass  # the watch has the tokens
    return watch.rollouts()


# ---------------------------------------------------------------------- what the updates are made of


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


# ---------------------------------------------------------------------- evaluation


class Completion(NamedTuple):
    """One response of an evaluation, as `compute_metrics` sees it.

    Attributes:
        text: decoded without special tokens.
        ended: whether it ended by itself, rather than at the cap.
        tokens: its length, the end token included.
    """

    text: str
    ended: bool
    tokens: int


def measure_completions(
    engine: RolloutEngine,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    rows: Sequence[Mapping[str, Any]],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None,
    seed: int,
) -> dict[str, float]:
    """Mean length, the share that met the cap, seconds, and what `compute_metrics` finds in the completions, one for each row.

    The rows have `input_ids`, and processes share them; the seed and the number of a row decide what is sampled.
    """
    started = time.perf_counter()
    answered: list[tuple[int, Completion]] = []
    # Every process answers equally many rows, some twice if need be: a sharded model is called by all together.
    with accelerator.split_between_processes(list(enumerate(rows)), apply_padding=True) as mine:
        requests = [Request(tuple(row["input_ids"]), request_seed(seed, "evaluation", number)) for number, row in mine]
        with equal_forward_passes(model, accelerator.device):
            for index, token_ids, reason in engine.generate(requests):
                text = tokenizer.decode(token_ids, skip_special_tokens=True)
                answered.append((mine[index][0], Completion(text, reason != "length", len(token_ids))))
    by_number = dict(gather_object(answered))
    completions = [by_number[number] for number in range(len(rows))]
    return {
        "mean_tokens": float(np.mean([completion.tokens for completion in completions])),
        "truncated_share": float(np.mean([not completion.ended for completion in completions])),
        "runtime": time.perf_counter() - started,
        **(compute_metrics(EvalPrediction(completions, rows)) if compute_metrics is not None else {}),
    }


# ---------------------------------------------------------------------- sharded students


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of this model needs the other processes."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    kinds = (FSDPModule, FullyShardedDataParallel)
    return is_deepspeed_zero3_enabled() or any(isinstance(part, kinds) for part in model.modules())


@contextmanager
def equal_forward_passes(model: nn.Module, device: torch.device) -> Iterator[None]:
    """While this lasts, every process makes as many forward passes of a sharded model as the one that makes most of them.

    All processes enter and leave it together. A failure on one leaves the others waiting until the process group's time limit, as
    any collective does. A model that is not sharded is left alone.
    """
    if not is_sharded(model):
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
