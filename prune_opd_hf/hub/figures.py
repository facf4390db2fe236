"""How training went, as figures for a card: drawn from the metric history of a training summary.

What a run did not log is not drawn, so that the dictionary of figures may be shorter or empty.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_opd_hf.hub.results import duration
from prune_opd_hf.records.figures import Line, draw_heatmap, draw_lines
from prune_opd_hf.records.training_summary import TrainingSummary

_BY_POSITION = "prune/overlap_by_position/"


def training_figures(training: TrainingSummary) -> tuple[dict[str, str], dict[str, bytes]]:
    """Draw what the history holds.

    Returns:
        Path in the repository by caption, and content by path: each figure as PNG with its points as CSV beside it.

    Raises:
        InputError: matplotlib is not installed.

    Example: nothing logged, nothing drawn.
        >>> training_figures(TrainingSummary(dataset="d", loss="l", pruning="none", steps=1, rollouts=1,
        ...     generated_tokens=1, kept_tokens=1, saved_tokens=0, wall_seconds=1.0))
        ({}, {})
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        captions = {
            caption: f"figures/{path.name}"
            for caption, path in (
                ("Overlap by position over training", _overlap_by_position(root, training.history)),
                ("Response budget and response length", _budget(root, training.history)),
                ("Tokens kept, and the hours that stopping saved", _tokens_and_hours(root, training)),
                ("Reward", _reward(root, training.history)),
            )
            if path is not None
        }
        files = {f"figures/{path.name}": path.read_bytes() for path in sorted(root.iterdir())}
    return captions, files


def _series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it was logged."""
    points = [
        (float(row["step"]), float(row[name]))
        for row in history
        if row.get("step") is not None and row.get(name) is not None
    ]
    return [step for step, _ in points], [value for _, value in points]


def _lines(history: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[Line]:
    lines = [Line(label, *_series(history, name)) for name, label in names.items()]
    return [line for line in lines if line.x]


def _overlap_by_position(root: Path, history: Sequence[Mapping[str, Any]]) -> Path | None:
    rows = [
        row for row in history if row.get("step") is not None and any(name.startswith(_BY_POSITION) for name in row)
    ]
    names = sorted({name for row in rows for name in row if name.startswith(_BY_POSITION)})
    steps = [float(row["step"]) for row in rows]
    if len(set(steps)) < 2 or len(names) < 2:
        return None
    firsts = [float(name.removeprefix(_BY_POSITION)) for name in names]
    half_width = (firsts[1] - firsts[0]) / 2
    return draw_heatmap(
        root / "overlap_by_position.png",
        [[_number(row.get(name)) for row in rows] for name in names],
        x=steps,
        y=[first + half_width for first in firsts],
        title="Overlap of teacher and student by position",
        x_label="step",
        y_label="response position",
        value_label="overlap",
    )


def _budget(root: Path, history: Sequence[Mapping[str, Any]]) -> Path | None:
    names = {
        "budget/length": "budget",
        "prune/effective_length_max": "longest effective length",
        "prune/effective_length_mean": "mean effective length",
    }
    lines = _lines(history, names)
    if not lines:
        return None
    return draw_lines(
        root / "response_budget.png", lines, title="Response budget", x_label="step", y_label="response tokens"
    )


def _tokens_and_hours(root: Path, training: TrainingSummary) -> Path | None:
    saved = f"saved by stopping, at most: {duration(training.saved_seconds)}"
    lines = _lines(training.history, {"tokens/kept": "kept", "tokens/saved": saved})
    if not lines:
        return None
    return draw_lines(
        root / "tokens.png", lines, title="Response tokens so far", x_label="step", y_label="response tokens"
    )


def _reward(root: Path, history: Sequence[Mapping[str, Any]]) -> Path | None:
    """The mean reward; a centred one is near 0 throughout, so that the divergence it works on stands beside it."""
    lines = _lines(history, {"reward/mean": "mean reward of a token", "kl/topk": "KL to the teacher on the candidates"})
    if not lines:
        return None
    return draw_lines(root / "reward.png", lines, title="Reward", x_label="step", y_label="nats")


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
