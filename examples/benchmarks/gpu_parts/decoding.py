"""A decoding step: its milliseconds against the floor from bytes, and how much of them the device works at all."""

import math
import statistics
from functools import partial, wraps
from time import perf_counter
from typing import Any

import torch
from shared import Deadline, interleaved_within, mark, milliseconds_between, synchronize
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from gpu_parts.bench import GUESSED_STEP_MS, Bench, Step, greedy, peak
from gpu_parts.models import floor_milliseconds, generation_bytes, parameter_count
from prune_opd_hf import pruned_generate
from prune_opd_hf.generation import LoopEngine, Request, Sampling
from prune_opd_hf.generation.compiled_step import CompiledDecodingStep, StepCompiler

COMPILING_SECONDS = 60.0  # what compiling a step of these shapes may take
GUESSED_FLOPS = 2e14  # operations a second while prompts are read, to tell beforehand how long that takes


class StepMarks:
    """Marks the moment each step begins, so that whole steps are timed in any loop without changing it.

    The backbone's class notes its calls: a hook on the model would keep the loop from calling backbone and head by themselves.
    Where a step is compiled, the call of the whole step is noted instead.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, *, compiled: bool = False) -> None:
        self.device, self.marks = device, []
        owner: Any = CompiledDecodingStep if compiled else type(model.get_decoder())
        self.owner, self.name = owner, "next" if compiled else "forward"

    def __enter__(self) -> "StepMarks":
        self.original = getattr(self.owner, self.name)

        @wraps(self.original)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.marks.append(mark(self.device))
            return self.original(*args, **kwargs)

        setattr(self.owner, self.name, noted)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.original)

    def milliseconds(self) -> list[float]:
        """Of each step but the first, which reads the prompts."""
        synchronize(self.device)
        pairs = zip(self.marks[1:-1], self.marks[2:], strict=True)
        return [milliseconds_between(earlier, later) for earlier, later in pairs]


def measure_step(bench: Bench, cell: Step, section: Deadline, *, judged: bool) -> None:
    """Milliseconds of a decoding step of plain `generate` and of `pruned_generate`, against its floor.

    Args:
        judged: whether the criterion is about this cell.
    """
    shape, size, student = bench.shapes[cell.student], bench.dtype.itemsize, bench.model(cell.student)
    if not bench.fits(str(cell), generation_bytes(shape, cell.rows, cell.context, cell.context, size)):
        return
    reading = (
        2 * cell.rows * cell.context * 2 * parameter_count(shape) / GUESSED_FLOPS
    )  # the prompts, once for each loop
    steps = 2 * bench.steps * bench.step_ms.get((cell.student, cell.rows), GUESSED_STEP_MS) / 1e3
    if not bench.in_time(f"the step of {cell}", reading + steps, section):
        return
    new = bench.steps + 2  # of the intervals between forward passes, all but the first are whole decoding steps
    prompts = bench.prompts(cell.student, cell.rows, cell.context - new)
    loops: dict[str, dict[str, Any]] = {"plain generate": {}, "pruned_generate": {"custom_generate": pruned_generate}}
    collected: dict[str, list[float]] = {name: [] for name in loops}

    def run(name: str) -> None:
        with StepMarks(student, bench.device) as marks:
            greedy(student, prompts, new, **loops[name])
        collected[name] += marks.milliseconds()

    for kwargs in loops.values():
        greedy(student, prompts[:, :8], 4, **kwargs)  # warm-up
    ways = {name: partial(run, name) for name in loops}
    timings = interleaved_within(ways, bench.device, 2, min(section.left, bench.deadline.left) / 2)
    for name, values in collected.items():
        if not values:
            bench.report.note(f"skipped, did not fit: {cell}, {name}: {timings[name].error}")
            continue
        add_step(bench, cell, name, values, timings[name].peak_bytes, judged=judged)
        if name == "pruned_generate":
            bench.step_ms[cell.student, cell.rows] = statistics.median(values)


def add_step(bench: Bench, cell: Step, loop: str, values: list[float], peak_bytes: int, *, judged: bool) -> None:
    """One line of the table of steps, and of one of the package's loops the verdict."""
    shape, median = bench.shapes[cell.student], statistics.median(values)
    floor = floor_milliseconds(shape, cell.rows, cell.context - bench.steps // 2, bench.dtype.itemsize, bench.bandwidth)
    row = {
        "student": cell.student,
        "rows": cell.rows,
        "tokens": cell.context,
        "loop": loop,
        "ms per step": median,
        "floor ms": floor,
        "times the floor": median / floor,
        "tokens/s": 1e3 * cell.rows / median,
        "mean ms": statistics.mean(values),
        "steps": len(values),
        "peak GiB": peak(peak_bytes),
    }
    bench.report.add("Decoding step against its floor (weights + KV bytes / copy bandwidth)", row)
    if judged and loop != "plain generate":
        bench.judge(
            "a decoding step takes at most 3x the floor", f"{cell}, {loop}", median / floor, median <= 3 * floor
        )


def measure_compiled_step(bench: Bench, cell: Step, section: Deadline) -> None:
    """The same of the loop with a compiled step. After `measure_step` of the same cell."""
    shape, size, student = bench.shapes[cell.student], bench.dtype.itemsize, bench.model(cell.student)
    cache = generation_bytes(shape, cell.rows, cell.context, cell.context, size)
    if not bench.fits(f"{cell}, compiled", 2 * cache):  # prompts are read into a cache of their own
        return
    reading = 2 * cell.rows * cell.context * 2 * parameter_count(shape) / GUESSED_FLOPS
    if not bench.in_time(f"the compiled step of {cell}", COMPILING_SECONDS + reading, section):
        return
    new = bench.steps + 2
    prompts = bench.prompts(cell.student, cell.rows, cell.context - new).tolist()
    how = Sampling(max_completion_length=new, eos_token_ids=(), pad_token_id=0, temperature=0.0)
    engine = LoopEngine(student, how, slots=cell.rows, compiler=StepCompiler())
    collected: list[float] = []

    def run() -> None:
        with StepMarks(student, bench.device, compiled=True) as marks:
            list(engine.generate(Request(tuple(ids)) for ids in prompts))
        collected.extend(marks.milliseconds())

    started = perf_counter()
    run()  # compiles, and on a device records the graph
    synchronize(bench.device)
    row = {"student": cell.student, "rows": cell.rows, "tokens": cell.context, "seconds": perf_counter() - started}
    bench.report.add("The first generation with a compiled step", row)
    collected.clear()
    timings = interleaved_within({"compiled": run}, bench.device, 2, min(section.left, bench.deadline.left))
    if collected:
        add_step(bench, cell, "loop engine, compiled", collected, timings["compiled"].peak_bytes, judged=True)


def profile_step(bench: Bench, cell: Step, section: Deadline) -> None:
    """How much of a step the device works at all: the rest is the host launching kernels. After `measure_step` of the same cell."""
    first, steps = 3, max(1, min(4, bench.steps - 2))
    measured = bench.step_ms.get((cell.student, cell.rows))
    if measured is None or not bench.in_time(
        f"the profile of the step of {cell}", 4 * bench.steps * measured / 1e3, section
    ):
        return
    cuda = bench.device.type == "cuda"
    student, calls = bench.model(cell.student), 0
    recorder = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True)

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls in (first, first + steps):
            synchronize(bench.device)
            recorder.start() if calls == first else recorder.stop()

    prompts = bench.prompts(cell.student, cell.rows, cell.context - bench.steps)
    hook = student.register_forward_pre_hook(count)
    try:
        greedy(student, prompts, first + steps, custom_generate=pruned_generate)
    finally:
        hook.remove()
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    spans = [
        (event.time_range.start, event.time_range.end) for event in recorder.events() if event.device_type == wanted
    ]
    row = {
        "student": cell.student,
        "rows": cell.rows,
        "tokens": cell.context,
        "loop": "pruned_generate",
        "kernels per step": round(len(spans) / steps),
        "device busy ms per step": union_length(spans) / steps / 1e3,
        "ms per step": measured,
    }
    bench.report.add("What the device does in a step" + ("" if cuda else " (CPU: operations, not kernels)"), row)


def union_length(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals.

    Example:
        >>> union_length([(0, 2), (1, 3), (5, 6), (5.2, 5.4)])
        4.0
    """
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
