"""--quiet: results, warnings and errors alone; without it, every command that takes long shows how far it is."""

import json

import pytest
from datasets import enable_progress_bars
from transformers.utils import logging

from prune_opd_hf.cli import main
from prune_opd_hf.errors import ConfigError
from prune_opd_hf.tasks import ChainTask

EMBEDDED = "--model_name_or_path embedded --teacher_model_name_or_path embedded".split()
SHORT = "--num_generations 2 --max_completion_length 16 --drift_top_k 2".split()


@pytest.fixture(autouse=True)
def _bars_again():
    yield
    enable_progress_bars()
    logging.enable_progress_bar()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps({'prompt': each.prompt})}\n" for each in ChainTask().problems(8, seed=0)))
    return ["--dataset_name", str(path)]


def run(capfd, command, *more):
    assert main([*command, *more]) == 0
    return capfd.readouterr()


def test_an_evaluation_shows_its_samples_or_its_table_alone(capfd, tmp_path):
    command = "evaluate embedded --benchmarks chain --limit 2 --num_generations 2 --max_completion_length 16".split()
    assert "chain: 100%" in run(capfd, command, "--output_dir", str(tmp_path / "shown")).err
    out, err = run(capfd, command, "--output_dir", str(tmp_path / "quiet"), "--quiet")
    assert err == ""
    assert out.startswith("|")
    assert out.endswith("graded.jsonl has each with its gold and verdict\n")


def test_a_training_shows_its_steps_or_where_the_student_lies_alone(capfd, tmp_path, prompts):
    command = [
        "train",
        *EMBEDDED,
        *prompts,
        *SHORT,
        *"--use_cpu true --max_steps 2 --per_device_train_batch_size 4".split(),
    ]
    command += "--report_to none --save_strategy no --drift_min_length 0 --budget_minimum 4".split()
    out, err = run(capfd, command, "--output_dir", str(tmp_path / "shown"))
    assert "step 2/2 | loss" in out
    assert "2/2 [" in err
    out, err = run(capfd, command, "--output_dir", str(tmp_path / "quiet"), "--quiet")
    assert (out, err) == (f"The student lies in {tmp_path / 'quiet'}\n", "")


def test_a_preflight_shows_its_rollouts_or_its_report_alone(capfd, tmp_path, prompts, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    command = ["preflight", *EMBEDDED, *prompts, *SHORT, "--num_prompts", "2"]
    shown, quiet = (
        run(capfd, command, "--output_dir", str(tmp_path / name), *more).out
        for name, more in (("shown", ()), ("quiet", ["--quiet"]))
    )
    assert "trying settings" in shown
    assert "trying settings" not in quiet
    assert "Preflight" in quiet


@pytest.mark.parametrize("quiet", [True, False])
def test_a_study_gets_a_console_that_shows_or_does_not(monkeypatch, quiet):
    seen = {}

    def run_study(*args, **settings):
        seen.update(settings)
        raise ConfigError("caught")

    monkeypatch.setattr("prune_opd_hf.study.run_study", run_study)
    config = "examples/configs/study_embedded.yaml"
    assert main(["study", "--config", config, "--output_dir", "my runs/a", *["--quiet"] * quiet]) == 2
    assert seen["console"].quiet is quiet
    assert seen["command"] == f"prune-opd study --config {config} --output_dir 'my runs/a'"


def test_errors_are_shown_all_the_same(capfd, tmp_path):
    assert main(["evaluate", "embedded", "--benchmarks", str(tmp_path / "none.json"), "--quiet"]) == 2
    assert "none.json" in capfd.readouterr().err
