"""Figures of a run, each a PNG with its data as CSV beside it. Colours are told apart by colour-blind readers as well, and an
opaque white ground keeps a figure readable on light and dark pages.

It knows plain numbers and matplotlib, drawn without its global state; it knows neither models nor trainers.
"""

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prune_opd_hf.errors import InputError, warn_once

logger = logging.getLogger(__name__)

MISSING = "figures need matplotlib: pip install 'prune-opd-hf[figures]'"
# Okabe and Ito's palette, without its yellow, which is too light on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MOST_MARKERS = 24
"""Markers on one line; they tell lines apart, and more of them would hide the line."""

HATCHES = ("", "//", "..", "xx", "--", "oo", "++")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", ":")
MOST_LINES_BESIDE_THE_LEGEND = 6


@dataclass(frozen=True)
class Line:
    """One line of a figure.

    Attributes:
        label: its name in the legend.
        x, y: its points.
        low, high: bounds of a band around it; None draws none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def can_draw() -> bool:
    """Whether matplotlib is there. Where it is not, figures are left out, and a line in the log says so, once."""
    if find_spec("matplotlib") is not None:
        return True
    warn_once(logger, f"no figures are drawn: {MISSING}")
    return False


def draw_lines(
    path: str | os.PathLike,
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
) -> Path:
    """Draw lines into `path` (.png) and write their points beside it (.csv)."""
    figure, axes = new_figure(title, x_label, y_label)
    crowded = len(lines) > MOST_LINES_BESIDE_THE_LEGEND
    for index, line in enumerate(lines):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        style = LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]  # no two of 21 lines look alike
        every = max(1, len(line.x) // MOST_MARKERS)
        axes.plot(
            line.x,
            line.y,
            style,
            color=colour,
            marker=marker,
            markersize=4,
            markevery=every,
            linewidth=1.8,
            label=line.label,
        )
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.07 if crowded else 0.18, linewidth=0)
    if y_range is not None:
        axes.set_ylim(*y_range)
    if max(max(line.x) for line in lines) >= 10_000:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, **({"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if crowded else {}))
    rows = [
        {"line": line.label, x_label: x, y_label: y}
        | ({} if line.low is None or line.high is None else {"low": line.low[i], "high": line.high[i]})
        for line in lines
        for i, (x, y) in enumerate(zip(line.x, line.y, strict=True))
    ]
    return save_figure(figure, Path(path), rows)


def draw_heatmap(
    path: str | os.PathLike,
    values: Sequence[Sequence[float]],
    *,
    x: Sequence[float],
    y: Sequence[float],
    title: str,
    x_label: str,
    y_label: str,
    value_label: str,
) -> Path:
    """Draw a grid of values in [0, 1], NaN left blank: one row for each `y`, one column for each `x`."""
    figure, axes = new_figure(title, x_label, y_label)
    mesh = axes.pcolormesh(
        list(x), list(y), [list(row) for row in values], cmap="viridis", vmin=0, vmax=1, shading="nearest"
    )
    axes.grid(visible=False)
    figure.colorbar(mesh, ax=axes, label=value_label)
    rows = [
        {x_label: x[column], y_label: y[row], value_label: value}
        for row, line in enumerate(values)
        for column, value in enumerate(line)
    ]
    return save_figure(figure, Path(path), rows)


def draw_points(
    path: str | os.PathLike,
    groups: Mapping[str, Sequence[tuple[float, float, str]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    marked: tuple[float, float, str] | None = None,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Path:
    """Draw points (x, y, name) of several groups, each with its own colour and shape; the names go into the CSV.

    Args:
        marked: a point to ring, with its name in the legend.
    """
    figure, axes = new_figure(title, x_label, y_label)
    for index, (name, points) in enumerate(groups.items()):
        axes.scatter(
            *([point[axis] for point in points] for axis in (0, 1)),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            s=22,
            alpha=0.75,
            linewidths=0,
            label=name,
        )
    if marked is not None:
        axes.scatter(*marked[:2], s=190, facecolors="none", edgecolors="black", linewidths=1.6, label=marked[2])
    if x_range is not None:
        axes.set_xlim(*x_range)
    if y_range is not None:
        axes.set_ylim(*y_range)
    axes.legend(frameon=False, ncols=len(groups) + 1, loc="upper left", bbox_to_anchor=(0, -0.16))
    rows = [
        {"group": group, "name": name, x_label: x, y_label: y}
        for group, points in groups.items()
        for x, y, name in points
    ]
    return save_figure(figure, Path(path), rows)


def draw_stacked_bars(
    path: str | os.PathLike,
    values: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    value_label: str,
) -> Path:
    """Draw one horizontal bar for each name, its parts stacked and each part's number inside where there is room."""
    figure, axes = new_figure(title, value_label, "")
    parts = list(dict.fromkeys(part for bar in values.values() for part in bar))
    widest = max(sum(bar.values()) for bar in values.values())
    left = [0.0] * len(values)
    for index, part in enumerate(parts):
        widths = [bar.get(part, 0.0) for bar in values.values()]
        drawn = axes.barh(
            list(values),
            widths,
            left=left,
            color=COLOURS[index % len(COLOURS)],
            hatch=HATCHES[index % len(HATCHES)],
            edgecolor="white",
            height=0.62,
            label=part,
        )
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        numbers = [f"{width:.2g}" if width > 0.07 * widest else "" for width in widths]
        axes.bar_label(drawn, numbers, label_type="center", fontsize=9, bbox=ground)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.legend(frameon=False, ncols=len(parts), loc="upper left", bbox_to_anchor=(0, -0.16))
    rows = [
        {"bar": name, "part": part, value_label: bar.get(part, 0.0)} for name, bar in values.items() for part in parts
    ]
    return save_figure(figure, Path(path), rows)


def new_figure(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(MISSING) from error
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the PNG, and its numbers as CSV beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
    return path
