"""How training went, as figures for a card or a page: drawn from the metric history of a training summary.

What a run did not log is not drawn, so that the dictionary of figures may be shorter or empty.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_opd_hf.records.figures import Line, draw_heatmap, draw_lines
from prune_opd_hf.records.training_summary import TrainingSummary

_BY_POSITION = "prune/overlap_by_position/"


def training_figures(training: TrainingSummary) -> tuple[dict[str, str], dict[str, bytes]]:
    """Draw what the history holds.

    Returns:
        Path in the repository by caption, and content by path: each figure as PNG with its points as CSV beside it.

    Example: nothing logged, nothing drawn.
        >>> training_figures(TrainingSummary(dataset="d", loss="l", pruning="none", steps=1, rollouts=1,
        ...     generated_tokens=1, kept_tokens=1, saved_tokens=0, wall_seconds=1.0))
        ({}, {})
    """
    history = [row for row in training.history if row.get("step") is not None]
    captions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if _draw_overlap(root / "overlap_by_position.png", history):
            captions["Overlap by position over training"] = "figures/overlap_by_position.png"
        for caption, file, title, y_label, names in _line_figures(training):
            lines = [line for metric, label in names.items() if (line := _line(history, metric, label)).x]
            if lines:
                draw_lines(root / file, lines, title=title, x_label="step", y_label=y_label)
                captions[caption] = f"figures/{file}"
        return captions, {f"figures/{path.name}": path.read_bytes() for path in sorted(root.iterdir())}


def _line_figures(training: TrainingSummary) -> list[tuple[str, str, str, str, dict[str, str]]]:
    """Caption, file, title, vertical axis, and label by metric; a centred reward is near 0, so the divergence stands beside it."""
    saved = f"saved by stopping, at most: {duration(training.saved_seconds)}"
    budget = {
        "budget/length": "budget",
        "prune/effective_length_max": "longest effective length",
        "prune/effective_length_mean": "mean effective length",
    }
    tokens = {"tokens/kept": "kept", "tokens/saved": saved}
    reward = {"reward/mean": "mean reward of a token", "kl/topk": "KL to the teacher on the candidates"}
    return [
        ("Response budget and response length", "response_budget.png", "Response budget", "response tokens", budget),
        (
            "Tokens kept, and what stopping saved",
            "tokens.png",
            "Response tokens so far",
            "response tokens",
            tokens,
        ),
        ("Reward", "reward.png", "Reward", "nats", reward),
    ]


def _line(history: Sequence[Mapping[str, Any]], metric: str, label: str) -> Line:
    """One metric, where it was logged."""
    points = [(float(row["step"]), float(row[metric])) for row in history if row.get(metric) is not None]
    return Line(label, [step for step, _ in points], [value for _, value in points])


def _draw_overlap(path: Path, history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there were two steps and two bins of positions to draw."""
    rows = [row for row in history if any(name.startswith(_BY_POSITION) for name in row)]
    names = sorted({name for row in rows for name in row if name.startswith(_BY_POSITION)})
    steps = [float(row["step"]) for row in rows]
    if len(set(steps)) < 2 or len(names) < 2:
        return False
    firsts = [float(name.removeprefix(_BY_POSITION)) for name in names]
    half_width = (firsts[1] - firsts[0]) / 2
    draw_heatmap(
        path,
        [[float("nan") if row.get(name) is None else float(row[name]) for row in rows] for name in names],
        x=steps,
        y=[first + half_width for first in firsts],
        title="Overlap of teacher and student by position",
        x_label="step",
        y_label="response position",
        value_label="overlap",
    )
    return True


def duration(seconds: float) -> str:
    """A duration in the largest unit that it fills.

    Example:
        >>> duration(42.0), duration(600.0), duration(18000.0)
        ('42.0 s', '10.0 min', '5.0 h')
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
