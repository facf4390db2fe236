"""What a training step costs in seconds, as a function of its tokens, fitted to one measured generation.

    student's seconds = prompt + a * positions + b * sampled tokens       a: what a decoding step costs whatever its rows
    teacher's seconds = prompt + c * blocks    + d * tokens read
    update's seconds  = e * kept tokens

Non-negative least squares over the blocks of the generation. Where every block has the same number of rows, a and b cannot be
distinguished; the fit then gives all to one of them, and projections for fewer rows are too good or too bad. Estimates, not
promises. A teacher that reads each sequence anew, as a server does, is billed for every token that it reads, at one price: its
unpruned generation has one check alone, which does not tell c from d.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from prune_opd_hf.algorithm.drift import DriftConfig, Stops
from prune_opd_hf.generation import DriftMonitor, DriftProgress, Request, Sampling, VLLMSettings, make_engine
from prune_opd_hf.generation.engine import request_seed
from prune_opd_hf.models.lm_head import evaluating, input_device
from prune_opd_hf.preflight.replay import TokenBill, bills_of_reading_anew, token_bills
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.base import Teacher, unshared_ids

UPDATE_LOGITS = 2**26
"""Logits of the micro-batch on which the update is timed, at most."""


class BlockTime(NamedTuple):
    """How long one block of `check_every` positions took.

    Attributes:
        first: whether it is the first of its generation, which also reads the prompts.
        positions: decoding steps.
        tokens: tokens sampled by all rows.
        read: tokens that the teacher read.
        student_seconds, teacher_seconds: apart.
    """

    first: bool
    positions: int
    tokens: int
    read: int
    student_seconds: float
    teacher_seconds: float


@dataclass(frozen=True)
class StepCost:
    """The fitted costs in seconds.

    Attributes:
        prompt_student, prompt_teacher: of reading the prompts of one generation.
        per_position, per_token: of the student.
        per_block, per_scored_token: of the teacher, the latter of each token that it reads.
        per_kept_token: of the update; None where it was not measured.
        fit_error: mean absolute error of the fit over the blocks, as a share of their mean.
        reads_anew: whether the teacher reads a sequence anew each time that it scores some of it.
    """

    prompt_student: float
    prompt_teacher: float
    per_position: float
    per_token: float
    per_block: float
    per_scored_token: float
    per_kept_token: float | None
    fit_error: float
    reads_anew: bool = False

    @classmethod
    def fit(
        cls, blocks: Sequence[BlockTime], per_kept_token: float | None = None, *, reads_anew: bool = False
    ) -> "StepCost":
        """Fit the costs to the blocks of one or more generations."""
        begins, positions, tokens, read, student, teacher = np.array(blocks, dtype=float).T
        first = begins > 0
        later = first if first.all() else ~first
        costs, prompts, rest = [], [], np.zeros_like(tokens)
        checks = np.full_like(tokens, not reads_anew)
        for counts, amounts, seconds in ((positions, tokens, student), (checks, read, teacher)):
            table = np.stack([counts, amounts], axis=1)
            fitted, _ = nnls(table[later], seconds[later])
            unexplained = seconds - table @ fitted
            rest += unexplained
            costs += fitted.tolist()
            prompts.append(max(0.0, float(unexplained[first].mean())) if first.any() else 0.0)
        error = float(np.abs(rest)[later].mean() / max((student + teacher)[later].mean(), 1e-12))
        values = *prompts, *costs, per_kept_token, error, reads_anew
        return cls(*values)

    def bills(
        self, rollouts: Rollouts, config: DriftConfig, events: Tensor, stops: Stops, **batches: int
    ) -> list[TokenBill]:
        """What generations with these settings would have cost in tokens, with this teacher."""
        if self.reads_anew:
            return bills_of_reading_anew(rollouts, config, events, stops, **batches)
        return token_bills(stops, rollouts.lengths, **batches)

    def seconds(self, bill: TokenBill, check_every: int) -> float:
        """Projected seconds of one generation with this bill and its share of the update, where that was measured."""
        student = self.prompt_student + self.per_position * bill.positions + self.per_token * bill.sampled
        blocks = math.ceil(bill.positions / check_every)
        teacher = self.prompt_teacher + self.per_block * blocks + self.per_scored_token * bill.read
        return student + teacher + (self.per_kept_token or 0.0) * bill.kept


def generate_unpruned(
    student: nn.Module,
    teacher: Teacher,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int,
    check_every: int,
    seed: int,
    on_progress: Callable[[int, int, int], None] | None = None,
    engine: str = "loop",
    vllm: VLLMSettings = VLLMSettings(),
) -> tuple[Rollouts, list[BlockTime]]:
    """Unpruned rollouts, `batch_size` rows generated together, and the times of their blocks.

    Engines that sample while the teacher scores hide one behind the other: what is seen then is the time of both together.
    """
    device = input_device(student)
    unshared = unshared_ids(teacher, student.get_output_embeddings().weight.shape[0])
    shared = replace(sampling, suppress_tokens=unshared)
    requests = [Request(tuple(ids), request_seed(seed, index)) for index, ids in enumerate(prompts)]
    readings: list[tuple[float, ...]] = []

    def read_clocks(positions: int = 0, tokens: int = 0) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        readings.append((positions, tokens, time.perf_counter(), teacher.wall_seconds))

    def report(tokens: int) -> None:
        if on_progress is not None:
            on_progress(done, len(requests), sampled + tokens)

    def on_check(progress: DriftProgress) -> None:
        read_clocks(progress.tokens, progress.kept_tokens)
        report(progress.kept_tokens)

    parts, blocks, done, sampled = [], [], 0, 0  # sampled: by the batches before
    with closing(make_engine(engine, student, shared, slots=batch_size, teacher=teacher, vllm=vllm)) as sampler:
        sampler.update_weights(student, step=0)
        monitor = DriftMonitor(
            teacher,
            DriftConfig("tail", top_k=teacher.top_k, weight_drop=0.0),  # every other setting is replayed afterwards
            check_every=check_every,
            truncate=False,
            eos_token_id=sampling.eos_token_ids,
            pad_token_id=sampling.pad_token_id,
            student=None if sampler.delivers_candidates else student,
            on_check=on_check,
        )
        for first in range(0, len(requests), batch_size):
            watch = monitor.begin(device=device, ragged=sampler.ragged)
            readings.clear()
            read_clocks()
            for _ in sampler.generate(requests[first : first + batch_size], watch):
                done += 1
            parts.append(watch.rollouts())
            sampled += int(parts[-1].lengths.sum())
            report(0)
            read_too = int(parts[-1].prompt_mask.sum()) * (not teacher.capabilities.is_incremental)
            share = 1 + read_too / int(parts[-1].lengths.sum())  # prompts that were read with the responses
            for index, change in enumerate(np.diff(readings, axis=0).clip(min=0).tolist()):
                positions, tokens, seconds, of_teacher = change
                times = max(0.0, seconds - of_teacher), of_teacher
                counts = round(positions), round(tokens), round(tokens * share)
                blocks.append(BlockTime(index == 0, *counts, *times))
    return Rollouts.cat(parts), blocks


def time_update(student: nn.Module, rollouts: Rollouts) -> float | None:
    """Seconds of one forward and backward pass for each token that is read, on a few of the rollouts, as long as their logits
    fit; None where the memory does not suffice, or no weight gets a gradient. The gradients are thrown away."""
    if not any(weight.requires_grad for weight in student.parameters()):
        return None
    vocab, device = student.get_output_embeddings().weight.shape[0], input_device(student)
    columns = max(2, min(rollouts.sequences.shape[1], UPDATE_LOGITS // vocab))
    rows = max(1, min(len(rollouts), 16, UPDATE_LOGITS // (vocab * columns)))
    ids = rollouts.sequences[:rows, :columns].to(device)
    mask = rollouts.sequence_mask[:rows, :columns].long().to(device)
    seconds = 0.0
    try:
        with evaluating(student), torch.enable_grad():  # whatever mode a part is in, it has it back afterwards
            student.train()
            for _ in range(2):  # the first pass warms up
                started = time.perf_counter()
                logits = student(input_ids=ids, attention_mask=mask, use_cache=False).logits
                nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds = time.perf_counter() - started
    except torch.OutOfMemoryError:
        return None
    finally:
        student.zero_grad(set_to_none=True)
    return seconds / max(1, int(mask.sum()))
