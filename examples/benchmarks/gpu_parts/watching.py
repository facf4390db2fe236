"""Generation under a teacher's eye: monitored against unmonitored, with nothing and with 75% of the tokens drifted."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from generation import exponential_lengths
from shared import Deadline
from torch import Tensor
from transformers import PreTrainedModel

import prune_opd_hf.generation.watch as watch_module
from gpu_parts.bench import GUESSED_STEP_MS, KEPT_SHARE, Bench, Pair, greedy, peak
from gpu_parts.models import generation_bytes
from prune_opd_hf import DriftConfig, DriftMonitor, Teacher, pruned_generate
from prune_opd_hf.algorithm.drift import ScoredPositions


class EventsDrawnBeforehand:
    """Stands for `find_drift_events` during one generation: each row has one event, at its drawn length.

    The real function is called too, so that its work is in the time.
    """

    def __init__(self, lengths: Tensor, real: Callable[..., Tensor]) -> None:
        self.lengths, self.real, self.seen = lengths, real, 0

    def __call__(self, config: DriftConfig, mask: Tensor, positions: ScoredPositions) -> Tensor:
        """Events of a block of the rows that are still followed; they leave as the monitor lets them go."""
        self.real(config, mask, positions)
        columns = torch.arange(self.seen + 1, self.seen + mask.shape[1] + 1, device=mask.device)
        events = (columns == self.lengths.unsqueeze(-1)) & mask
        self.seen += mask.shape[1]
        self.lengths = self.lengths[self.lengths > self.seen]
        return events


@contextlib.contextmanager
def events_drawn_beforehand(lengths: Tensor) -> Iterator[None]:
    """While this lasts, rows drift at these response tokens, whatever the two models say."""
    real = watch_module.find_drift_events
    watch_module.find_drift_events = EventsDrawnBeforehand(lengths, real)
    try:
        yield
    finally:
        watch_module.find_drift_events = real


def monitored(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Teacher,
    prompts: Tensor,
    new: int,
    *,
    lengths: Tensor | None = None,
    every: int = 32,
    in_generate: bool = False,
) -> Any:
    """One watched generation, finished; rows drift at `lengths`, or never.

    Args:
        in_generate: the pair beside plain `generate`, instead of the loop that drops rows.
    """
    if lengths is None:
        lengths = torch.full((len(prompts),), new + 1, device=prompts.device)
    monitor = DriftMonitor(
        teacher, DriftConfig("overlap", top_k=16, weight_drop=1.0), check_every=every, pad_token_id=0, eos_token_id=[]
    )
    if in_generate:
        driver: dict[str, Any] = {
            "logits_processor": [monitor.logits_processor],
            "stopping_criteria": [monitor.stopping_criterion],
        }
    else:
        driver = {"custom_generate": pruned_generate, "drift_monitor": monitor}
    with events_drawn_beforehand(lengths):
        return monitor.finish(greedy(student, prompts, new, **driver))


def watch(bench: Bench, pair: Pair, seconds: float, *, shorten: bool = False) -> None:
    """Monitored against unmonitored generation, at 0% and at 75% of the tokens drifted.

    Args:
        shorten: take fewer tokens, not below a quarter, where all of them would not end in time.
    """
    table, section, size = "Monitored against unmonitored generation", Deadline(seconds), bench.dtype.itemsize
    step = bench.step_ms.get((pair.student, pair.rows), GUESSED_STEP_MS) / 1e3
    new, least = pair.new, pair.new // 4 if shorten else pair.new
    left = min(section.left, bench.deadline.left)
    while 4.8 * new * step > left and new // 2 >= least:
        new //= 2
    if new < pair.new and 4.8 * new * step <= left:
        bench.report.note(f"cut short for time: {pair} is measured with {new} new tokens")
    pair = Pair(pair.student, pair.teacher, pair.rows, pair.prompt, new)
    if not bench.in_time(str(pair), 4.8 * new * step, section):  # in steps: 1 + 1 + 1.25 + 1.25 + 0.3
        return
    bench.keep_only(pair.student, pair.teacher)
    student, teacher = bench.model(pair.student), bench.model(pair.teacher)  # no cache of it outlives a run
    total = pair.prompt + new
    own = generation_bytes(bench.shapes[pair.student], pair.rows, pair.prompt, total, size)
    both = own + generation_bytes(bench.shapes[pair.teacher], pair.rows, pair.prompt, total, size)
    prompts = bench.prompts(pair.student, pair.rows, pair.prompt)
    drawn = exponential_lengths(pair.rows, new, KEPT_SHARE).to(bench.device)
    alike = torch.full_like(drawn, max(1, round(KEPT_SHARE * new)))
    unwatched = {
        "plain generate": partial(greedy, student, prompts, new),
        "pruned_generate": partial(greedy, student, prompts, new, custom_generate=pruned_generate),
    }
    watched = {
        "monitored, 0% drifted": partial(monitored, student, teacher, prompts, new),
        "monitored, 75% drifted": partial(monitored, student, teacher, prompts, new, lengths=drawn),
        "monitored, 75% drifted, all rows alike": partial(monitored, student, teacher, prompts, new, lengths=alike),
    }
    if not bench.fits(f"{pair}, unmonitored", own):
        return
    ways = {**unwatched, **watched} if bench.fits(f"{pair}, monitored", both) else unwatched
    for way in (partial(greedy, student, prompts, 4), partial(monitored, student, teacher, prompts, 4)):
        if way.func is greedy or len(ways) > len(unwatched):
            way()  # warm-up
    timings = bench.run_all(str(pair), ways, section)
    if not timings.keys() >= unwatched.keys():
        return
    whole = min(timings[name].median for name in unwatched)
    for name, timing in timings.items():
        kept = pair.rows * new if name in unwatched else int(timing.result.response_mask.sum())
        bench.report.add(
            table,
            {
                "pair": str(pair),
                "way": name,
                "seconds": timing.median,
                "of the faster unmonitored": timing.median / whole,
                "kept share": kept / (pair.rows * new),
                "kept tokens/s": kept / timing.median,
                "runs": len(timing.seconds),
                "peak GiB": peak(timing.peak_bytes),
            },
        )
    if len(timings) == len(unwatched) + len(watched):
        judge_watching(bench, pair, {name: timing.median for name, timing in timings.items()})


def judge_watching(bench: Bench, pair: Pair, seconds: dict[str, float]) -> None:
    """The two criteria of watching; unpruned is the faster way without a monitor, so the stricter reading."""
    whole = min(seconds["plain generate"], seconds["pruned_generate"])
    none, most = seconds["monitored, 0% drifted"], seconds["monitored, 75% drifted"]
    if pair.teacher == "Qwen3-4B":
        bench.judge(
            "monitored takes at most 1.15x unmonitored, 0% drifted", str(pair), none / whole, none <= 1.15 * whole
        )
    bench.judge("75% drifted takes at most 0.35 of unpruned", str(pair), most / whole, most <= 0.35 * whole)
    bench.judge("75% drifted takes at most 0.35 of monitored at 0%", str(pair), most / none, most <= 0.35 * none)


def teacher_rhythm(bench: Bench, pair: Pair, seconds: float) -> None:
    """What `check_every` costs: watched generation over plain `generate` plus one teacher pass over what it made."""
    section, size = Deadline(seconds), bench.dtype.itemsize
    step = bench.step_ms.get((pair.student, pair.rows), GUESSED_STEP_MS) / 1e3
    if not bench.in_time(f"check_every, {pair}", 11 * pair.new * step, section):
        return
    bench.keep_only(pair.student, pair.teacher)
    student, teacher = bench.model(pair.student), Teacher(bench.model(pair.teacher), top_k=16)
    total = pair.prompt + pair.new
    needed = [
        generation_bytes(bench.shapes[name], pair.rows, total, total, size) for name in (pair.student, pair.teacher)
    ]
    if not bench.fits(f"check_every, {pair}", sum(needed)):
        return
    prompts = bench.prompts(pair.student, pair.rows, pair.prompt)
    whole = greedy(student, prompts, pair.new)

    def one_pass() -> None:
        teacher.start(prompts)
        teacher.score(whole[:, pair.prompt :])

    ways: dict[str, Callable[[], Any]] = {
        "plain generate": partial(greedy, student, prompts, pair.new),
        "one teacher pass": one_pass,
    }
    for every in (1, 8, 32, 128):
        ways[f"loop, check_every {every}"] = partial(monitored, student, teacher, prompts, pair.new, every=every)
    ways["pair in generate, check_every 32"] = partial(monitored, student, teacher, prompts, pair.new, in_generate=True)
    one_pass()  # warm-up
    timings = bench.run_all(f"check_every, {pair}", ways, section)
    if "plain generate" not in timings or "one teacher pass" not in timings:
        return
    floor = timings["plain generate"].median + timings["one teacher pass"].median
    for name, timing in timings.items():
        row = {
            "pair": str(pair),
            "way": name,
            "seconds": timing.median,
            "of generate + one pass": timing.median / floor,
        }
        bench.report.add("What check_every costs", {**row, "runs": len(timing.seconds)})
