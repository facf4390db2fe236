"""Which checkpoints count as complete."""

import pytest

from prune_opd_hf.errors import FileFormatError
from prune_opd_hf.training.checkpoints import (
    ProcessState,
    TrainingState,
    last_complete_checkpoint,
    load_state,
    save_state,
)
from prune_opd_hf.training.metrics import TokenCounts
from prune_opd_hf.training.safeguards import SafeguardsState


def state(step):
    return TrainingState(
        pruning={"length": step, "misses": 0},
        counts=TokenCounts(8, 80, 40, 20),
        safeguards=SafeguardsState({"nonfinite": 1}, 0, 0, [0.5], []),
        phase_seconds={"generate": 1.5},
        last_logged_step=step,
        processes=[ProcessState({"sums": {"a": 1 / 3}, "weights": {"a": 1.0}, "maxima": {}}, 0.25)],
    )


def checkpoint(folder, step, *, trainer_state="{}", ours=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if ours:
        save_state(path, state(step))
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
    assert load_state(expected) == state(100)


def test_there_may_be_none(tmp_path):
    assert last_complete_checkpoint(tmp_path / "missing") is None


def test_a_state_cut_short_is_refused(tmp_path):
    path = checkpoint(tmp_path, 1)
    text = (path / "prune_opd_state.json").read_text()
    for end in range(len(text) - 2):
        (path / "prune_opd_state.json").write_text(text[:end])
        with pytest.raises(FileFormatError, match="complete checkpoint"):
            load_state(path)


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
        load_state(path)
    assert "\n" not in str(refusal.value)
    assert last_complete_checkpoint(tmp_path) is None
