"""What a user sees of a run: readable lines, completions with the drifted tail marked, rollouts on disk."""

import io

import torch
from rich.console import Console
from trainer_helpers import make_trainer, prompts_of

from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.tasks import load_tokenizer
from prune_opd_hf.training.run_output import completions_table, marked_completion, progress_line

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


def test_the_drifted_tail_is_marked_where_reliability_falls_and_where_it_is_used_up(tmp_path):
    trainer = make_trainer(tmp_path)
    tokenizer = load_tokenizer()
    rollouts = trainer.generate_rollouts(prompts_of(trainer, 8))
    row = next(row for row, reason in enumerate(rollouts.stop_reason) if reason == "drift")
    reliability = rollouts.reliability[row][rollouts.response_mask[row]]
    ids = rollouts.response_ids[row][rollouts.response_mask[row]]
    first = int((reliability < 1).int().argmax())
    text = marked_completion(rollouts, row, tokenizer)
    before, _, tail = text.plain.partition(" ⟦ ")
    middle, _, lost = tail.partition(" ⟧ ")
    assert before == tokenizer.decode(ids[:first])
    assert lost == tokenizer.decode(ids[-1:])  # a row that drift stopped ends at its exhausted token
    assert middle == tokenizer.decode(ids[first:-1])
    assert [str(span.style) for span in text.spans] == ["yellow", "red"]


def test_the_table_shows_prompts_as_they_are(tmp_path):
    trainer = make_trainer(tmp_path)
    rollouts = trainer.generate_rollouts(prompts_of(trainer, 4))
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(completions_table(rollouts, load_tokenizer(), step=7, rows=2))
    shown = console.export_text()
    assert "Completions of step 7" in shown
    assert all(reason in shown for reason in set(rollouts.stop_reason[:2]))


def test_rollouts_of_chosen_steps_are_stored_and_completions_shown(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path, max_steps=4, save_rollouts_steps=2, log_completions=True, num_completions_to_print=1
    )
    trainer.train()
    stored = sorted((tmp_path / "run" / "rollouts").iterdir())
    assert [path.name for path in stored] == ["step-000002.safetensors", "step-000004.safetensors"]
    assert torch.equal(Rollouts.load(stored[1]).response_ids, trainer.step.rollouts.response_ids)
    assert capsys.readouterr().out.count("Completions of step") == 4
