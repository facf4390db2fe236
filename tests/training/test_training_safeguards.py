"""What would do harm or nothing is skipped and counted, warned of, or ends the run with a checkpoint."""

import math

import pytest
import torch
from trainer_helpers import make_trainer
from transformers import TrainerCallback

from prune_opd_hf.errors import TrainingStoppedError
from prune_opd_hf.training.checkpoints import last_complete_checkpoint
from prune_opd_hf.training.metrics import StepTotals, TokenCounts
from prune_opd_hf.training.safeguards import Safeguards


class Poison(TrainerCallback):
    """Makes the gradient of some steps NaN."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.hook = None
        if state.global_step in self.steps:
            weight = next(model.parameters())
            self.hook = weight.register_hook(lambda gradient: gradient * math.nan)

    def on_step_end(self, *args, **kwargs):
        if self.hook is not None:
            self.hook.remove()


def weights_of(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_a_step_with_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(tmp_path, caplog):
    states = {}

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            states[state.global_step] = torch.cat([p.detach().flatten() for p in model.parameters()])

    trainer = make_trainer(tmp_path, callbacks=[Poison({1}), Remember()])
    trainer.train()
    assert torch.equal(states[1], states[2])  # the second step was poisoned
    assert not torch.equal(states[2], states[3])
    assert torch.isfinite(weights_of(trainer)).all()
    assert trainer.state.log_history[2]["skipped/nonfinite"] == 1.0
    assert "step 2 has a gradient that is not finite" in caplog.text


def test_too_many_skipped_steps_end_the_run_with_a_checkpoint_of_good_weights(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[Poison({2, 3})], max_steps=6, max_skipped_steps=2)
    with pytest.raises(TrainingStoppedError, match="2 steps in a row were skipped"):
        trainer.train()
    assert trainer.state.global_step == 4
    checkpoint = last_complete_checkpoint(tmp_path / "run")
    assert checkpoint.endswith("checkpoint-4")
    saved = trainer.model.__class__.from_pretrained(checkpoint)
    assert all(torch.isfinite(parameter).all() for parameter in saved.parameters())
    assert trainer.train(resume_from_checkpoint=True).global_step == 6  # the same trainer goes on


def test_all_rows_drifting_at_once_without_a_base_weight_is_no_silent_zero_update(tmp_path, caplog):
    # Every token is an event and one event exhausts: each row keeps its first token, whose reliability is 0.
    trainer = make_trainer(tmp_path, drift_threshold=1.0, drift_top_k=16, drift_weight_drop=1.0, drift_weight_base=0.0)
    before = weights_of(trainer).clone()
    trainer.train()
    assert torch.equal(weights_of(trainer), before)
    assert (trainer.safeguards.seen.nonfinite, trainer.safeguards.seen.no_weight) == (0, 3)
    assert "no token with a weight" in caplog.text
    assert "rollouts of step 1 drifted" in caplog.text
    with_base = make_trainer(tmp_path, drift_threshold=1.0, drift_top_k=16, drift_weight_drop=1.0)
    with_base.train()
    assert not torch.equal(weights_of(with_base), before)


def test_weights_that_are_not_finite_stop_the_run_and_say_where_the_last_checkpoint_is(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.model.norm.weight.fill_(math.inf)

    trainer = make_trainer(tmp_path, callbacks=[Break()])
    with pytest.raises(TrainingStoppedError, match=r"NaN or infinite logits .* the last checkpoint is .*checkpoint-2"):
        trainer.train()


def ten_rows(capped):
    """The totals of a step of 10 rows, of which so many met the longest length."""
    return StepTotals(TokenCounts(rollouts=10, kept=100), drifted=0, capped=capped, weight_sum=100.0)


def test_length_explosion_is_growth_to_the_cap_not_a_cap_that_always_bound():
    bound, grown = Safeguards(0, "stop"), Safeguards(0, "stop")
    for step in range(1, 30):
        bound.watch_rollouts(step, ten_rows(capped=10))
        grown.watch_rollouts(step, ten_rows(capped=1 if step < 10 else 9))
        assert (grown.stop_reason is not None) == (step >= 14)  # the fifth step in a row at 90%
    assert bound.stop_reason is None
    with pytest.raises(TrainingStoppedError, match=r"grown to the cap.*no checkpoint was saved"):
        grown.raise_if_stopped(None)
    warning = Safeguards(0, "warn")
    for step in range(1, 14):
        warning.watch_rollouts(step, ten_rows(capped=1 if step < 10 else 9))
    with pytest.warns(UserWarning, match="grown to the cap"):
        warning.watch_rollouts(14, ten_rows(capped=9))


def test_a_leak_is_warned_of_once():
    guard = Safeguards(0, "warn")
    for _ in range(12):
        guard.watch_mass(0.95)
    guard.watch_mass(0.7)
    guard.watch_mass(0.7)
    guard.watch_mass(0.7)  # the last five: .95, .95 and three of .7, whose mean of .8 is above .8 x .95 = .76
    with pytest.warns(UserWarning, match="held 95% of its mass inside it when the run began and holds 75%"):
        guard.watch_mass(0.7)
    guard.watch_mass(0.1)
    guard.watch_mass(None)


def test_a_gradient_of_zero_is_said_but_not_skipped(caplog):
    guard = Safeguards(1, "warn")
    assert not guard.judge(1, 0.0, weight_sum=3.0)
    assert "exactly 0" in caplog.text
    assert guard.stop_reason is None


def test_counts_survive_a_checkpoint():
    guard, resumed = Safeguards(3, "stop"), Safeguards(3, "stop")
    guard.judge(1, math.nan, 1.0)
    guard.judge(2, 1.0, 0.0)
    resumed.seen = guard.seen
    assert resumed.judge(3, math.inf, 1.0)
    assert resumed.stop_reason is not None
    assert resumed.metrics() == {"skipped/nonfinite": 2.0, "skipped/no_weight": 1.0}
