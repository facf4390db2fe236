"""The demo over several seeds: seconds to equal accuracy of plain OPD and Prune-OPD, with everything kept.

    python examples/benchmarks/demo_seeds.py --seeds 0 1 2 --output_dir examples/results/demo

Both students of a seed train at the same time on the same machine, one thread each, so that their ratio of seconds holds where
absolute seconds do not. The floor beside it: a pruned run whose steps cost what the other's cost would have the ratio 1.
"""

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from prune_opd_hf.cli import main as prune_opd
from prune_opd_hf.records.files import read_json, write_json, write_text
from prune_opd_hf.study.arm_training import ArmRun
from prune_opd_hf.study.learning_curve import accuracy_at, spent_to_reach
from prune_opd_hf.study.run_study import result_path

ARMS = {"none": "plain OPD", "drift": "Prune-OPD"}


def seed_row(models: dict, plain: ArmRun, pruned: ArmRun) -> dict:
    """The figures of one seed: the demo's results.json and its two runs."""
    ends, goal = (plain.curve[-1], pruned.curve[-1]), plain.curve[-1].accuracy
    steps = min(end.step for end in ends)
    per_step = [end.seconds / end.step for end in ends]
    return {
        "models": models,
        "steps": [end.step for end in ends],
        "tokens": [end.generated_tokens for end in ends],
        "goal": goal,
        "seconds_ratio": seconds_ratio(plain, pruned, goal),
        "seconds_ratio_at_80": seconds_ratio(plain, pruned, 0.8),
        "step_ratio": per_step[1] / per_step[0],
        "equal_steps": [steps, *(accuracy_at(run.curve, "steps", steps) for run in (plain, pruned))],
    }


def seconds_ratio(plain: ArmRun, pruned: ArmRun, accuracy: float) -> float | None:
    """Seconds of Prune-OPD over seconds of plain OPD until an accuracy is first reached; None where one never does."""
    mine, other = (spent_to_reach(run.curve, "seconds", accuracy) for run in (pruned, plain))
    return None if mine is None or not other else mine / other


def percent(estimate: dict) -> str:
    """A share with its interval, in percent."""
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def ratio(value: float | None) -> str:
    """A ratio of seconds; a dash where the accuracy was not reached."""
    return "not reached" if value is None else f"{value:.2f}"


def page(rows: dict[int, dict], settings: dict) -> str:
    """The results as Markdown."""
    models = ["base student", *ARMS.values(), "teacher"]
    table = [
        f"| seed | {' | '.join(models)} | steps (OPD, pruned) | tokens sampled "
        "| seconds to OPD's final accuracy, ratio | seconds to 80%, ratio | seconds a step, ratio | at equal steps: OPD, pruned |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, row in rows.items():
        step, plain, pruned = row["equal_steps"]
        table.append(
            f"| {seed} | {' | '.join(percent(row['models'][name]) for name in models)} "
            f"| {row['steps'][0]}, {row['steps'][1]} | {row['tokens'][0]:,}, {row['tokens'][1]:,} "
            f"| **{ratio(row['seconds_ratio'])}** (at {100 * row['goal']:.1f}%) | {ratio(row['seconds_ratio_at_80'])} "
            f"| {row['step_ratio']:.2f} | step {step}: {100 * plain:.1f}, {100 * pruned:.1f} |"
        )
    reached = [row["seconds_ratio"] for row in rows.values() if row["seconds_ratio"] is not None]
    summary = (
        f"Median over seeds: {statistics.median(reached):.2f} of plain OPD's seconds." if reached else "Never reached."
    )
    return "\n".join(
        [
            "# The embedded task: plain OPD and Prune-OPD side by side",
            "",
            f"Command: `python examples/benchmarks/demo_seeds.py --seeds {' '.join(map(str, rows))} "
            f"--seconds {settings['seconds']:g}`. {settings['hardware']}; "
            + ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
            + ".",
            "",
            "Exact match in percent with the 95% interval, on fresh problems, one response each, sampled at temperature 1. "
            "Both students of a seed train at the same time, one thread each, for the same number of seconds (evaluations left "
            "out); they differ in `pruning` alone. Ratios of seconds below 1 are in favour of pruning.",
            "",
            *table,
            "",
            summary,
            "",
            "What to read from it: the gain is cheaper steps. At equal steps the two learn alike, so where steps cost the same, "
            "because nothing drifts any more or generation is free, pruning gains nothing here.",
            "",
            "![Accuracy against seconds](accuracy_against_seconds.png)",
            "",
            "![Accuracy against tokens](accuracy_against_tokens.png)",
            "",
            "![Overlap by position](overlap_by_position.png)",
            "",
            "![Response budget](response_budget.png)",
            "",
            f"Figures: seed {min(rows)}; their numbers stand in the CSV files beside them.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--work", default="runs/demo-seeds", help="folder of the demos; finished seeds are kept")
    parser.add_argument("--output_dir", default="examples/results/demo")
    arguments = parser.parse_args()
    rows, run = {}, None
    for seed in arguments.seeds:
        folder = Path(arguments.work) / f"seed-{seed}"
        if not (folder / "results.json").is_file():
            code = prune_opd(
                ["demo", "--seed", str(seed), "--seconds", str(arguments.seconds), "--output_dir", str(folder)]
            )
            if code != 0:
                return code
        plain, run = (ArmRun.load(result_path(folder, arm, seed)) for arm in ARMS)
        rows[seed] = seed_row(read_json(folder / "results.json"), plain, run)
    output = Path(arguments.output_dir)
    settings = {
        "seconds": arguments.seconds,
        "hardware": run.summary.hardware,
        "versions": run.summary.versions,
    }
    write_text(output / "README.md", page(rows, settings))
    write_json(output / "results.json", {"seeds": {str(seed): row for seed, row in rows.items()}})
    for figure in (Path(arguments.work) / f"seed-{min(rows)}").glob("**/figures/*"):
        if "student-opd" not in figure.parts:
            shutil.copy(figure, output / figure.name)
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
