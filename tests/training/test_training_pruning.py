"""Truncation that does not look at drift: its lengths, and that a run really ends its rows there."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer_helpers import make_trainer, prompts_of
from trainer_helpers import settings as settings_of_run

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.training.pruning import PRUNING, FixedLength, Pruning, RandomLength, stop_probability

BOUNDS = st.tuples(st.integers(1, 30), st.integers(0, 80), st.floats(0.0, 1.0)).map(
    lambda drawn: (drawn[0] + drawn[2] * drawn[1], drawn[0], drawn[0] + drawn[1])
)  # mean, minimum, maximum


@given(BOUNDS)
def test_the_clipped_geometric_length_has_the_wanted_mean(bounds):
    mean, minimum, maximum = bounds
    stop = stop_probability(mean, minimum, maximum)
    expected, alive = 0.0, 1.0  # term by term: each length with its probability, the rest at the maximum
    for length in range(minimum, maximum):
        expected += length * alive * stop
        alive *= 1 - stop
    assert math.isclose(expected + maximum * alive, mean, rel_tol=1e-6)


@settings(max_examples=20)
@given(BOUNDS, st.integers(0, 5), st.integers(0, 3))
def test_random_lengths_depend_on_seed_step_and_process_alone_and_keep_their_bounds(bounds, step, process):
    mean, minimum, maximum = bounds
    plans = [RandomLength(mean, minimum=minimum, maximum=maximum, seed=3) for _ in range(2)]
    plans[1].row_limits(7, step=99, process=1)  # drawing before changes nothing
    first, second = (plan.row_limits(50, step=step, process=process) for plan in plans)
    assert torch.equal(first, second)
    assert minimum <= int(first.min()) <= int(first.max()) <= maximum


def test_other_steps_and_processes_draw_other_lengths():
    pruning = RandomLength(30, minimum=1, maximum=100, seed=0)
    draws = {
        tuple(pruning.row_limits(20, step=step, process=process).tolist()) for step in (0, 1) for process in (0, 1)
    }
    assert len(draws) == 4


@pytest.mark.parametrize("mean", [3.0, 101.0])
def test_a_mean_outside_the_bounds_is_refused(mean):
    with pytest.raises(ConfigError, match="pruning_length must lie between"):
        RandomLength(mean, minimum=4, maximum=100, seed=0)


def kept(*lengths):
    """What a step tells a way of pruning, where only the lengths matter."""
    return torch.tensor(lengths), torch.tensor(lengths), torch.zeros(len(lengths), dtype=torch.bool)


def test_matching_what_is_kept_moves_the_lengths_and_resumes():
    pruning = FixedLength(40, minimum=1, maximum=100, match="kept")
    pruning.update(*kept(6, 14))  # (40 / 10) ** 0.5 = 2
    assert pruning.row_limits(1, step=0, process=0).tolist() == [80]
    resumed = FixedLength(40, minimum=1, maximum=100, match="kept")
    resumed.load_state_dict(pruning.state_dict())
    assert resumed.mean == 80
    still = FixedLength(40, minimum=1, maximum=100)
    still.update(*kept(10))
    assert still.mean == 40
    with pytest.raises(ConfigError, match="resume with the settings"):
        still.load_state_dict({"mean": 200.0})


@pytest.mark.parametrize("saved", PRUNING)
@pytest.mark.parametrize("now", PRUNING)
def test_the_state_of_another_way_of_pruning_is_refused(tmp_path, saved, now):
    def pruning(name):
        length = {"pruning_length": 6} if PRUNING[name].needs_length else {}
        return settings_of_run(tmp_path, pruning=name, **length).make_pruning()

    state = pruning(saved).state_dict()
    if state.keys() == pruning(now).state_dict().keys():
        pruning(now).load_state_dict(state)
    else:
        with pytest.raises(ConfigError, match="resume with the settings"):
            pruning(now).load_state_dict(state)


def test_a_further_way_of_pruning_is_one_class_under_its_name(tmp_path, monkeypatch):
    class EveryOtherRow(Pruning):
        """Truncates every other row at 3 tokens."""

        cap = 14

        @classmethod
        def from_config(cls, args):
            return cls()

        def row_limits(self, rows, *, step, process):
            return torch.tensor([3, 14] * (rows // 2))

        def stopped(self, rollouts, cap):
            return torch.tensor([reason == "length" for reason in rollouts.stop_reason])

    monkeypatch.setitem(PRUNING, "every_other", EveryOtherRow)
    trainer = make_trainer(tmp_path, pruning="every_other", max_steps=1)
    trainer.train()
    lengths = trainer.generate_rollouts(prompts_of(trainer, 8)).lengths
    assert int(lengths[::2].max()) == 3 < int(lengths[1::2].max())
    assert trainer.counts.saved > 0


def test_a_fixed_length_ends_every_row_there_and_weigh_all_tokens_alike(tmp_path):
    trainer = make_trainer(tmp_path, pruning="fixed", pruning_length=5)
    rollouts = trainer.generate_rollouts(prompts_of(trainer, 8))
    for length, reason in zip(rollouts.lengths.tolist(), rollouts.stop_reason, strict=True):
        assert (length, reason) == (5, "length") or (length < 5 or reason == "eos")
    assert "length" in rollouts.stop_reason
    assert torch.equal(trainer.objective.weights(rollouts), rollouts.response_mask.float())


def test_random_lengths_end_each_row_at_its_own_and_no_forward_pass_goes_beyond(tmp_path):
    trainer = make_trainer(tmp_path, pruning="random", pruning_length=6, generation_batch_size=5)
    limits = trainer.pruning.row_limits(12, step=0, process=0).tolist()
    rows_stepped = []
    trainer.model.register_forward_hook(
        lambda module, args, kwargs, output: rows_stepped.append(
            kwargs["input_ids"].shape[0] * (kwargs["input_ids"].shape[1] == 1)
        ),
        with_kwargs=True,
    )
    rollouts = trainer.generate_rollouts(prompts_of(trainer, 12))
    lengths = rollouts.lengths.tolist()
    assert len(set(limits)) > 3
    for length, limit, reason in zip(lengths, limits, rollouts.stop_reason, strict=True):
        assert length == limit if reason == "length" else (length <= limit and reason == "eos")
    # A row's first token comes with the reading of its prompt, every further one from one row of one forward pass, and there was no
    # other: rows leave at their limit.
    assert sum(rows_stepped) == sum(length - 1 for length in lengths)


def test_a_run_with_random_lengths_resumes_exactly(tmp_path):
    changes = {"pruning": "random", "pruning_length": 6, "pruning_match": "kept"}
    whole = make_trainer(tmp_path / "whole", max_steps=4, **changes)
    whole.train()
    make_trainer(tmp_path / "parts", max_steps=2, save_strategy="steps", save_steps=2, **changes).train()
    resumed = make_trainer(tmp_path / "parts", max_steps=4, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.counts == whole.counts
    assert resumed.pruning.mean == whole.pruning.mean != 6
    theirs = dict(whole.model.named_parameters())
    assert all(torch.equal(weights, theirs[name]) for name, weights in resumed.model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pruning": "fixed"}, "pruning='fixed' needs pruning_length"),
        ({"pruning": "drift", "pruning_length": 3}, "pruning_length is for pruning = fixed or random"),
        ({"pruning": "fixed", "pruning_length": 15}, "pruning_length must lie between"),
        ({"pruning": "random", "pruning_length": 3, "drift_min_length": 4}, "shortest truncation length"),
        ({"pruning": "fixed", "pruning_length": 3, "pruning_match": "both"}, "pruning_match must be one of cut, kept"),
    ],
)
def test_settings_of_lengths_that_contradict_each_other_are_refused(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        make_trainer(tmp_path, **changes)
