"""What a preflight measures: one set of unpruned rollouts, the times of their blocks, and the time of an update."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from prune_opd_hf.algorithm.drift import DriftConfig
from prune_opd_hf.generation import DriftMonitor, DriftProgress, pruned_generate
from prune_opd_hf.preflight.cost import BlockTime
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.local import LocalTeacher
from prune_opd_hf.training.data import left_pad
from prune_opd_hf.training.sampling import ids_beyond

UPDATE_LOGITS = 2**26
"""Logits of the micro-batch on which the update is timed, at most."""


def time_update(student: nn.Module, rollouts: Rollouts) -> float | None:
    """Seconds of one forward and backward pass for each token that is read, on a few of the rollouts, as long as their logits
    fit; None where the memory does not suffice. The gradients are thrown away."""
    vocab = student.get_output_embeddings().weight.shape[0]
    columns = max(2, min(rollouts.sequences.shape[1], UPDATE_LOGITS // vocab))
    rows = max(1, min(len(rollouts), 16, UPDATE_LOGITS // (vocab * columns)))
    device = next(iter(student.parameters())).device
    ids = rollouts.sequences[:rows, :columns].to(device)
    mask = rollouts.sequence_mask[:rows, :columns].long().to(device)
    training = student.training
    student.train()
    try:
        for measured in (False, True):  # the first pass warms up
            started = time.perf_counter()
            with torch.enable_grad():
                logits = student(input_ids=ids, attention_mask=mask, use_cache=False).logits
                loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
                loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if measured:
                return (time.perf_counter() - started) / max(1, int(mask.sum()))
    except torch.OutOfMemoryError:
        return None
    finally:
        student.zero_grad(set_to_none=True)
        student.train(training)
    return None


def generate_unpruned(
    student: nn.Module,
    teacher: LocalTeacher,
    ids: Sequence[list[int]],
    *,
    pad: int,
    ends: list[int],
    rows_at_once: int,
    max_new_tokens: int,
    check_every: int,
    temperature: float,
    seed: int,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[list[Rollouts], list[BlockTime]]:
    """Unpruned rollouts, one record for each generation, and the times of their blocks."""
    device = next(iter(student.parameters())).device
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    beyond = ids_beyond(student.get_output_embeddings().weight.shape[0], teacher.vocab_size)
    if beyond:
        sampling["suppress_tokens"] = beyond
    config = DriftConfig(
        "nucleus", top_k=teacher.top_k, weight_drop=0.0
    )  # nothing stops; every setting is replayed afterwards
    parts, blocks = [], []
    student.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for first in range(0, len(ids), rows_at_once):
            batch = {
                name: values.to(device)
                for name, values in left_pad(list(ids[first : first + rows_at_once]), pad).items()
            }
            stopwatch = _Stopwatch(teacher, device)
            monitor = DriftMonitor(
                teacher,
                config,
                check_every=check_every,
                truncate=False,
                pad_token_id=pad,
                eos_token_id=ends,
                on_check=stopwatch.on_check,
            )
            sequences = student.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=ends,
                custom_generate=pruned_generate,
                drift_monitor=monitor,
                **sampling,
            )
            part = monitor.finish(sequences)
            parts.append(part)
            blocks += stopwatch.blocks
            if on_progress is not None:
                on_progress(min(first + rows_at_once, len(ids)), len(ids))
    return parts, blocks


class _Stopwatch:
    """Times the blocks of one generation by the monitor's own progress."""

    def __init__(self, teacher: LocalTeacher, device: torch.device) -> None:
        self.teacher, self.device = teacher, device
        self.blocks: list[BlockTime] = []
        self._mark, self._teacher_mark = time.perf_counter(), teacher.wall_seconds
        self._tokens = self._positions = 0

    def on_check(self, progress: DriftProgress) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, teacher_now = time.perf_counter(), self.teacher.wall_seconds
        teacher_seconds = teacher_now - self._teacher_mark
        self.blocks.append(
            BlockTime(
                first=not self.blocks,
                positions=progress.tokens - self._positions,
                tokens=progress.kept_tokens - self._tokens,
                student_seconds=max(0.0, now - self._mark - teacher_seconds),
                teacher_seconds=teacher_seconds,
            )
        )
        self._mark, self._teacher_mark = now, teacher_now
        self._tokens, self._positions = progress.kept_tokens, progress.tokens
