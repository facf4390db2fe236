"""A study's report as a page of Markdown. Text from a record; it computes nothing."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from prune_opd_hf.study.report import AXIS_WORDS, StudyReport, look_name


def study_page(report: StudyReport, command: str, figures: Mapping[str, str], notes: str = "") -> str:
    """The page: verdict, tables, what was run, figures.

    Args:
        report: what was found.
        command: what repeats it.
        figures: file by caption.
        notes: further text, before the figures.
    """
    settings = report.settings
    arms: Mapping[str, Mapping[str, Any]] = settings["arms"]
    axes = AXIS_WORDS
    looks = list(report.accuracy)
    head = ["arm", *(f"at {look}" for look in looks)]
    accuracy = [_row(head), _rule(len(head))]
    for name, arm in arms.items():
        accuracy.append(_row([arm["label"], *(report.accuracy[look][name].percent() for look in looks)]))
    reference = arms[settings["reference"]]["label"]
    difference = [_row([f"{reference} minus", *head[1:]]), _rule(len(head))]
    for name, arm in arms.items():
        cells = []
        for look in looks:
            found = [
                item for item in report.comparisons if (look_name(item.axis, item.budget), item.arm) == (look, name)
            ]
            cells += [f"{found[0].difference.percent(signed=True)} ({found[0].outcome})"] if found else []
        if cells:
            difference.append(_row([arm["label"], *cells]))
    cost = [
        _row(
            [
                "arm",
                "steps",
                "sampled tokens",
                "CPU s",
                "tokens kept of each rollout",
                "sampled tokens a step",
                "CPU s a step",
            ]
        ),
        _rule(7),
    ]
    for name, arm in arms.items():
        spent = report.spent[name]
        cost.append(
            _row(
                [
                    arm["label"],
                    f"{spent['steps']:.0f}",
                    f"{spent['tokens']:,.0f}",
                    f"{spent['cpu_seconds']:.1f}",
                    f"{spent['kept_length']:.1f}",
                    f"{spent['tokens_per_step']:,.0f}",
                    f"{spent['cpu_seconds_per_step']:.2f}",
                ]
            )
        )
    goal = [_row(["arm", *(axes[axis] for axis in settings["budgets"])]), _rule(1 + len(settings["budgets"]))]
    for name, arm in arms.items():
        goal.append(_row([arm["label"], *(_spent_to_goal(report.to_goal[axis][name]) for axis in settings["budgets"])]))
    seeds = len(settings["seeds"])
    intervals = (
        f"95% intervals are Student's t over {seeds} seeds" if seeds > 1 else "One seed, so there are no intervals"
    )
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [
        "# Study: controls for drift pruning",
        "",
        f"Command: `{command}`. {report.hardware}; {versions}.",
        "",
        f"Student {settings['student']}, teacher {settings['teacher']}, prompts {settings['dataset']}; seeds "
        f"{', '.join(map(str, settings['seeds']))}. Every run starts from the same student; runs of one seed share prompts and "
        f"evaluation problems ({settings['evaluation_problems']}, sampled once at each evaluation). {intervals}; differences are "
        "paired by seed. Intervals stand each for itself and are not widened for their number.",
        "",
        "## Verdict",
        "",
        *(f"- {line}" for line in report.verdict),
        "",
        *([notes.strip(), ""] if notes else []),
        "## Accuracy in percent",
        "",
        *accuracy,
        "",
        *(["## Differences in points", "", *difference, ""] if report.comparisons else []),
        f"## What it took to first reach {100 * settings['goal_accuracy']:g}%",
        "",
        *goal,
        "",
        "## What the whole runs spent (means over seeds)",
        "",
        *cost,
        "",
        "CPU seconds are those of the process with one thread, evaluations left out.",
        "",
    ]
    lines += [f"- **{arm['label']}**: {arm['purpose']}" for arm in arms.values() if arm.get("purpose")]
    for caption, file in figures.items():
        lines += ["", f"![{caption}]({file})"]
    return "\n".join([*lines, ""])


def _spent_to_goal(spent: Sequence[float | None]) -> str:
    reached = [value for value in spent if value is not None]
    if not reached:
        return f"reached by none of {len(spent)}"
    mean = f"{statistics.fmean(reached):,.0f}"
    return mean if len(reached) == len(spent) else f"{mean} (reached by {len(reached)} of {len(spent)})"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns
