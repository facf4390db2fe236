"""Which checkpoints count as complete, and a disk that does not hold them."""

import errno
import shutil
from collections import namedtuple

import peft
import pytest
import torch
from safetensors import SafetensorError
from trainer_helpers import make_trainer, settings
from transformers import Trainer

from prune_opd_hf.errors import DiskFullError, FileFormatError
from prune_opd_hf.tasks import load_student
from prune_opd_hf.training.checkpoints import (
    ProcessState,
    TrainingState,
    check_disk,
    last_complete_checkpoint,
)
from prune_opd_hf.training.metrics import MetricMeans, TokenCounts
from prune_opd_hf.training.safeguards import SafeguardsState


def state(step):
    return TrainingState(
        pruning={"length": step, "misses": 0},
        counts=TokenCounts(8, 80, 40, 20),
        safeguards=SafeguardsState(nonfinite=1, capped_shares=[0.5]),
        phase_seconds={"generate": 1.5},
        last_logged_step=step,
        processes=[ProcessState(MetricMeans({"a": 1 / 3}, {"a": 1.0}), 0.25)],
        trained_weights=7,
    )


def checkpoint(folder, step, *, trainer_state="{}", ours=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if ours:
        state(step).save(path)
    if trainer_state is not None:
        (path / "trainer_state.json").write_text(trainer_state)
    return path


def test_the_newest_complete_one_is_found_by_number_not_by_name(tmp_path):
    expected = checkpoint(tmp_path, 100)
    checkpoint(tmp_path, 99)
    checkpoint(tmp_path, 101, trainer_state=None)
    checkpoint(tmp_path, 102, trainer_state='{"global_step": 1')
    checkpoint(tmp_path, 103, ours=False)
    (tmp_path / "checkpoint-last").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(expected)
    assert TrainingState.load(expected) == state(100)


def test_there_may_be_none(tmp_path):
    assert last_complete_checkpoint(tmp_path / "missing") is None


def test_a_state_cut_short_is_refused(tmp_path):
    path = checkpoint(tmp_path, 1)
    text = (path / "prune_opd_state.json").read_text()
    for end in range(len(text) - 2):
        (path / "prune_opd_state.json").write_text(text[:end])
        with pytest.raises(FileFormatError, match="not a valid training state"):
            TrainingState.load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"misses": 0', '"misses": NaN'),
        ('"kept": 40', '"kept": "40"'),
        ('"last_logged_step": 1', '"last_logged_step": null'),
    ],
)
def test_a_state_with_a_field_of_a_wrong_type_is_refused_in_one_line(tmp_path, old, new):
    path = checkpoint(tmp_path, 1)
    text = (path / "prune_opd_state.json").read_text()
    assert old in text
    (path / "prune_opd_state.json").write_text(text.replace(old, new))
    with pytest.raises(FileFormatError) as refusal:
        TrainingState.load(path)
    assert "\n" not in str(refusal.value)
    assert last_complete_checkpoint(tmp_path) is None


# ---------------------------------------------------------------------- a full disk

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        ({"save_strategy": "no"}, 1),  # the student at the end
        ({"save_strategy": "steps", "save_only_model": True}, 2),  # and a checkpoint
        ({"save_strategy": "steps"}, 4),  # with two moments of AdamW
        ({"save_strategy": "steps", "optim": "adamw_torch"}, 4),
        ({"save_strategy": "steps", "optim": "sgd"}, 2),  # which keeps nothing
        ({"save_strategy": "steps", "optim": "adafactor"}, 2),
        ({"save_strategy": "no", "save_dtype": "bfloat16"}, 0.5),
        ({"save_strategy": "steps", "save_dtype": "bfloat16"}, 3.5),  # checkpoints are as trained
        ({"save_strategy": "steps", "teacher_model_kind": "ema"}, 5),  # and the averages
        ({"save_strategy": "steps", "teacher_model_kind": "ema", "save_only_model": True}, 2),
    ],
)
def test_a_disk_must_hold_the_student_and_one_checkpoint(tmp_path, monkeypatch, changes, weights):
    model, args = load_student(), settings(tmp_path, **changes)
    needed = int(weights * 4) * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, needed))
    check_disk(model, args)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, needed - 1))
    with pytest.raises(DiskFullError, match="make room, or choose another output_dir"):
        check_disk(model, args)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_of_an_adapter_the_adapter_alone_is_saved(tmp_path, monkeypatch):
    model = peft.get_peft_model(load_student(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    needed = 4 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, needed))
    check_disk(model, settings(tmp_path, save_strategy="steps"))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, needed - 1))
    with pytest.raises(DiskFullError):
        check_disk(model, settings(tmp_path, save_strategy="steps"))


def test_what_an_optimizer_of_the_caller_keeps_is_not_counted(tmp_path, monkeypatch):
    model = load_student()
    needed = 2 * 4 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, needed))
    args = settings(tmp_path, save_strategy="steps")
    check_disk(model, args, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(DiskFullError):
        check_disk(model, args)


def test_a_disk_without_room_is_refused_at_set_up(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 0))
    with pytest.raises(DiskFullError, match=r"0\.00 GB free"):
        make_trainer(tmp_path)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("_save", OSError(errno.ENOSPC, "No space left on device")),
        ("_save", SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
        ("_save_optimizer_and_scheduler", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")),
    ],
)
def test_a_disk_that_fills_up_stops_the_run_in_one_line_and_leaves_the_last_checkpoint(
    tmp_path, monkeypatch, method, error
):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    whole = getattr(Trainer, method)

    def fill_up(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise error
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, method, fill_up)
    with pytest.raises(
        DiskFullError, match="No space left on device; nothing was saved: make room and go on with resume"
    ) as stop:
        trainer.train()
    assert len(str(stop.value).splitlines()) == 1
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")


def test_other_faults_of_writing_keep_their_name(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Trainer, "_save", fail)
    with pytest.raises(PermissionError):
        trainer.save_model()
