"""What every measurement of `gpu.py` works with: models on the device, the memory and time that are left, verdicts."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from shared import Deadline, Report, Timing, free_bytes, interleaved_within
from torch import Tensor
from transformers import PreTrainedModel

from gpu_parts.models import Shape, build

KEPT_SHARE = 0.25  # 75% of the tokens drifted
GUESSED_STEP_MS = 30.0  # of an eager step, until one is measured
MEMORY_SHARE = 0.92  # of the free memory; the rest is for what `generation_bytes` leaves out
CRITERIA, EVERY_RUN = "Pass criteria", "Every run"


@dataclass(frozen=True)
class Pair:
    """A generation to measure: who, how many rows, how many tokens."""

    student: str
    teacher: str
    rows: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.student} watched by {self.teacher}, {self.rows} rows, {self.prompt} + {self.new} tokens"


@dataclass(frozen=True)
class Step:
    """A decoding step to measure: the cache holds about `context` tokens of each of `rows` rows."""

    student: str
    rows: int
    context: int

    def __str__(self) -> str:
        return f"{self.student}, {self.rows} rows, {self.context} tokens"


@dataclass(frozen=True)
class TrainingCase:
    """Sizes of the training step: `prompts` x `generations` rollouts, updated in micro-batches of `micro`."""

    student: str
    teacher: str
    prompts: int
    generations: int
    prompt: int
    new: int
    micro: int

    @property
    def rollouts(self) -> int:
        """Rollouts of a step."""
        return self.prompts * self.generations

    def __str__(self) -> str:
        sizes = f"{self.prompts} x {self.generations} rollouts, {self.prompt} + {self.new} tokens"
        return f"{self.student} from {self.teacher}, {sizes}"


@dataclass
class Bench:
    """What every section needs.

    Attributes:
        steps, rounds: decoding steps timed in each run of a cell; runs of every way of generating, where there is time.
        bandwidth: bytes a second, measured.
        step_ms: median milliseconds of a decoding step by student and rows, as measured so far.
        failed: names of sections that ended in an error.
    """

    device: torch.device
    dtype: torch.dtype
    shapes: dict[str, Shape]
    report: Report
    deadline: Deadline
    bandwidth: float
    steps: int
    rounds: int
    models: dict[str, PreTrainedModel] = field(default_factory=dict)
    step_ms: dict[tuple[str, int], float] = field(default_factory=dict)
    judged: set[str] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)

    def model(self, name: str) -> PreTrainedModel:
        """A model by the name of its shape, made once."""
        if name not in self.models:
            self.models[name] = build(self.shapes[name], self.dtype, self.device, seed=list(self.shapes).index(name))
        return self.models[name]

    def keep_only(self, *names: str) -> None:
        """Give the memory of all other models back."""
        self.models = {name: model for name, model in self.models.items() if name in names}
        self.free()

    def free(self) -> None:
        """Give the device's memory that nothing holds back to it."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def prompts(self, name: str, rows: int, length: int) -> Tensor:
        """Random token ids, the same for the same sizes."""
        generator = torch.Generator().manual_seed(rows * length)
        return torch.randint(1, self.shapes[name].vocabulary, (rows, length), generator=generator).to(self.device)

    def fits(self, what: str, needed: int) -> bool:
        """Whether so many bytes are free; where not, a line says so."""
        self.free()
        limit = MEMORY_SHARE * free_bytes(self.device)
        if needed > limit:
            self.report.note(f"skipped, does not fit: {what} needs about {gib(needed)} GiB, {gib(limit)} are free")
        return needed <= limit

    def in_time(self, what: str, seconds: float, section: Deadline) -> bool:
        """Whether something of so many seconds still ends in time; where not, a line says so."""
        if not (section.fits(seconds) and self.deadline.fits(seconds)):
            left = max(0.0, min(section.left, self.deadline.left))
            self.report.note(f"skipped for time: {what} would take about {seconds:.1f} s, {left:.1f} s are left")
            return False
        return True

    def run_all(self, case: str, ways: dict[str, Callable[[], Any]], section: Deadline) -> dict[str, Timing]:
        """Every way in turn, each run noted when it ends; those whose memory sufficed."""

        def note(name: str, seconds: float) -> None:
            self.report.add(EVERY_RUN, {"case": case, "way": name, "seconds": seconds})

        timings = interleaved_within(ways, self.device, self.rounds, min(section.left, self.deadline.left), note)
        for name, timing in timings.items():
            if timing.error is not None:
                self.report.note(f"skipped, did not fit: {case}, {name}: {timing.error}")
        return {name: timing for name, timing in timings.items() if timing.error is None}

    def judge(self, criterion: str, case: str, measured: float | str, held: bool) -> None:
        """One verdict: held or not."""
        self.judged.add(criterion)
        row = {"criterion": criterion, "case": case, "measured": measured, "verdict": "held" if held else "not held"}
        self.report.add(CRITERIA, row)


def gib(size: float) -> float:
    """Bytes in GiB, to a tenth."""
    return round(size / 2**30, 1)


def peak(size: int) -> float | None:
    """Peak memory for a table; None where the device does not tell."""
    return gib(size) if size else None


def greedy(student: PreTrainedModel, prompts: Tensor, new: int, **kwargs: Any) -> Tensor:
    """Exactly `new` tokens for every prompt, the likeliest each time."""
    mask = torch.ones_like(prompts)
    return student.generate(prompts, attention_mask=mask, max_new_tokens=new, do_sample=False, **kwargs)
