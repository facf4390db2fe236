"""The rollouts of one step: the student answers prompts while the teacher watches, and pruning says how long each row may get.

Under FSDP or ZeRO-3 each forward pass is a collective: the layers' weights are gathered from all processes. Responses end
unevenly, so one process may have no rows left while another goes on. There every process announces each forward pass
beforehand, and one that has finished makes passes over a dummy token until no other process announces any more.

It knows the student, the teacher and the way of pruning; it does not know losses or the optimizer.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import StoppingCriteria
from transformers.integrations import is_deepspeed_zero3_enabled

from prune_opd_hf.errors import NonFiniteLogitsError
from prune_opd_hf.generation import DriftMonitor, DriftProgress, pruned_generate
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.base import Teacher
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.pruning import Pruning


@dataclass(frozen=True)
class GeneratedRollouts:
    """The rollouts of one step on one process, and what they cost.

    Attributes:
        rollouts: one row for each prompt.
        discarded_tokens: sampled past the end of a drifted row, inside a block.
        generate_seconds, teacher_seconds: wall time of either.
    """

    rollouts: Rollouts
    discarded_tokens: int
    generate_seconds: float
    teacher_seconds: float


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


def sampling_arguments(
    args: PruneOPDConfig, *, eos_token_ids: Sequence[int], pad_token_id: int, suppress_tokens: Sequence[int]
) -> dict[str, Any]:
    """How the student is sampled in a run, as arguments of `generate`.

    Args:
        eos_token_ids: the tokens that end a response.
        pad_token_id: pads finished rows.
        suppress_tokens: never sampled, because the teacher does not know them.
    """
    own = args.dictionary("generation_kwargs")
    arguments: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        arguments = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    arguments |= {"pad_token_id": pad_token_id, "eos_token_id": list(eos_token_ids), **own}
    if suppress_tokens:
        arguments["suppress_tokens"] = [*suppress_tokens, *(own.get("suppress_tokens") or [])]
    return arguments


def generate_rollouts(
    model: nn.Module,
    teacher: Teacher,
    prompts: Mapping[str, Tensor],
    args: PruneOPDConfig,
    sampling: Mapping[str, Any],
    pruning: Pruning,
    step: int,
) -> GeneratedRollouts:
    """Sample one response to each prompt of a left-padded batch while the teacher watches.

    Args:
        model: the bare student.
        teacher: scores every block of tokens.
        prompts: `input_ids` and `attention_mask`.
        args: settings of the run: drift, seed, `generation_batch_size`.
        sampling: as `sampling_arguments` returns it.
        pruning: how long rows may get.
        step: optimizer steps done so far; with seed and process it decides the random draws.

    Raises:
        NonFiniteLogitsError: NaN or infinite logits of student or teacher.
    """
    started, teacher_seconds = time.perf_counter(), teacher.wall_seconds
    rows, process = len(prompts["input_ids"]), args.process_index
    limits = pruning.row_limits(rows, step=step, process=process)
    cap = pruning.cap if limits is None else min(pruning.cap, int(limits.max()))
    limits = None if limits is None or int(limits.min()) == cap else limits
    parts, discarded = [], 0
    with evaluation_mode(model), own_random_state(args.device, args.seed, step, process, "rollouts"):
        for chunk in torch.arange(rows).split(args.generation_batch_size or rows):
            some = {name: values[chunk.to(values.device)] for name, values in prompts.items()}
            progress: list[DriftProgress] = []
            monitor = DriftMonitor(
                teacher,
                args.drift_config(),
                check_every=pruning.check_every(args.check_every, len(chunk), teacher.block_tokens),
                truncate=pruning.truncates,
                pad_token_id=sampling["pad_token_id"],
                eos_token_id=sampling["eos_token_id"],
                on_check=progress.append,
            )
            own = None if limits is None else RowLimits(limits[chunk], some["input_ids"].shape[1])
            sequences = sample(
                model,
                some,
                cap,
                sampling,
                drift_monitor=monitor,
                **({} if own is None else {"stopping_criteria": [own]}),
            )
            part = monitor.finish(sequences)
            parts.append(part if own is None else own.with_stop_reasons(part, sampling["eos_token_id"]))
            discarded += progress[-1].discarded_tokens
    teacher_seconds = teacher.wall_seconds - teacher_seconds
    generate_seconds = time.perf_counter() - started - teacher_seconds
    return GeneratedRollouts(Rollouts.cat(parts), discarded, generate_seconds, teacher_seconds)


def sample(
    model: Any, prompts: Mapping[str, Tensor], max_new_tokens: int, sampling: Mapping[str, Any], **more: Any
) -> Int[Tensor, "batch total"]:
    """Sequences of prompts (left-padded `input_ids` and `attention_mask`) and responses of up to `max_new_tokens`.

    All processes call it together where the model is sharded. A failure on one then leaves the others waiting until the process
    group's time limit, as any collective does.

    Raises:
        NonFiniteLogitsError: the student's logits are NaN or infinite.
    """
    arguments = {**prompts, "max_new_tokens": max_new_tokens, "custom_generate": pruned_generate, **sampling, **more}
    try:
        with equal_forward_passes(model, prompts["input_ids"][:1, -1:]):
            return model.generate(**arguments)
    except RuntimeError as error:
        if "probability tensor" not in str(error):  # torch.multinomial's message for NaN
            raise
        raise NonFiniteLogitsError("the student returned NaN or infinite logits while it was sampled") from error


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def own_random_state(device: torch.device, seed: int, step: int, process: int, purpose: str) -> Iterator[None]:
    """A random state that depends on the arguments alone, so that a resumed run samples what the uninterrupted one did."""
    key = [seed, step, process, sum(purpose.encode())]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        yield


# ---------------------------------------------------------------------- per-row limits


class RowLimits(StoppingCriteria):
    """Ends each row at its own number of response tokens.

    Args:
        limits: response tokens of each row.
        prompt_columns: columns of the prompts, padding included.
    """

    def __init__(self, limits: Int[Tensor, " batch"], prompt_columns: int) -> None:
        self.limits, self.prompt_columns = limits, prompt_columns

    def __call__(self, input_ids: torch.LongTensor, scores: Any = None, **kwargs: Any) -> Bool[Tensor, " batch"]:
        """Which rows of `input_ids`, shape (batch, total), have reached their limit."""
        self.limits = self.limits.to(input_ids.device)
        return self.limits <= input_ids.shape[1] - self.prompt_columns

    def with_stop_reasons(self, rollouts: Rollouts, eos_token_ids: Sequence[int]) -> Rollouts:
        """The rollouts with "length" as the reason of rows at their limit that no end token ended."""
        last = rollouts.response_ids.gather(1, (rollouts.lengths - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
        ended = torch.isin(last, torch.tensor(eos_token_ids, dtype=torch.long, device=last.device))
        truncated = (rollouts.lengths >= self.limits.to(last.device)) & ~ended
        reasons = zip(truncated.tolist(), rollouts.stop_reason, strict=True)
        return replace(rollouts, stop_reason=tuple("length" if there else reason for there, reason in reasons))


# ---------------------------------------------------------------------- sharded students


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


@contextmanager
def equal_forward_passes(model: nn.Module, dummy_ids: Int[Tensor, "1 1"]) -> Iterator[None]:
    """While this lasts, every process makes as many forward passes of a sharded model as the one that makes most of them.

    Args:
        model: sharded or not; one that is not is left alone.
        dummy_ids: what further passes read.
    """
    if not is_sharded(model):
        yield
        return

    def announced(passes: int) -> Tensor:
        """The number of forward passes that all processes are about to make, this one's included."""
        count = torch.tensor(passes, device=dummy_ids.device)
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
    with torch.no_grad():
        while announced(0):
            model(input_ids=dummy_ids, use_cache=False)
