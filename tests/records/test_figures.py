"""Figures: a real PNG, and every drawn number in the CSV beside it."""

import csv
from dataclasses import replace

import pytest
import torch

from prune_opd_hf import DriftConfig, Rollouts
from prune_opd_hf.errors import InputError
from prune_opd_hf.records.figures import (
    Line,
    draw_heatmap,
    draw_lines,
    draw_points,
    draw_rollout,
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


def rollouts_of_one_row():
    zeros, ids = torch.zeros(1, 3), torch.zeros(1, 3, 1, dtype=torch.long)
    return Rollouts(
        prompt_ids=torch.tensor([[1]]),
        prompt_mask=torch.tensor([[True]]),
        response_ids=torch.tensor([[5, 6, 0]]),
        response_mask=torch.tensor([[True, True, False]]),
        teacher_token_log_probs=zeros,
        teacher_topk_ids=ids,
        teacher_topk_log_probs=zeros.unsqueeze(-1),
        drift_events=torch.tensor([[False, True, False]]),
        reliability=torch.tensor([[1.0, 0.0, 0.0]]),
        stop_reason=("drift",),
        config=DriftConfig(top_k=1, weight_drop=1.0),
        overlap=torch.tensor([[1.0, 0.0, 0.0]]),
    )


def test_a_rollout_is_drawn_up_to_its_end(tmp_path):
    rollouts = rollouts_of_one_row()
    path = draw_rollout(tmp_path / "rollout.png", rollouts, 0, title="t")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [(row["position"], row["drift event"], row["reliability"]) for row in rows_of(path)] == [
        ("0", "0", "1.0"),
        ("1", "1", "0.0"),
    ]
    with pytest.raises(InputError, match="no row 1 among 1"):
        draw_rollout(tmp_path / "x.png", rollouts, 1, title="t")
    with pytest.raises(InputError, match="no overlap"):
        draw_rollout(tmp_path / "x.png", replace(rollouts, overlap=None), 0, title="t")


def test_nothing_is_drawn_of_nothing(tmp_path):
    for draw in (
        lambda: draw_points(tmp_path / "x.png", {"a": []}, title="t", x_label="x", y_label="y"),
        lambda: draw_stacked_bars(tmp_path / "x.png", {}, title="t", value_label="v"),
    ):
        with pytest.raises(InputError, match="nothing to draw"):
            draw()
