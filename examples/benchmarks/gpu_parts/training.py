"""The measurement of `gpu.py` that trains: a step of `PruneOPDTrainer` by phase."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from shared import Deadline, synchronize
from torch import Tensor
from training_step import EOS, tokenizer
from transformers import TrainerCallback

import prune_opd_hf.generation.watch as watch_module
from gpu_parts.bench import GUESSED_STEP_MS, KEPT_SHARE, Bench, TrainingCase, peak
from gpu_parts.models import build, generation_bytes, parameter_count
from prune_opd_hf import DriftConfig, PruneOPDConfig, PruneOPDTrainer
from prune_opd_hf.algorithm.drift import ScoredPositions
from prune_opd_hf.training.pruning import stop_probability

TABLE = "Training step by phase (student in float32 with AdamW, computing in bfloat16)"


@contextlib.contextmanager
def random_events(share: float, case: TrainingCase, device: torch.device) -> Iterator[None]:
    """While this lasts, each token is a drift event with the probability that leaves this share of the tokens on average. The
    real function is called too, so that its work is in the time."""
    stop = stop_probability(max(1.0, share * case.new), 1, case.new)
    generator = torch.Generator(device).manual_seed(4)
    real = watch_module.find_drift_events

    def events(config: DriftConfig, mask: Tensor, positions: ScoredPositions) -> Tensor:
        real(config, mask, positions)
        return (torch.rand(mask.shape, generator=generator, device=mask.device) < stop) & mask

    watch_module.find_drift_events = events
    try:
        yield
    finally:
        watch_module.find_drift_events = real


class Phases(TrainerCallback):
    """Seconds of each step by phase, and of the whole; ends the run when another step would not end in time.

    The trainer tells phases apart by the host's clock, so a phase ends when the host waits for the device, as it does at least once
    in each; the whole step is timed with the device at rest.
    """

    def __init__(self, device: torch.device, section: Deadline) -> None:
        self.device, self.section, self.steps = device, section, []
        self.trainer: PruneOPDTrainer | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.before = dict(self.trainer.phase_seconds)
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step."""
        synchronize(self.device)
        now, after = time.perf_counter(), dict(self.trainer.phase_seconds)
        step = {phase: seconds - self.before[phase] for phase, seconds in after.items()}
        self.steps.append({**step, "whole step": now - self.last})
        self.before, self.last = after, now
        if not self.section.fits(1.1 * self.steps[-1]["whole step"]):
            control.should_training_stop = True


def training_bytes(bench: Bench, case: TrainingCase) -> int:
    """About what the step takes at its peak: weights, gradients and both moments in float32, the teacher, and both caches."""
    size = bench.dtype.itemsize
    fixed = 12 * parameter_count(bench.shapes[case.student])  # gradients are not there while it generates
    if case.teacher not in bench.models:
        fixed += size * parameter_count(bench.shapes[case.teacher])
    total = case.prompt + case.new
    # under autocast the student's keys stay in float32: half as much again
    student = 1.5 * generation_bytes(bench.shapes[case.student], case.rollouts, case.prompt, total, size)
    return int(fixed + student + generation_bytes(bench.shapes[case.teacher], case.rollouts, case.prompt, total, size))


def training_step(bench: Bench, case: TrainingCase, seconds: float) -> None:
    """One step, or two where there is time and the first then only warms up: without pruning, and with 75% of the tokens drifted
    (rows end at random tokens, under the real monitor)."""
    section, cuda = Deadline(seconds), bench.device.type == "cuda"
    step = bench.step_ms.get((case.student, case.rollouts), GUESSED_STEP_MS) / 1e3
    words = tokenizer(bench.shapes[case.student].vocabulary)
    ids = bench.prompts(case.student, case.prompts, case.prompt).clamp(min=EOS + 1)
    data = Dataset.from_list([{"prompt": " ".join(f"w{token}" for token in row)} for row in ids.tolist()])
    bench.keep_only(case.teacher)
    needed = training_bytes(bench, case)
    drift = {
        "pruning": "drift",
        "drift_weight_drop": 1.0,
        "drift_min_length": 0,
        "budget_initial": case.new,
        "budget_minimum": 1,
        "budget_hit_ratio": 0.0,  # the cap stays where it is
    }
    for name, pruning, kept in (("nothing drifts", {"pruning": "none"}, 1.0), ("75% drifted", drift, KEPT_SHARE)):
        if not bench.fits(f"training, {case}", needed) or not bench.in_time(
            f"training, {name}, {case}", 1.6 * case.new * step, section
        ):
            continue
        student, teacher = build(bench.shapes[case.student], torch.float32, bench.device, 1), bench.model(case.teacher)
        phases = Phases(bench.device, section)
        with tempfile.TemporaryDirectory() as folder:
            args = PruneOPDConfig(
                output_dir=folder,
                use_cpu=not cuda,
                bf16=cuda,
                max_steps=2,
                per_device_train_batch_size=case.micro,
                gradient_accumulation_steps=case.rollouts // case.micro,
                num_generations=case.generations,
                max_completion_length=case.new,
                generation_kwargs={"suppress_tokens": [EOS]},
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                **pruning,
            )
            trainer = PruneOPDTrainer(student, teacher, args, data, processing_class=words, callbacks=[phases])
            phases.trainer = trainer
            for callback in list(trainer.callback_handler.callbacks):
                if type(callback).__name__ in ("PrinterCallback", "ProgressLine"):
                    trainer.remove_callback(callback)
            if cuda:
                torch.cuda.reset_peak_memory_stats(bench.device)
            with random_events(kept, case, bench.device) if kept < 1 else contextlib.nullcontext():
                trainer.train()
        most = torch.cuda.max_memory_allocated(bench.device) if cuda else 0
        counts, done = trainer.counts, len(phases.steps)
        row = {
            "case": str(case),
            "way": name,
            **{f"{phase} s": value for phase, value in phases.steps[-1].items()},
            "kept share": counts.kept / (counts.rollouts * case.new),
            "of steps": f"second of {done}" if done > 1 else "the first, cold",
            "peak GiB": peak(most),
        }
        bench.report.add(TABLE, row)
        del trainer, student, phases
        bench.free()
