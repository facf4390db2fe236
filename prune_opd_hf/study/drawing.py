"""A study's figures: accuracy against each budget with bands over seeds, phase times, and how the reference arm went."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prune_opd_hf.records.figures import Line, draw_heatmap, draw_lines, draw_stacked_bars
from prune_opd_hf.study.learning_curve import AXES, accuracy_at, point_from_json
from prune_opd_hf.study.report import AXIS_WORDS, SeedMean, StudyReport
from prune_opd_hf.study.worker import ArmResult

GRID = 24
"""Places on the x axis at which the seeds' curves are averaged."""

POSITIONS = "prune/overlap_by_position/"


def draw_study(report: StudyReport, results: Sequence[ArmResult], folder: Path) -> dict[str, Path]:
    """Draw every figure into `folder`, each with its CSV.

    Returns:
        File by caption.
    """
    arms, settings = report.settings["arms"], report.settings
    figures: dict[str, Path] = {}
    for axis in settings["budgets"]:
        lines = [line for name in arms if (line := band(report, name, axis)) is not None]
        figures[f"Accuracy against {AXIS_WORDS[axis]}: mean and 95% band over seeds"] = draw_lines(
            folder / f"accuracy_against_{axis}.png",
            lines,
            title="Exact match on held-out problems: mean over seeds, 95% band",
            x_label=AXIS_WORDS[axis],
            y_label="accuracy",
            y_range=(0, 1),
        )
    figures["Wall seconds of a step by phase"] = draw_stacked_bars(
        folder / "phase_seconds.png",
        {
            arm["label"]: phase_medians([result for result in results if result.arm == name])
            for name, arm in arms.items()
        },
        title="Where the wall seconds of a step go",
        value_label="wall seconds a step (median over steps and seeds)",
    )
    shown = next(result for result in results if result.arm == settings["reference"])
    return figures | _reference_figures(shown, arms[shown.arm]["label"], folder)


def band(report: StudyReport, arm: str, axis: str) -> Line | None:
    """Mean accuracy over seeds with its interval, as far as every seed's curve goes."""
    curves = [[point_from_json(point) for point in curve] for curve in report.curves[arm]]
    end = min(getattr(curve[-1], AXES[axis]) for curve in curves)
    x, means = [], []
    for place in np.linspace(0, end, GRID):
        values = [accuracy_at(curve, axis, float(place)) for curve in curves]
        known = [value for value in values if value is not None]
        if len(known) == len(curves):
            x.append(float(place))
            means.append(SeedMean.of(known, bounds=(0.0, 1.0)))
    if not x:
        return None
    with_band = len(curves) > 1
    return Line(
        label=report.settings["arms"][arm]["label"],
        x=x,
        y=[mean.mean for mean in means],
        low=[mean.low or 0.0 for mean in means] if with_band else None,
        high=[mean.high or 0.0 for mean in means] if with_band else None,
    )


def phase_medians(results: Sequence[ArmResult]) -> dict[str, float]:
    """Median seconds of a step by phase, over the steps of all these runs: a pause of the machine does not move it."""
    phases = list(dict.fromkeys(phase for result in results for phase in result.phase_seconds))
    medians = {}
    for phase in phases:
        steps = [entry[f"time/{phase}"] for result in results for entry in result.history if f"time/{phase}" in entry]
        medians[phase] = statistics.median(steps) if steps else 0.0
    return medians


def _reference_figures(result: ArmResult, label: str, folder: Path) -> dict[str, Path]:
    history = [entry for entry in result.history if "budget/cap" in entry]
    if not history:
        return {}
    steps = [entry["step"] for entry in history]
    wanted = {
        "response budget": "budget/cap",
        "mean kept length": "prune/response_length_mean",
        "mean effective length": "prune/effective_length_mean",
    }
    lines = [
        Line(name, steps, [entry.get(column, float("nan")) for entry in history]) for name, column in wanted.items()
    ]
    figures = {
        f"Budget and lengths, {label}, seed {result.seed}": draw_lines(
            folder / "budget_and_lengths.png",
            lines,
            title=f"Response budget and lengths over training: {label}, seed {result.seed}",
            x_label="optimizer step",
            y_label="tokens",
        )
    }
    positions = sorted({name for entry in history for name in entry if name.startswith(POSITIONS)})
    if positions:
        starts = [int(name.removeprefix(POSITIONS)) for name in positions]
        width = starts[1] - starts[0] if len(starts) > 1 else 1
        figures[f"Overlap by position over training, {label}, seed {result.seed}"] = draw_heatmap(
            folder / "overlap_by_position.png",
            [[entry.get(name, float("nan")) for entry in history] for name in positions],
            x=steps,
            y=[start + (width - 1) / 2 for start in starts],
            title=f"Overlap of the kept tokens by position: {label}, seed {result.seed}",
            x_label="optimizer step",
            y_label="response position (middle of the bin)",
            value_label="overlap",
        )
    return figures
