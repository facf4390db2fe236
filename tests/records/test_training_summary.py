"""The training summary: plain, publishable, atomic, versioned."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from prune_opd_hf.errors import ConfigError, FileFormatError
from prune_opd_hf.records.files import publishable
from prune_opd_hf.records.training_summary import SUMMARY_FILE, TrainingSummary


def small_summary(**changes) -> TrainingSummary:
    values = {
        "dataset": "org/prompts",
        "loss": "topk_policy_gradient",
        "pruning": "drift",
        "steps": 3,
        "rollouts": 24,
        "generated_tokens": 900,
        "kept_tokens": 600,
        "saved_tokens": 300,
        "wall_seconds": 12.5,
    }
    return TrainingSummary(**{**values, **changes})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/models/qwen", "qwen (local)"),
        ("~/models/qwen/", "qwen (local)"),
        ("./runs/a", "a (local)"),
        ("../a", "a (local)"),
        ("C:\\models\\qwen", "qwen (local)"),
        ("\\\\host\\share\\qwen", "qwen (local)"),
        (Path("/data/prompts.jsonl"), "prompts.jsonl (local)"),
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B"),
        ("/no_think", "/no_think"),
        ("... and then", "... and then"),
        ("~5 tokens", "~5 tokens"),
        (np.float32(0.5), 0.5),
        (torch.tensor(3), 3),
        (torch.tensor([1.0, float("inf")]), [1.0, None]),
        (IntervalStrategy.STEPS, "steps"),
        ({3, 1, 2}, [1, 2, 3]),
        (object, "<class 'object'>"),
    ],
)
def test_a_value_becomes_plain_json_without_machine_paths(value, expected):
    assert publishable(value) == expected
    json.dumps(publishable(value), allow_nan=False)


def test_settings_named_like_secrets_are_left_out_at_any_depth_and_token_counts_stay():
    settings = {
        "hub_token": "a",
        "nested": [{"api_key": "b", "max_tokens": 5}],
        "pad_token_id": 0,
        "wandb_api_key": "c",
        "token": "d",
    }
    assert publishable(settings) == {"nested": [{"max_tokens": 5}], "pad_token_id": 0}


def test_training_arguments_enter_the_record_as_they_are(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), hub_token="hf_" + "x" * 34, report_to=[])
    text = small_summary(hyperparameters=arguments.to_dict()).to_json()
    assert str(tmp_path) not in text
    assert "hf_xxxx" not in text


def test_saved_and_loaded_is_the_same_record(tmp_path):
    summary = small_summary(
        student_base="org/base",
        history=({"step": 1, "reward/mean": float("nan"), "overlap": [0.5, 0.25]}, {"step": 2, "reward/mean": 0.1}),
        phase_seconds={"generate": 8.0, "update": 4.5},
        seeds={"data": 0},
    )
    summary.save(tmp_path)
    assert TrainingSummary.load(tmp_path) == summary
    assert TrainingSummary.load(tmp_path / SUMMARY_FILE).history[0]["reward/mean"] is None
    assert [path.name for path in tmp_path.iterdir()] == [SUMMARY_FILE]


def test_a_save_that_fails_leaves_the_old_record_whole(tmp_path, monkeypatch):
    old = small_summary(steps=1)
    old.save(tmp_path)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        small_summary(steps=2).save(tmp_path)
    assert TrainingSummary.load(tmp_path) == old
    assert [path.name for path in tmp_path.iterdir()] == [SUMMARY_FILE]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileFormatError, match=SUMMARY_FILE):
        TrainingSummary.load(tmp_path)


@pytest.mark.parametrize("change", [{"steps": -1}, {"wall_seconds": float("nan")}, {"dataset": " "}, {"loss": ""}])
def test_a_record_that_cannot_be_true_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        small_summary(**change)
