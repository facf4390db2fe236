"""The study: settings, statistics, the verdict, and runs that survive a kill."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Queue

import jaxtyping
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd_hf.cli import main
from prune_opd_hf.errors import ConfigError, FileFormatError, PruneOPDError
from prune_opd_hf.hub.markdown import text
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.study import ArmSettings, StudyReport, StudySettings, run_study
from prune_opd_hf.study.arm_training import ArmRun, TrainingOrder, train_arm
from prune_opd_hf.study.learning_curve import CurvePoint, accuracy_at, spent_to_reach
from prune_opd_hf.study.run_study import Processes, result_path, run_arms, student_path
from prune_opd_hf.study.study_page import draw_study, phase_medians, study_page, write_study
from prune_opd_hf.study.study_report import SeedMean
from prune_opd_hf.tasks import ChainTask, load_student
from prune_opd_hf.tasks.pair import WEIGHTS
from prune_opd_hf.training import PruneOPDConfig

TINY = {
    "model_name_or_path": "embedded",
    "teacher_model_name_or_path": "embedded",
    "dataset_name": "embedded",
    "seeds": [0, 1],
    "budgets": {"steps": 2, "tokens": 300},
    "points": 2,
    "evaluation_problems": 4,
    "training_prompts": 32,
    "processes": 2,
    "training": {
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 4,
        "num_generations": 1,
        "max_prompt_length": 27,
        "max_completion_length": 48,
        "drift_metric": "overlap",
        "drift_top_k": 2,
        "drift_threshold": 0.5,
        "drift_weight_drop": 0.25,
        "drift_min_length": 1,
        "budget_minimum": 8,
        "check_every": 8,
    },
}


def curve(*points):
    """Points as (step, seconds, tokens, accuracy); CPU seconds are the seconds."""
    return tuple(
        CurvePoint(step, seconds, tokens, accuracy, cpu_seconds=seconds, kept_tokens=tokens, rollouts=4 * step)
        for step, seconds, tokens, accuracy in points
    )


def result(study, arm, seed, points, history=()):
    last = points[-1]
    summary = TrainingSummary(
        dataset="d",
        loss="l",
        pruning="drift",
        steps=last[0],
        rollouts=4 * last[0],
        generated_tokens=last[2],
        kept_tokens=last[2],
        saved_tokens=0,
        wall_seconds=last[1],
        phase_seconds={"generate": 3.0, "teacher": 1.0, "update": 2.0},
        history=history or [{"step": 1, "budget/length": 48.0}, {"step": 2, "budget/length": 44.0}],
        hardware="some CPU",
        versions={"python": "3"},
    )
    return ArmRun(arm, seed, study.fingerprint(arm), None, curve(*points), summary)


def test_models_and_problems_in_files_are_graded_as_chains_where_the_study_says_so(tmp_path):
    """An arm of one step on the shipped pair by its folders. The teacher as student answers every problem: accuracy 1."""
    task = ChainTask()
    task.dataset(32, 0).to_json(tmp_path / "training.jsonl")
    task.dataset(8, 1, split="evaluation").to_json(tmp_path / "evaluation.jsonl")
    teacher = str(WEIGHTS / "teacher")
    values = {
        **TINY,
        "model_name_or_path": teacher,
        "teacher_model_name_or_path": teacher,
        "dataset_name": str(tmp_path / "training.jsonl"),
        "eval_dataset_name": str(tmp_path / "evaluation.jsonl"),
        "answer_type": "chain",
        "budgets": {"steps": 1},
        "evaluation_problems": 8,
    }
    order = TrainingOrder(StudySettings.from_json(values), "drift", 0, None, str(tmp_path / "run.json"), None, None)
    run = train_arm(order, str(tmp_path / "work"))
    assert run.curve[0].accuracy == 1
    with pytest.raises(ConfigError, match="answer_type"):
        StudySettings.from_json({**values, "answer_type": "essay"})


# ---------------------------------------------------------------------- settings


def test_the_usual_arms_match_the_length_that_drift_kept():
    study = StudySettings.from_json(TINY)
    assert list(study.arms) == ["none", "fixed", "random", "drift"]
    assert {name for name, arm in study.arms.items() if arm.length_from == "drift"} == {"fixed", "random"}
    for name, arm in study.arms.items():
        PruneOPDConfig(  # every arm is a configuration that the trainer takes
            output_dir="unused",
            use_cpu=True,
            **{**study.training, **arm.training},
            **({"pruning_length": 20.0} if arm.length_from else {}),
        )
        assert arm.training["pruning"] == name
    # the run that others wait for comes first within its seed
    assert study.runs()[0] == ("drift", 0)
    assert len(study.runs()) == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"seeds": ["a"]}, "seeds.*valid integer"),
        ({"seeds": 3}, "seeds.*valid tuple|seeds.*valid array"),
        ({"budgets": {}}, "budgets must be counted in steps"),
        ({"budgets": {"hours": 1}}, "counted in steps"),
        ({"budgets": {"steps": 0}}, "budget of steps must be"),
        ({"budgets": {"steps": float("inf")}}, "budget of steps must be"),
        ({"budgets": {"steps": float("nan")}}, "budget of steps must be"),
        ({"budgets": {"steps": True}}, "budgets.steps.*valid number"),
        ({"budgets": {"steps": "3"}}, "budgets.steps.*valid number"),
        ({"points": 0}, "points must be at least 1"),
        ({"processes": 0}, "processes must be at least 1"),
        ({"goal_accuracy": 0.0}, "goal_accuracy"),
        ({"compare_at": []}, "compare_at"),
        ({"compare_at": [0.5, 1.5]}, "compare_at"),
        ({"compare_at": 1.0}, "compare_at.*valid (tuple|array)"),
        ({"reference": "nothing"}, "reference must be one of the arms none.*got 'nothing'"),
        ({"teacher_model_name_or_path": "some/model"}, "all be 'embedded'"),
        ({"model_name_or_path": "a", "teacher_model_name_or_path": "b", "dataset_name": "c"}, "eval_dataset_name"),
        ({"training": {"seed": 3}}, "must not hold seed: set seeds"),
        ({"training": {"max_steps": 3}}, "must not hold max_steps: set budgets"),
        ({"arms": {"mine": None}, "reference": "mine"}, "'mine' needs training: {pruning"),
        ({"arms": {"mine": {"training": {}}}, "reference": "mine"}, "needs training: {pruning"),
        ({"arms": {"drift": {"trainig": {}}}}, "did you mean .*training"),
        ({"arms": {"drift": None, "fixed": {"length_from": "none"}}}, "takes its length from 'none'"),
        ({"arms": ["drift", "fixed", "random", "none"], "seed": 1}, "did you mean .*seeds"),
        ({"arms": ["drift", "none", "drift"]}, "the arms need names of their own"),
        ({"arms": {"drift": {"label": "a"}, "none": {"label": "a"}}}, "'a' is the label of several arms"),
        ({"training": {"max_completion_length": 0}}, "arm 'none': max_completion_length must be at least 1, got 0"),
        ({"training": {"num_generations": 3}}, "not a multiple of num_generations 3"),
        ({"arms": {"drift": {"training": {"drift_threshold": 5}}}}, "arm 'drift': drift_threshold must lie in .*got 5"),
        ({"arms": {"drift": None, "none": {"length_from": "drift"}}}, "arm 'none': pruning_length is for pruning ="),
        ({"training": {"learning_ratee": 1}}, "did you mean .*learning_rate"),
        ({"arms": {"drift": {"training": {"check_evry": 1}}}}, "did you mean .*check_every"),
        ({"arms": {"a/b": {"training": {"pruning": "none"}}}, "reference": "a/b"}, "got 'a/b'"),
        ({"training": {"max_grad_norm": None}}, "max_grad_norm must be a number, got None"),
        (
            {"arms": {"drift": {"training": {"check_every": "often"}}}},
            "check_every must be a whole number, got 'often'",
        ),
        ({"training": [1]}, "training"),
        ({"arms": {"drift": {"training": [1]}}}, "arms.drift.training"),
        ({"arms": {"drift": 1}}, "arms.drift"),
        ({"arms": 1}, "arms"),
        ({"points": "many"}, "points.*valid integer"),
    ],
)
def test_settings_that_make_no_study_are_refused_by_name(change, words, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checker
    with pytest.raises(ConfigError, match=words):
        StudySettings.from_json({**TINY, **change})


def test_the_config_in_the_examples_is_a_study_of_five_seeds():
    study = StudySettings.load("examples/configs/study_embedded.yaml")
    assert len(study.seeds) >= 5
    assert {"none", "fixed", "random", "drift"} <= set(study.arms)
    assert StudySettings.from_json(study.to_json()) == study
    assert StudySettings.from_json(study.to_json()).fingerprint("drift") == study.fingerprint("drift")


def test_files_that_hold_no_study_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        StudySettings.load(tmp_path / "none.yaml")
    for content in ("[1, 2]", "a: [", "just words"):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ConfigError):
            StudySettings.load(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="model_name_or_path: field required"):
        StudySettings.from_json({"seeds": [1], "budgets": {"steps": 1}})


# ---------------------------------------------------------------------- curves


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.floats(0, 1)), min_size=2, max_size=6),
    st.floats(0, 1),
)
def test_accuracy_between_two_points_lies_on_the_line_between_them(moves, share):
    points, step = [CurvePoint(0, 0.0, 0, 0.1)], 0
    for move, accuracy in moves:
        step += move
        points.append(CurvePoint(step, 2.0 * step, 3 * step, accuracy))
    for first, second in itertools.pairwise(points):
        at = first.step + share * (second.step - first.step)
        expected = first.accuracy + share * (second.accuracy - first.accuracy)
        assert accuracy_at(points, "steps", at) == pytest.approx(expected, abs=1e-9)
        assert accuracy_at(points, "seconds", 2 * at) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(AssertionError, match="budgets are spent"):
        accuracy_at(points, "steps", step + 1)


def test_what_it_took_to_reach_an_accuracy_is_the_first_crossing():
    points = curve((0, 0, 0, 0.2), (4, 8, 40, 0.6), (8, 16, 80, 0.4), (12, 24, 120, 0.9))
    assert spent_to_reach(points, "steps", 0.5) == 3.0  # three quarters of the way from .2 to .6
    assert spent_to_reach(points, "tokens", 0.2) == 0.0
    assert spent_to_reach(points, "seconds", 0.95) is None


# ---------------------------------------------------------------------- statistics


def test_the_interval_is_students_t_over_seeds():
    estimate = SeedMean.of([0.2, 0.4, 0.6])
    # s = .2, t with 2 degrees of freedom is 4.303
    assert estimate.mean == pytest.approx(0.4)
    assert estimate.high - estimate.mean == pytest.approx(4.3027 * 0.2 / math.sqrt(3), rel=1e-4)
    assert SeedMean.of([0.3]).low is None


def study_of(outcome):
    """A study of two seeds whose drift arm is ahead of `none` by these amounts at 10 steps, and even with `fixed`."""
    study = StudySettings.from_json(
        {
            **TINY,
            "budgets": {"steps": 10, "cpu_seconds": 5},
            "compare_at": [0.5, 1.0],
            "arms": ["none", "fixed", "drift"],
        }
    )
    results = []
    for seed, ahead in zip(study.seeds, outcome, strict=True):
        for arm in study.arms:
            last = 0.5 + (ahead if arm == "drift" else 0.01 * (1 - 2 * seed) if arm == "fixed" else 0.0)
            last = 0.5 + ahead + 0.01 * (1 - 2 * seed) if arm == "fixed" else last
            results.append(result(study, arm, seed, [(0, 0, 0, 0.1), (10, 10, 500, last)]))
    return study, results


@pytest.mark.parametrize(
    ("outcome", "word", "line"),
    [
        ((0.2, 0.2001), "better", "beats plain OPD (+20.0"),
        ((-0.2, -0.2001), "worse", "loses to plain OPD (-20.0"),
        ((0.2, -0.2), "open", "is not shown to differ from plain OPD (+0.0"),
    ],
)
def test_the_verdict_says_what_the_paired_differences_say(outcome, word, line):
    study, results = study_of(outcome)
    report = StudyReport.of(study, results)
    found = {(item.axis, item.budget, item.arm): item for item in report.comparisons}
    assert found["steps", 10, "none"].outcome == word
    assert found["steps", 10, "none"].difference.values == pytest.approx(outcome)
    assert found["steps", 10, "fixed"].outcome == "open"
    assert line in report.verdict[1]
    assert any(
        line.startswith("Prune-OPD beats ") and line.endswith("fixed length, matched at no budget.")
        for line in report.verdict
    )
    # at half of the CPU seconds the curve is half-way, at a quarter a quarter of the way from .1 to .5
    assert report.accuracy["5 CPU seconds"]["none"].mean == pytest.approx(0.3)
    assert report.accuracy["2.5 CPU seconds"]["none"].mean == pytest.approx(0.2)


def test_a_study_of_one_arm_compares_nothing_and_says_so(tmp_path):
    study = StudySettings.from_json({**TINY, "arms": ["drift"]})
    results = [result(study, "drift", seed, [(0, 0.0, 0, 0.1), (2, 1.0, 300, 0.5)]) for seed in study.seeds]
    report = StudyReport.of(study, results)
    assert report.verdict == ("Prune-OPD is the only arm, so there is nothing to compare it with.",)
    page = study_page(report, "command", {})
    assert "| arm | at 2 optimizer steps | at 300 sampled tokens |" in page
    assert r"| Prune-OPD | 50.0 \[50.0, 50.0\] | 50.0 \[50.0, 50.0\] |" in page
    assert "## Differences" not in page


def test_one_seed_shows_no_difference():
    study = StudySettings.from_json({**TINY, "seeds": [0], "arms": ["none", "drift"], "budgets": {"steps": 2}})
    runs = [
        result(study, arm, 0, [(0, 0.0, 0, 0.1), (2, 1.0, 300, end)]) for arm, end in (("none", 0.5), ("drift", 0.75))
    ]
    assert StudyReport.of(study, runs).verdict == (
        "At 2 optimizer steps, Prune-OPD is not shown to differ from plain OPD (+25.0 points).",
        "One seed gives no interval, so no difference is shown.",
    )


def test_exponents_in_yaml_are_numbers(tmp_path):
    """YAML 1.1 would take them for text."""
    path = tmp_path / "study.yaml"
    path.write_text(
        json.dumps({**TINY, "training": {}, "budgets": {}})
        .replace('"training": {}', '"training": {learning_rate: 2e-4, adam_epsilon: 1.5E-8, run_name: e3}')
        .replace('"budgets": {}', '"budgets": {tokens: 1e6}')
    )
    study = StudySettings.load(path)
    assert study.training == {"learning_rate": 2e-4, "adam_epsilon": 1.5e-8, "run_name": "e3"}
    assert study.budgets == {"tokens": 1e6}


def test_the_page_holds_every_number_and_the_report_survives_the_disk(tmp_path):
    study, results = study_of((0.2, 0.3))
    report = StudyReport.of(study, results)
    page = study_page(report, "prune-opd study --config x.yaml", {"a figure": "figure.png"}, notes="## Why\n\nBecause.")
    assert text(report.accuracy["10 optimizer steps"]["drift"].percent()) in page
    for part in ("## Verdict", report.verdict[0], "![a figure](figure.png)", "Because.", "reached by none of 2"):
        assert part in page
    assert StudyReport.load(report.save(tmp_path)) == report
    figures = draw_study(report, results, tmp_path)
    assert {path.name for path in figures.values()} == {
        "accuracy_against_steps.png",
        "accuracy_against_cpu_seconds.png",
        "accuracy_against_tokens.png",
        "phase_seconds.png",
    }
    assert all(path.is_file() and path.with_suffix(".csv").is_file() for path in figures.values())
    (tmp_path / "report.json").write_text('{"kind": "else"}')
    with pytest.raises(FileFormatError):
        StudyReport.load(tmp_path)
    with pytest.raises(FileFormatError):
        StudyReport.load(tmp_path / "nothing")


def test_without_matplotlib_the_report_and_its_page_are_written_all_the_same(tmp_path, caplog, without_matplotlib):
    study, runs = study_of((0.2, 0.3))
    report = write_study(study, runs, tmp_path, command="mine", shown=runs[0])
    assert StudyReport.load(tmp_path) == report
    assert report.verdict[0] in (tmp_path / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "report.json"}
    assert caplog.text.count("no figures are drawn: figures need matplotlib: pip install") == 1


def test_a_folder_with_pages_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("my project")
    study, _ = study_of((0.2, 0.3))
    with pytest.raises(ConfigError, match=r"holds a README\.md or report\.json of something else"):
        run_study(study, tmp_path)
    assert (tmp_path / "README.md").read_text() == "my project"
    with pytest.raises(ConfigError, match=r"README\.md is a file"):
        run_study(study, tmp_path / "README.md")


def test_a_pause_of_the_machine_does_not_move_the_phase_times():
    study, _ = study_of((0.1, 0.2))
    seconds = [0.1, 0.2, 0.3, 500.0, 0.2]
    history = [{"step": step, "time/generate": value, "time/update": 0.5} for step, value in enumerate(seconds)]
    found = phase_medians([result(study, "drift", 0, [(0, 0, 0, 0.1)], history)])
    assert found == {"generate": 0.2, "teacher": 0.0, "update": 0.5}


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole study of one seed, run for real."""
    folder = tmp_path_factory.mktemp("study")
    study = StudySettings.from_json({**TINY, "seeds": [0], "arms": ["fixed", "drift"]})
    return study, folder, run_study(study, folder, console=Console(quiet=True))


def test_a_study_leaves_report_figures_and_runs(finished):
    study, folder, report = finished
    for arm in study.arms:
        run = ArmRun.load(result_path(folder, arm, 0))
        last = run.curve[-1]
        assert last.step >= 2
        assert last.generated_tokens >= 300
        assert last.kept_tokens <= last.generated_tokens
        assert next(entry["step"] for entry in run.summary.history if "loss" in entry) == 1
        assert result_path(folder, arm, 0).stat().st_mode & 0o777 == 0o644
    drift = ArmRun.load(result_path(folder, "drift", 0))
    assert ArmRun.load(result_path(folder, "fixed", 0)).pruning_length == round(drift.mean_kept_length, 2)
    assert StudyReport.load(folder) == report
    assert "## Verdict" in (folder / "README.md").read_text()
    assert (folder / "figures" / "accuracy_against_tokens.csv").is_file()
    assert (folder / "figures" / "response_budget.png").is_file()
    assert (
        "![Response budget and response length: Prune-OPD, seed 0](figures/response_budget.png)"
        in (folder / "README.md").read_text()
    )


def test_students_are_kept_with_their_summaries_where_asked_for(tmp_path):
    study = StudySettings.from_json({**TINY, "seeds": [0], "arms": ["drift"], "budgets": {"steps": 1}})
    [run] = run_arms(study, tmp_path, console=Console(quiet=True), keep_students=True)
    student = student_path(tmp_path, "drift", 0)
    assert AutoModelForCausalLM.from_pretrained(student).num_parameters() == load_student().num_parameters()
    assert len(AutoTokenizer.from_pretrained(student)) == 64
    assert TrainingSummary.load(student) == run.summary


def test_finished_runs_are_not_repeated_and_an_arm_can_be_added(finished):
    study, folder, report = finished
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    (folder / "notes.md").write_text("## Why\n\nBecause of this.\n")
    assert run_study(study, folder, console=Console(quiet=True)).comparisons == report.comparisons
    assert "Because of this." in (folder / "README.md").read_text()
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()} == before
    assert study.fingerprint("drift") == replace(study, arms={"drift": study.arms["drift"]}).fingerprint("drift")


def test_runs_of_other_settings_are_not_mixed_in(finished):
    study, folder, _ = finished
    other = replace(study, training={**study.training, "learning_rate": 1e-4})
    with pytest.raises(ConfigError, match="a run of other settings"):
        run_study(other, folder, console=Console(quiet=True))
    other = replace(
        study, arms={**study.arms, "drift": ArmSettings("d", {"pruning": "drift", "drift_weight_drop": 0.5})}
    )
    with pytest.raises(ConfigError, match="a run of other settings"):
        run_study(other, folder, console=Console(quiet=True))


def test_a_damaged_result_says_which_file_to_remove(finished, tmp_path):
    study, _, _ = finished
    path = result_path(tmp_path, "drift", 0)
    path.parent.mkdir(parents=True)
    path.write_text('{"arm": "drift"')
    with pytest.raises(FileFormatError, match=r"drift-seed0\.json is not a valid study run.*remove it"):
        run_study(study, tmp_path, console=Console(quiet=True))


def test_a_failed_run_is_reported_with_its_output_and_stops_those_that_wait_for_it(tmp_path):
    study = StudySettings.from_json({**TINY, "seeds": [0], "arms": ["fixed", "drift"]})
    study = replace(study, training={**study.training, "drift_top_k": 65})
    with pytest.raises(
        PruneOPDError, match=r"2 of 2 runs.*drift with seed 0.*Its output:\ntop_k must lie in 1 to 64[^\n]*$"
    ):
        run_study(study, tmp_path, console=Console(quiet=True))
    assert not list((tmp_path / "runs").glob("*"))


# The arm began when its source had run, and failed with the words of another setting
def test_a_source_that_keeps_less_than_drift_min_length_is_refused_with_arm_length_and_setting(tmp_path):
    arms = {"drift": None, "random": {"training": {"drift_min_length": 47}}}
    study = StudySettings.from_json({**TINY, "seeds": [0], "arms": arms})
    words = (
        r"the arm 'random' cannot have the mean length [\d.]+ that 'drift' kept: .*\(47; .* drift_min_length\)[^\n]*$"
    )
    for _ in ("after the source has run", "before anything is run"):
        with pytest.raises(ConfigError, match=words):
            run_study(study, tmp_path, console=Console(quiet=True))
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["drift-seed0.json"]
    arms["drift"] = {"training": {"max_completion_length": 40}}
    with pytest.raises(ConfigError, match=r"the arm 'random': .*\(47; .* drift_min_length\).*got 40"):
        StudySettings.from_json({**TINY, "arms": arms})


@pytest.mark.slow
def test_a_worker_ends_when_its_parent_is_killed(tmp_path):
    """Killed as the system kills: without a chance to clean up."""
    config = {**TINY, "seeds": [0], "arms": ["drift"], "budgets": {"steps": 100_000}}
    (tmp_path / "study.yaml").write_text(json.dumps(config))  # JSON is YAML
    parent = subprocess.Popen(
        [sys.executable, "-m", "prune_opd_hf.cli", "study", "--config", str(tmp_path / "study.yaml")],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        children = wait_for(lambda: children_of(parent.pid), 60)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert wait_for(lambda: not any(is_alive(child) for child in children), 60)
    finally:
        parent.kill()
        parent.wait()


def children_of(pid):
    lists = Path(f"/proc/{pid}/task").glob("*/children")  # one a thread
    return [int(word) for file in lists for word in file.read_text().split()]


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError("it did not happen in time")


def test_processes_are_stopped_when_the_context_is_left_and_no_more_are_started(tmp_path, monkeypatch):
    module = tmp_path / "sleeper.py"
    module.write_text(
        "import time\nprint('no json', flush=True)\nprint('{\"hello\": 1}', flush=True)\ntime.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    messages = Queue()
    with ThreadPoolExecutor() as threads, Processes() as processes:
        future = threads.submit(processes.run, "sleeper", "", messages.put)
        assert messages.get(timeout=60) == {"hello": 1}
        started = time.monotonic()
    assert time.monotonic() - started < 30
    with pytest.raises(PruneOPDError, match="no json"):
        future.result()
    with pytest.raises(PruneOPDError, match="stopped before it began"):
        processes.run("sleeper", "", messages.put)


def test_a_process_that_fails_says_so_with_its_output():
    with Processes() as processes, pytest.raises(PruneOPDError, match="No module named"):
        processes.run("this_module.does_not_exist", "", print)


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert main(["study", "--config", str(tmp_path / "none.yaml")]) == 2
    (tmp_path / "bad.yaml").write_text("model_name_or_path: embedded\n")
    assert main(["study", "--config", str(tmp_path / "bad.yaml")]) == 2
    assert "teacher_model_name_or_path: field required" in capsys.readouterr().err
    (tmp_path / "good.yaml").write_text(json.dumps(TINY))
    assert main(["study", "--config", str(tmp_path / "good.yaml"), "--processes", "0"]) == 2
