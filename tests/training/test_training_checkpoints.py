"""Which checkpoints count as complete."""

import json

import pytest

from prune_opd_hf.errors import FileFormatError
from prune_opd_hf.training.checkpoints import last_complete_checkpoint, load_state, save_state


def checkpoint(folder, step, *, trainer_state="{}", ours=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if ours:
        save_state(path, {"budget": {"length": step}})
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
    assert load_state(expected) == {"budget": {"length": 100}}


def test_there_may_be_none(tmp_path):
    assert last_complete_checkpoint(tmp_path / "missing") is None


def test_a_state_cut_short_is_refused(tmp_path):
    path = checkpoint(tmp_path, 1)
    text = json.dumps({"budget": 1})
    for cut in range(len(text) - 1):
        (path / "prune_opd_state.json").write_text(text[:cut])
        with pytest.raises(FileFormatError, match="not a complete checkpoint"):
            load_state(path)
