"""What a user sees of a run: readable lines, rollouts on disk."""

import torch
from trainer_helpers import make_trainer

from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.training.run_output import progress_line

VOCABULARY = (
    "prune/overlap prune/overlap_by_position/00000 prune/reliability prune/effective_length_mean prune/effective_length_max "
    "prune/stopped_share prune/kept_tokens prune/saved_tokens budget/length budget/hit_share time/generate time/teacher "
    "time/update reward/mean kl/topk kl/sampled student/entropy student/topk_mass clip_share skipped/nonfinite skipped/no_weight"
).split()


def test_a_log_line_has_the_whole_vocabulary_and_the_terminal_one_readable_line(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert [name for name in VOCABULARY if name not in logged] == []
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(" | ")[0] for line in lines] == ["step 1/2", "step 2/2"]
    assert all("overlap" in line and "tokens" in line and "generate" in line for line in lines)


def test_a_loss_or_divergence_that_is_0_when_rounded_has_no_sign():
    line = progress_line({"loss": -4e-5, "kl/sampled": -4e-4}, 1, 2)
    assert line == "step 1/2 | loss 0.0000 | kl 0.000"
    assert progress_line({"loss": -6e-5}, 1, 2) == "step 1/2 | loss -0.0001"


def test_rollouts_of_chosen_steps_are_stored_and_completions_shown(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path, max_steps=4, save_rollouts_steps=2, log_completions=True, num_completions_to_print=1
    )
    trainer.train()
    stored = sorted((tmp_path / "run" / "rollouts").iterdir())
    assert [path.name for path in stored] == ["step-000002.safetensors", "step-000004.safetensors"]
    assert torch.equal(Rollouts.load(stored[1]).response_ids, trainer.step.rollouts.response_ids)
    assert capsys.readouterr().out.count("Completions of step") == 4


def test_rollouts_and_evaluations_that_take_long_have_a_bar(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("prune_opd_hf.training.rollout_generation.SECONDS_BEFORE_BAR", 0)
    make_trainer(tmp_path, max_steps=1, disable_tqdm=False, eval_strategy="steps", eval_steps=1).train()
    shown = capfd.readouterr().err
    assert "rollouts of step 1:" in shown
    assert "evaluation:" in shown
