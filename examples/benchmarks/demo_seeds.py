"""The demo over several seeds: seconds to equal accuracy of plain OPD and Prune-OPD, with everything kept.

    python examples/benchmarks/demo_seeds.py --seeds 0 1 2 --output examples/results/demo

Both students of a seed train at the same time on the same machine, one thread each, so that their ratio of seconds holds where
absolute seconds do not. The floor beside it: a pruned run whose steps cost what the other's cost would have the ratio 1.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

from prune_opd_hf.cli import main as prune_opd
from prune_opd_hf.study.demo.run import first_reached
from prune_opd_hf.study.demo.worker import CurvePoint

ARMS = ("OPD", "Prune-OPD")


def seed_row(results: dict) -> dict:
    """The figures of one seed, from the demo's results.json."""
    curves = {arm: [CurvePoint(**point) for point in results["training"][arm]["curve"]] for arm in ARMS}
    goal = curves["OPD"][-1].accuracy
    seconds = {arm: first_reached(curve, goal) for arm, curve in curves.items()}
    eighty = {arm: first_reached(curve, 0.8) for arm, curve in curves.items()}
    per_step = {arm: results["training"][arm]["seconds"] / results["training"][arm]["steps"] for arm in ARMS}
    return {
        "base": results["models"]["base student"],
        **{arm: results["models"][arm] for arm in ARMS},
        "teacher": results["models"]["teacher"],
        "steps": {arm: results["training"][arm]["steps"] for arm in ARMS},
        "tokens": {arm: results["training"][arm]["generated_tokens"] for arm in ARMS},
        "goal": goal,
        "seconds_ratio": None if None in seconds.values() else seconds["Prune-OPD"] / seconds["OPD"],
        "seconds_ratio_at_80": None if None in eighty.values() else eighty["Prune-OPD"] / eighty["OPD"],
        "step_ratio": per_step["Prune-OPD"] / per_step["OPD"],
        "equal_steps": equal_steps(curves),
    }


def equal_steps(curves: dict[str, list[CurvePoint]]) -> tuple[int, float, float]:
    """Accuracies of both at the last step that both have reached, on the straight line between points."""
    last = min(curve[-1].step for curve in curves.values())
    return last, *(_at_step(curves[arm], last) for arm in ARMS)


def _at_step(curve: list[CurvePoint], step: int) -> float:
    before = curve[0]
    for point in curve:
        if point.step >= step:
            if point.step == before.step:
                return point.accuracy
            return before.accuracy + (step - before.step) / (point.step - before.step) * (
                point.accuracy - before.accuracy
            )
        before = point
    return before.accuracy


def percent(estimate: dict) -> str:
    """A share with its interval, in percent."""
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def ratio(value: float | None) -> str:
    """A ratio of seconds; a dash where the accuracy was not reached."""
    return "not reached" if value is None else f"{value:.2f}"


def page(rows: dict[int, dict], settings: dict) -> str:
    """The results as Markdown."""
    table = [
        "| seed | base student | OPD | Prune-OPD | teacher | steps (OPD, pruned) | tokens sampled "
        "| seconds to OPD's final accuracy, ratio | seconds to 80%, ratio | seconds a step, ratio | at equal steps: OPD, pruned |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, row in rows.items():
        step, plain, pruned = row["equal_steps"]
        table.append(
            f"| {seed} | {percent(row['base'])} | {percent(row['OPD'])} | {percent(row['Prune-OPD'])} | {percent(row['teacher'])} "
            f"| {row['steps']['OPD']}, {row['steps']['Prune-OPD']} | {row['tokens']['OPD']:,}, {row['tokens']['Prune-OPD']:,} "
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
            "Exact match in percent with Wilson's 95% interval, on fresh problems, one response each, sampled at temperature 1. "
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
            "![Budget](budget.png)",
            "",
            f"Figures: seed {min(rows)}; their numbers stand in the CSV files beside them.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument(
        "--work", default="runs/demo-seeds", help="where the demos are written; finished seeds are kept"
    )
    parser.add_argument("--output", default="examples/results/demo")
    arguments = parser.parse_args()
    rows, results = {}, {}
    for seed in arguments.seeds:
        folder = Path(arguments.work) / f"seed-{seed}"
        if not (folder / "results.json").is_file():
            code = prune_opd(
                ["demo", "--seed", str(seed), "--seconds", str(arguments.seconds), "--output", str(folder)]
            )
            if code != 0:
                return code
        results[seed] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        rows[seed] = seed_row(results[seed])
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    first = results[min(results)]
    settings = {"seconds": arguments.seconds, "hardware": first["hardware"], "versions": first["versions"]}
    (output / "README.md").write_text(page(rows, settings), encoding="utf-8")
    (output / "results.json").write_text(json.dumps({"seeds": results}, indent=1), encoding="utf-8")
    for figure in (Path(arguments.work) / f"seed-{min(results)}" / "figures").iterdir():
        shutil.copy(figure, output / figure.name)
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
