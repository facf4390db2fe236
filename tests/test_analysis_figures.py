"""Figures: a real PNG, and every drawn number in the CSV beside it."""

import csv

import pytest

from prune_opd_hf.analysis.figures import Line, draw_heatmap, draw_lines
from prune_opd_hf.errors import InputError


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


def test_columns_of_different_length_and_empty_figures_are_refused(tmp_path):
    with pytest.raises(InputError, match="different lengths"):
        Line("a", [0, 1], [0.5])
    with pytest.raises(InputError, match="nothing to draw"):
        draw_lines(tmp_path / "x.png", [], title="t", x_label="x", y_label="y")
