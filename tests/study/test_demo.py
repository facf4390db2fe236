"""The demo: its sentence, its arguments, and everything that a short run leaves."""

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd_hf.cli.demo import DemoArguments, demo
from prune_opd_hf.errors import ConfigError
from prune_opd_hf.hub import StudentRecords, build_bundle
from prune_opd_hf.records.files import read_json
from prune_opd_hf.study import StudyReport
from prune_opd_hf.study.demo import demo_settings, run_demo, time_to_equal_accuracy
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": float("nan")}, "seconds must be a finite number above 0"),
        ({"seed": -1}, "at least 0"),
        ({"evaluation_problems": 0}, "evaluation_problems must be at least 1"),
    ],
)
def test_arguments_outside_their_range_are_refused(tmp_path, change, message):
    arguments = DemoArguments(output_dir=str(tmp_path / "demo"), **change)
    with pytest.raises(ConfigError, match=message):
        demo(arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_needs_no_matplotlib(tmp_path, capsys, without_matplotlib):
    output = tmp_path / "demo"
    run_demo(str(output), seconds=0.1, seed=0, device="cpu", evaluation_problems=4, console=Console(width=110))
    assert {"student", "student-opd", "README.md", "report.json"} <= {path.name for path in output.iterdir()}
    assert "accuracy against seconds" not in capsys.readouterr().out


def test_a_short_demo_leaves_students_that_load_and_could_be_published(tmp_path, capsys):
    output = tmp_path / "demo"
    run_demo(str(output), seconds=0.1, seed=0, device="cpu", evaluation_problems=4, console=Console(width=110))
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("base student", "plain OPD", "Prune-OPD", "teacher", "It answers"))
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert set(read_json(output / "results.json")) == {"base student", "plain OPD", "Prune-OPD", "teacher"}
    for page in (output, output / "student", output / "student-opd"):
        figures = [line for line in (page / "README.md").read_text().splitlines() if line.startswith("![")]
        assert len(set(figures)) == len(figures) > 0
    names = {path.name for path in (output / "figures").iterdir()}
    assert "accuracy_against_seconds.png" in names
    assert names.isdisjoint(path.name for path in (output / "student" / "figures").iterdir())  # none is drawn twice
    report = StudyReport.load(output)
    for folder, arm in (("student", "drift"), ("student-opd", "none")):
        student = output / folder
        assert AutoModelForCausalLM.from_pretrained(student).config.model_type == "qwen3"
        assert len(AutoTokenizer.from_pretrained(student)) == 64
        records = StudentRecords.load(student)
        assert records.training.pruning == arm
        assert records.training.steps == report.curves[arm][0][-1].step
        assert records.reports[0]["chain"].problems == 4
        assert build_bundle(student).card.text
