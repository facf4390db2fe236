"""The demo's own arithmetic and words; the whole of it runs in .ci/run."""

from pathlib import Path

import pytest

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.study.demo.run import Arm, _verdict, first_reached
from prune_opd_hf.study.demo.settings import ARMS, DemoArguments, training_settings
from prune_opd_hf.study.demo.worker import CurvePoint, WorkerSettings, train_one
from prune_opd_hf.training import TrainingSummary


def curve(*points):
    return [CurvePoint(step, seconds, 0, accuracy) for step, (seconds, accuracy) in enumerate(points)]


def arm(name, points):
    summary = TrainingSummary(
        dataset="d",
        loss="l",
        pruning="none",
        steps=1,
        rollouts=1,
        generated_tokens=1,
        kept_tokens=1,
        saved_tokens=0,
        wall_seconds=1.0,
    )
    return Arm(name, Path("nowhere"), summary, curve(*points))


def test_the_two_arms_differ_in_pruning_alone():
    plain, pruned = (training_settings(pruning, 0, "cpu", "x") for pruning in ARMS)
    assert {name for name in plain if plain[name] != pruned[name]} == {"pruning"}


def test_the_verdict_says_so_when_pruning_does_not_win():
    plain = arm("OPD", [(0, 0.1), (10, 0.9)])
    assert "pruning did not win" in _verdict([plain, arm("Prune-OPD", [(0, 0.1), (10, 0.8)])])
    # .9 lies three quarters of the way from .6 to 1.0, so at 8 s
    won = _verdict([plain, arm("Prune-OPD", [(0, 0.1), (5, 0.6), (9, 1.0)])])
    assert "after 8.0 s, plain OPD after 10.0 s: 0.80 of its time" in won


def test_an_accuracy_that_was_there_from_the_start_is_reached_at_once():
    assert first_reached(curve((0.0, 0.5), (3.0, 0.6)), 0.4) == 0.0


@pytest.mark.parametrize("change", [{"seconds": float("nan")}, {"seed": -1}, {"evaluation_problems": 0}])
def test_arguments_outside_their_range_are_refused(tmp_path, change):
    with pytest.raises(ConfigError):
        DemoArguments(**{"output": str(tmp_path / "demo"), **change})


@pytest.mark.parametrize("pruning", ["drift", "none"])
def test_a_worker_leaves_student_summary_and_curve_and_tells_how_it_goes(tmp_path, capsys, pruning):
    train_one(WorkerSettings(pruning, seconds=0.2, seed=0, device="cpu", folder=str(tmp_path), curve_problems=4))
    assert capsys.readouterr().out.startswith('{"pruning"')
    assert TrainingSummary.load(tmp_path).pruning == pruning
    assert (tmp_path / "student" / "model.safetensors").is_file()
