"""Figures: a real PNG, and every drawn number in the CSV beside it."""

import csv

from prune_opd_hf.records import figures
from prune_opd_hf.records.figures import (
    Line,
    draw_heatmap,
    draw_lines,
    draw_points,
    draw_stacked_bars,
)


def rows_of(path):
    with open(path.with_suffix(".csv"), newline="") as file:
        return list(csv.DictReader(file))


def test_lines_and_their_numbers(tmp_path):
    lines = [Line("a", [0, 1], [0.5, 0.25]), Line("b", [0, 1], [1, 2], low=[0, 1], high=[2, 3])]
    path = draw_lines(tmp_path / "figure.png", lines, title="t", x_label="x", y_label="y")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [(row["line"], row["x"], row["y"], row["high"]) for row in rows_of(path)] == [
        ("a", "0", "0.5", ""),
        ("a", "1", "0.25", ""),
        ("b", "0", "1", "2"),
        ("b", "1", "2", "3"),
    ]


def test_of_nine_lines_no_two_look_alike_and_their_names_hide_none(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path, rows: drawn.append(figure) or path)
    lines = [Line(str(arm), [0, 1], [0, arm]) for arm in range(9)]
    draw_lines(tmp_path / "figure.png", lines, title="t", x_label="x", y_label="y")
    drawn[0].draw_without_rendering()
    axes = drawn[0].axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 9
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1


def test_heat_map_with_gaps(tmp_path):
    path = draw_heatmap(
        tmp_path / "map.png",
        [[0.1, float("nan")]],
        x=[1, 2],
        y=[5],
        title="t",
        x_label="x",
        y_label="y",
        value_label="v",
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [row["v"] for row in rows_of(path)] == ["0.1", "nan"]


def test_points_of_groups_and_their_names(tmp_path):
    groups = {"overlap": [(0.1, 0.5, "k 2")], "mass": [(0.2, 0.25, "k 4"), (0.3, 1.0, "k 8")]}
    path = draw_points(
        tmp_path / "points.png", groups, title="t", x_label="x", y_label="y", marked=(0.1, 0.5, "best"), x_range=(0, 1)
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [(row["group"], row["name"], row["x"], row["y"]) for row in rows_of(path)] == [
        ("overlap", "k 2", "0.1", "0.5"),
        ("mass", "k 4", "0.2", "0.25"),
        ("mass", "k 8", "0.3", "1.0"),
    ]


def test_bars_hold_every_part_also_those_that_a_bar_lacks(tmp_path):
    values = {"plain": {"generate": 2.0, "update": 1.0}, "pruned": {"generate": 0.5}}
    path = draw_stacked_bars(tmp_path / "bars.png", values, title="t", value_label="seconds")
    assert [(row["bar"], row["part"], float(row["seconds"])) for row in rows_of(path)] == [
        ("plain", "generate", 2.0),
        ("plain", "update", 1.0),
        ("pruned", "generate", 0.5),
        ("pruned", "update", 0.0),
    ]
