"""A study's page: verdict, tables and figures from its report and its runs. It draws and writes; it computes no statistics."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prune_opd_hf.hub.markdown import table
from prune_opd_hf.records.figures import Line, can_draw, draw_lines, draw_stacked_bars
from prune_opd_hf.records.files import write_text
from prune_opd_hf.records.training_figures import training_figures
from prune_opd_hf.study.arm_training import ArmRun
from prune_opd_hf.study.learning_curve import AXES, accuracy_at, spent
from prune_opd_hf.study.study_report import SeedMean, StudyReport, amount_name
from prune_opd_hf.study.study_settings import StudySettings

NOTES_FILE = "notes.md"
"""What a reader adds by hand in the study's folder; it becomes part of the page and stays when the report is made again."""

FIGURES_FOLDER = "figures"
GRID = 24
"""Amounts on the x axis at which the seeds' curves are averaged."""

SPENT_COLUMNS = {
    "steps": ("steps", ".0f"),
    "tokens": ("sampled tokens", ",.0f"),
    "seconds": ("seconds", ".1f"),
    "cpu_seconds": ("CPU s", ".1f"),
    "kept_length": ("tokens kept of each rollout", ".1f"),
    "tokens_per_step": ("sampled tokens a step", ",.0f"),
    "cpu_seconds_per_step": ("CPU s a step", ".2f"),
}
"""Title and form of each column of what was spent."""


def write_study(
    settings: StudySettings,
    runs: Sequence[ArmRun],
    folder: Path,
    *,
    command: str,
    notes: str = "",
    shown: ArmRun | None = None,
) -> StudyReport:
    """Compare finished runs, and write report.json, README.md and, where they can be drawn, the figures into a folder. The page has
    `notes` beside the text of notes.md, and figures of how the run `shown` was trained."""
    report = StudyReport.of(settings, runs)
    report.save(folder)
    figures = draw_study(report, runs, folder / FIGURES_FOLDER) if can_draw() else {}
    by_hand = folder / NOTES_FILE
    notes = "\n\n".join(filter(None, [by_hand.read_text(encoding="utf-8") if by_hand.is_file() else "", notes]))
    captions = {caption: f"{FIGURES_FOLDER}/{path.name}" for caption, path in figures.items()}
    if shown is not None and can_draw():
        of_training, files = training_figures(shown.summary)
        for path, content in files.items():
            (folder / path).write_bytes(content)
        whose = f"{settings.arms[shown.arm].label}, seed {shown.seed}"
        captions |= {f"{caption}: {whose}": path for caption, path in of_training.items()}
    write_text(folder / "README.md", study_page(report, command, captions, notes))
    return report


def study_page(report: StudyReport, command: str, figures: Mapping[str, str], notes: str = "") -> str:
    """The page as Markdown, with figures by caption and notes before the tables."""
    settings, points = report.settings, list(report.accuracy)
    arms: Mapping[str, Mapping[str, Any]] = settings["arms"]
    labels = {name: arm["label"] for name, arm in arms.items()}
    reference, seeds = settings["reference"], settings["seeds"]
    differences = {
        (item.arm, amount_name(item.axis, item.budget)): f"{item.difference.percent(signed=True)} ({item.outcome})"
        for item in report.comparisons
    }
    intervals = (
        f"95% intervals are Student's t over {len(seeds)} seeds"
        if len(seeds) > 1
        else "One seed, so there are no intervals"
    )

    def by_arm(head: Sequence[str], cells: Mapping[str, Sequence[str]]) -> str:
        return table(head, [[labels[name], *row] for name, row in cells.items()])

    sections = [
        "# Study: controls for drift pruning",
        f"Command: `{command}`. {report.hardware}; {', '.join(f'{n} {v}' for n, v in report.versions.items())}.",
        f"Student {settings['model_name_or_path']}, teacher {_teacher(settings)}, prompts "
        f"{settings['dataset_name']}; seeds {', '.join(map(str, seeds))}. Every run starts from the same student; runs of one seed "
        f"share prompts and evaluation problems ({settings['evaluation_problems']}, sampled once at each evaluation). {intervals}; "
        "differences are paired by seed. Intervals stand each for itself and are not widened for their number.",
        "## Verdict",
        "\n".join(f"- {line}" for line in report.verdict),
        notes.strip(),
        "## Accuracy in percent",
        by_arm(
            ["arm", *(f"at {point}" for point in points)],
            {name: [report.accuracy[point][name].percent() for point in points] for name in arms},
        ),
    ]
    if report.comparisons:
        sections += [
            "## Differences in points",
            by_arm(
                [f"{labels[reference]} minus", *(f"at {point}" for point in points)],
                {name: [differences[name, point] for point in points] for name in arms if name != reference},
            ),
        ]
    sections += [
        f"## What it took to first reach {100 * settings['goal_accuracy']:g}%",
        by_arm(
            ["arm", *(AXES[axis][1] for axis in settings["budgets"])],
            {name: [_spent_to_goal(report.to_goal[axis][name]) for axis in settings["budgets"]] for name in arms},
        ),
        "## What the whole runs spent (means over seeds)",
        by_arm(
            ["arm", *(title for title, _ in SPENT_COLUMNS.values())],
            {
                name: [f"{total[column]:{form}}" for column, (_, form) in SPENT_COLUMNS.items()]
                for name, total in report.spent.items()
            },
        ),
        "CPU seconds are those of the process with one thread. Evaluation time is not counted.",
        "\n".join(f"- **{arm['label']}**: {arm['purpose']}" for arm in arms.values() if arm["purpose"]),
        *(f"![{caption}]({file})" for caption, file in figures.items()),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def draw_study(report: StudyReport, runs: Sequence[ArmRun], folder: Path) -> dict[str, Path]:
    """Draw every figure into `folder`, each with its CSV, and return them by caption."""
    arms, settings = report.settings["arms"], report.settings
    band = "mean and 95% band over seeds" if len(settings["seeds"]) > 1 else f"seed {settings['seeds'][0]}"
    figures: dict[str, Path] = {}
    for axis in dict.fromkeys([*settings["budgets"], "tokens"]):
        figures[f"Accuracy against {AXES[axis][1]}: {band}"] = draw_lines(
            folder / f"accuracy_against_{axis}.png",
            [accuracy_line(report, name, axis) for name in arms],
            title=f"Accuracy on held-out problems: {band}",
            x_label=f"{AXES[axis][1]} of training",
            y_label="accuracy",
            y_range=(0, 1),
        )
    figures["Wall seconds of a step by phase"] = draw_stacked_bars(
        folder / "phase_seconds.png",
        {arm["label"]: phase_medians([run for run in runs if run.arm == name]) for name, arm in arms.items()},
        title="Where the wall seconds of a step go",
        value_label="wall seconds a step (median over steps and seeds)",
    )
    return figures


def accuracy_line(report: StudyReport, arm: str, axis: str) -> Line:
    """Mean accuracy over seeds with its interval, as far as every seed's curve goes; one seed's own points."""
    curves, label = report.curves[arm], report.settings["arms"][arm]["label"]
    if len(curves) == 1:
        return Line(label, [spent(point, axis) for point in curves[0]], [point.accuracy for point in curves[0]])
    amounts = np.linspace(0, min(spent(curve[-1], axis) for curve in curves), GRID).tolist()
    means = [SeedMean.of([accuracy_at(curve, axis, x) for curve in curves], (0.0, 1.0)) for x in amounts]
    return Line(
        label,
        amounts,
        [mean.mean for mean in means],
        low=[mean.low or 0.0 for mean in means],
        high=[mean.high or 0.0 for mean in means],
    )


def phase_medians(runs: Sequence[ArmRun]) -> dict[str, float]:
    """Median seconds of a step by phase, over the steps of all these runs: a pause of the machine does not move it."""
    medians = {}
    for phase in dict.fromkeys(phase for run in runs for phase in run.summary.phase_seconds):
        name = f"time/{phase}"
        steps = [entry[name] for run in runs for entry in run.summary.history if entry.get(name) is not None]
        medians[phase] = statistics.median(steps) if steps else 0.0
    return medians


def _spent_to_goal(amounts: Sequence[float | None]) -> str:
    reached = [amount for amount in amounts if amount is not None]
    if not reached:
        return f"reached by none of {len(amounts)}"
    mean = f"{statistics.fmean(reached):,.0f}"
    return mean if len(reached) == len(amounts) else f"{mean} (reached by {len(reached)} of {len(amounts)})"


def _teacher(settings: Mapping[str, Any]) -> str:
    """The teacher of all arms, where it runs and what it reads."""
    name, training = settings["teacher_model_name_or_path"], settings["training"]
    if training.get("teacher_models"):
        name = " and ".join(training["teacher_models"])
    if training.get("teacher_model_kind"):
        name = f"the student itself ({training['teacher_model_kind']})"
    where = " on vLLM servers" if training.get("teacher_model_server_url") else ""
    template = training.get("teacher_prompt_template")
    return name + where + (f", which reads {template!r}" if template else "")
