"""The demo's own sentence and arguments; the whole of it runs in .ci/run."""

import pytest

from prune_opd_hf.cli.demo import DemoArguments
from prune_opd_hf.errors import ConfigError
from prune_opd_hf.study.demo import demo_settings, time_to_equal_accuracy
from prune_opd_hf.study.learning_curve import CurvePoint


def curve(*points):
    return [CurvePoint(step, seconds, 0, accuracy) for step, (seconds, accuracy) in enumerate(points)]


def test_the_two_arms_differ_in_pruning_alone():
    settings = demo_settings(1.0, 0, "cpu", 512)
    assert {name: dict(arm.training) for name, arm in settings.arms.items()} == {
        "none": {"pruning": "none"},
        "drift": {"pruning": "drift"},
    }


def test_the_verdict_says_so_when_pruning_does_not_win():
    plain = curve((0, 0.1), (10, 0.9))
    assert "pruning did not win" in time_to_equal_accuracy(plain, curve((0, 0.1), (10, 0.8)))
    # .9 lies three quarters of the way from .6 to 1.0, so at 8 s
    won = time_to_equal_accuracy(plain, curve((0, 0.1), (5, 0.6), (9, 1.0)))
    assert "after 8.0 s, plain OPD after 10.0 s: 0.80 of its time" in won


def test_nothing_is_compared_where_plain_opd_learned_nothing():
    assert "nothing to compare" in time_to_equal_accuracy(curve((0, 0.5), (3, 0.4)), curve((0, 0.5), (3, 0.6)))


@pytest.mark.parametrize("change", [{"seconds": float("nan")}, {"seed": -1}, {"evaluation_problems": 0}])
def test_arguments_outside_their_range_are_refused(tmp_path, change):
    with pytest.raises(ConfigError):
        DemoArguments(**{"output_dir": str(tmp_path / "demo"), **change})
