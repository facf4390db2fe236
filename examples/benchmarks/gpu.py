"""Speed on one GPU in one command: decoding against its floor, watching, pruning, continuous batching, training. For 80 GB.

    python examples/benchmarks/gpu.py                   # one CUDA device, under 8 minutes; writes examples/results/gpu
    python examples/benchmarks/gpu.py --minutes 25      # what the 8 minutes had to skip as well, and more runs of the rest
    python examples/benchmarks/gpu.py --toy             # CPU, half a minute, only to see that it runs

Students and teachers have the shapes of Qwen3-0.6B, 1.7B and 4B with random weights in bfloat16: nothing here depends on what is
generated, only on how much. Nothing is downloaded. Rows drift at response tokens drawn beforehand. The most important figures
come first, and each is written when it is there; what does not fit into the memory or the time is skipped with a line that says so.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gpu_parts.bench import CRITERIA, EVERY_RUN, Bench, Pair, Step, TrainingCase
from gpu_parts.decoding import measure_compiled_step, measure_step, profile_step
from gpu_parts.engines import other_engine, same_tokens
from gpu_parts.models import SHAPES, TOY_SHAPES
from gpu_parts.watching import teacher_rhythm, watch
from shared import Deadline, Report, copy_bandwidth, describe_machine

RESERVE_SECONDS = 30.0  # of the time given: loading the libraries, and what predictions may be off by
ALL_CRITERIA = (
    "a decoding step takes at most 3x the floor",
    "monitored takes at most 1.15x unmonitored, 0% drifted",
    "75% drifted takes at most 0.35 of unpruned",
    "greedy tokens are identical",
)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        steps: decoding steps, the most important first: rows of the first are those that the criterion is about.
        watched: the generation that the criteria of watching are about; further ones in `also_watched`.
        rhythm, same: of `check_every`, and of the comparison of greedy tokens.
        timed_steps: decoding steps in each run of a cell.
        rounds: runs of every way of generating, where there is time; one at least.
        copy_elements: of the copy that measures the bandwidth.
    """

    steps: tuple[Step, ...]
    watched: Pair
    also_watched: tuple[Pair, ...]
    rhythm: Pair
    same: Pair
    training: tuple[TrainingCase, ...]
    timed_steps: int
    rounds: int
    copy_elements: int


SMALL, MIDDLE, LARGE = SHAPES
REAL = Plan(
    steps=(
        Step(MIDDLE, 64, 1024),
        Step(MIDDLE, 64, 4096),
        Step(SMALL, 64, 1024),
        Step(MIDDLE, 256, 1024),
        Step(SMALL, 256, 1024),
        Step(SMALL, 64, 4096),
        Step(MIDDLE, 256, 4096),
        Step(SMALL, 256, 4096),
    ),
    watched=Pair(MIDDLE, LARGE, 64, 128, 1024),
    also_watched=(
        Pair(SMALL, MIDDLE, 64, 128, 1024),
        Pair(SMALL, MIDDLE, 256, 128, 1024),
        Pair(MIDDLE, LARGE, 256, 128, 1024),
        Pair(MIDDLE, LARGE, 64, 128, 2048),
        Pair(SMALL, MIDDLE, 64, 128, 4096),
        Pair(MIDDLE, LARGE, 64, 128, 4096),
        Pair(SMALL, MIDDLE, 256, 128, 4096),
    ),
    rhythm=Pair(MIDDLE, LARGE, 64, 512, 128),
    same=Pair(MIDDLE, LARGE, 16, 64, 64),
    training=(
        TrainingCase(SMALL, MIDDLE, 32, 4, 128, 1024, micro=4),
        TrainingCase(MIDDLE, LARGE, 16, 4, 128, 1024, micro=4),
    ),
    timed_steps=32,
    rounds=3,
    copy_elements=2**30,
)
TOY = Plan(
    steps=(Step(MIDDLE, 4, 24), Step(SMALL, 4, 48)),
    watched=Pair(MIDDLE, LARGE, 4, 8, 48),
    also_watched=(Pair(SMALL, MIDDLE, 8, 8, 48),),
    rhythm=Pair(MIDDLE, LARGE, 4, 8, 16),
    same=Pair(MIDDLE, LARGE, 4, 8, 16),
    training=(TrainingCase(SMALL, MIDDLE, 2, 2, 8, 16, micro=2),),
    timed_steps=6,
    rounds=1,
    copy_elements=2**20,
)


def sections(bench: Bench, plan: Plan, minutes: float) -> dict[str, list[Callable[[], None]]]:
    """What to measure, the most important first, by name; each part knows how many seconds it may take."""
    whole = 60 * minutes
    stepping, first = Deadline(0.2 * whole), plan.steps[0]  # the first section, so its time runs from now
    steps = [partial(measure_step, bench, cell, stepping, judged=cell.rows == first.rows) for cell in plan.steps]
    return {
        "steps": [steps[0], partial(profile_step, bench, first, stepping), *steps[1:]],
        "compiled": [partial(measure_compiled_step, bench, first, Deadline(0.4 * whole))],
        "watch": [partial(watch, bench, plan.watched, 0.4 * whole, shorten=True)],
        "engine": [partial(other_engine, bench, plan.watched, 0.2 * whole)],
        "same": [partial(same_tokens, bench, plan.same, 0.1 * whole)],
        "train": [partial(train, bench, case) for case in plan.training],
        "rhythm": [lambda: teacher_rhythm(bench, plan.rhythm, max(0.0, bench.deadline.left))],
        "more": [
            lambda pair=pair, part=part: part(bench, pair, max(0.0, bench.deadline.left))
            for pair in plan.also_watched
            for part in (watch, other_engine)
        ],
    }


def train(bench: Bench, case: TrainingCase) -> None:
    """A training step; only here `datasets` and the trainer are needed."""
    from gpu_parts.training import training_step

    training_step(bench, case, max(0.0, bench.deadline.left))


NAMES = ("steps", "compiled", "watch", "engine", "same", "train", "rhythm", "more")


def measure(bench: Bench, plan: Plan, minutes: float, only: Sequence[str]) -> None:
    """Every section in turn; one that fails leaves a line and does not keep the next from running."""
    for name, parts in sections(bench, plan, minutes).items():
        for part in parts if name in only else ():
            try:
                part()
            except torch.OutOfMemoryError as error:
                bench.report.note(f"skipped, did not fit: {name}: {str(error).splitlines()[0]}")
            except Exception as error:
                traceback.print_exc()
                first = (str(error).strip() or "no message").splitlines()[0]
                bench.report.note(f"failed: {name}: {type(error).__name__}: {first}")
                bench.failed.append(name)
            bench.free()
    for criterion in ALL_CRITERIA:
        if criterion not in bench.judged:
            bench.report.add(
                CRITERIA, {"criterion": criterion, "case": None, "measured": None, "verdict": "not measured"}
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 where a section failed, 2 where there is no device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time that the run may take (default 8)")
    parser.add_argument("--toy", action="store_true", help="tiny shapes on the CPU, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="some of the sections")
    parser.add_argument("--output", type=Path, default=None, help="folder for gpu.json and gpu.md")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes must be a number above 0, got {options.minutes:g}")
    if not options.toy and not torch.cuda.is_available():
        print("this benchmark needs a CUDA device; --toy runs it on the CPU at tiny sizes, to see that it runs")
        return 2
    deadline = Deadline(60 * options.minutes - min(RESERVE_SECONDS, 6 * options.minutes))
    default = Path("runs/gpu_toy") if options.toy else Path(__file__).resolve().parents[1] / "results" / "gpu"
    device = torch.device("cpu") if options.toy else torch.device("cuda", 0)
    plan = TOY if options.toy else REAL
    folder = options.output or default
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {folder} cannot be a folder: {error.strerror}")
    bandwidth = copy_bandwidth(device, plan.copy_elements)
    header = {
        **describe_machine(device),
        "copy bandwidth GB/s": round(bandwidth / 1e9, 1),
        "shapes": "toy: these figures say nothing about any model"
        if options.toy
        else "Qwen3, random weights, bfloat16",
        "minutes": options.minutes,
    }
    title = "Speed on one GPU" + (" (toy sizes)" if options.toy else "")
    report = Report(folder, "gpu", title, header, first=CRITERIA, last=EVERY_RUN)
    bench = Bench(
        device=device,
        dtype=torch.bfloat16,
        shapes=TOY_SHAPES if options.toy else SHAPES,
        report=report,
        deadline=deadline,
        bandwidth=bandwidth,
        steps=plan.timed_steps,
        rounds=plan.rounds,
    )
    measure(bench, plan, options.minutes, options.only)
    report.complete = True
    report.write()
    print(f"\n{deadline.seconds - deadline.left:.0f} s; written to {report.folder}")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
