"""The trainer on the embedded task: what one step computes, what a resumed run repeats, what bad input says."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_model
from trainer_helpers import TASK, make_trainer, prompts_of, settings
from transformers import TrainingArguments

from prune_opd_hf.errors import ConfigError, InputError, VocabularyMismatchError
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.tasks import ChainTask, is_correct, load_student, load_teacher, load_tokenizer
from prune_opd_hf.training import PruneOPDTrainer
from prune_opd_hf.training.checkpoints import TrainingState
from prune_opd_hf.training.pair import warn_of_rounding


def slow_gradient(model, teacher, rollouts, weights, *, centered):
    """Σ over response tokens of L p~_j log(p_j/q_j) ∇ log p_j (minus the p~-weighted mean where centred) / tokens, row by row."""
    model.zero_grad()
    total = int(rollouts.response_mask.sum())
    for row in range(len(rollouts)):
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
        response = rollouts.response_ids[row][rollouts.response_mask[row]]
        ids = torch.cat([prompt, response]).unsqueeze(0)
        log_p = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            log_q = teacher(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for position in range(len(response)):
            candidates = rollouts.student_topk_ids[row, position]
            p, q = log_p[position, candidates], log_q[position, candidates]
            share = (p.exp() / p.exp().sum()).detach()
            ratio = (p - q).detach()
            if centered:
                ratio = ratio - (share * ratio).sum()
            (weights[row, position] * (share * ratio * p).sum() / total).backward(retain_graph=True)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("pruning", ["drift", "none"])
@pytest.mark.parametrize("centered", [True, False])
def test_the_gradient_of_a_step_is_the_written_formula_over_all_micro_batches(tmp_path, pruning, centered):
    trainer = make_trainer(tmp_path, pruning=pruning, loss_centered=centered)
    trainer.model.eval()  # no dropout here anyway; the slow loop must see the same
    samples, token_count = trainer.get_batch_samples(
        iter([prompts_of(trainer, 4), prompts_of(trainer, 8)]), 2, torch.device("cpu")
    )
    assert int(token_count) == sum(int(sample["rollouts"].response_mask.sum()) for sample in samples)
    whole = type(samples[0]["rollouts"]).cat([sample["rollouts"] for sample in samples])
    weights = whole.reliability + 0.5 if pruning == "drift" else torch.ones_like(whole.reliability)
    expected = slow_gradient(trainer.model, trainer.teacher.model, whole, weights, centered=centered)
    trainer.model.zero_grad()
    for sample in samples:
        trainer.compute_loss(trainer.model, sample, num_items_in_batch=token_count).backward()
    received = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    torch.testing.assert_close(received, expected, atol=2e-5, rtol=2e-4)


def test_with_the_whole_vocabulary_as_candidates_the_policy_gradient_is_the_reverse_kl(tmp_path):
    gradients = []
    for loss in ("topk_policy_gradient", "reverse_kl"):
        trainer = make_trainer(
            tmp_path, loss_type=loss, pruning="none", **({"loss_top_k": 64} if loss.startswith("topk") else {})
        )
        samples, count = trainer.get_batch_samples(iter([prompts_of(trainer, 4)]), 1, torch.device("cpu"))
        trainer.compute_loss(trainer.model, samples[0], num_items_in_batch=count).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("pruning", ["drift", "none"])
def test_fewer_slots_than_rollouts_change_neither_what_is_sampled_nor_what_is_recorded(tmp_path, pruning):
    trainers = [make_trainer(tmp_path, pruning=pruning, generation_batch_size=slots) for slots in (12, 3)]
    at_once, refilled = (trainer.generate_rollouts(prompts_of(trainer, 12)) for trainer in trainers)
    assert refilled.stop_reason == at_once.stop_reason
    for name, values in at_once.tensors().items():
        torch.testing.assert_close(refilled.tensors()[name], values, atol=1e-4, rtol=1e-4, msg=name)


def test_every_prompt_is_answered_num_generations_times(tmp_path):
    trainer = make_trainer(tmp_path, num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    rows = [tuple(row) for row in batch["input_ids"].tolist()]
    assert [rows[0]] * 4 == rows[:4]
    assert [rows[4]] * 4 == rows[4:]
    assert rows[0] != rows[4]


def weights_of(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


# 6 problems are 2 steps and a half: the run stops inside its second epoch. With 4 steps to a log line the checkpoint lies between
# two lines; with 3 updates of each batch it lies between two updates.
@pytest.mark.parametrize(
    ("problems", "changes"),
    [
        (6, {}),
        (32, {"logging_steps": 4, "max_steps": 8}),
        (32, {"num_iterations": 3, "loss_support": "union"}),
        (32, {"num_iterations": 3, "max_tokens_per_micro_batch": 60}),
        (32, {"loss_type": "reverse_kl", "max_tokens_per_micro_batch": 60}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, problems, changes):
    settings = {"max_steps": 6, "problems": problems, **changes}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    parts = {**settings, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path / "parts", **parts).train()
    if "logging_steps" in changes:  # back to step 2, in the middle of the first line
        shutil.rmtree(tmp_path / "parts" / "run" / "checkpoint-4")
    resumed = make_trainer(tmp_path / "parts", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert resumed.pruning.state_dict() == whole.pruning.state_dict()
    assert resumed.counts == whole.counts
    timed = ("time/", "train_")
    for ours, theirs in zip(resumed.state.log_history, whole.state.log_history, strict=True):
        for name, value in theirs.items():
            if not name.startswith(timed):
                assert ours[name] == value, name


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    finished = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    finished.train()
    resumed = make_trainer(tmp_path, max_steps=2)
    assert resumed.train(resume_from_checkpoint=True).global_step == 2
    assert torch.equal(weights_of(resumed), weights_of(finished))
    assert resumed.counts == finished.counts


# It ended in a KeyError of the optimizer's first step
def test_another_optimizer_than_the_checkpoints_is_refused_by_both_names(tmp_path):
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    resumed = make_trainer(tmp_path, max_steps=2, optim="adafactor")
    with pytest.raises(
        ConfigError, match=r"with the optimizer torch\..*AdamW, and this run has .*Adafactor \(optim=adafactor\)"
    ):
        resumed.train(resume_from_checkpoint=True)
    make_trainer(tmp_path, max_steps=2, optim="adamw_torch").train(
        resume_from_checkpoint=True
    )  # as the default, fused or not


def test_arguments_of_transformers_are_refused_with_the_name_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checker
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ConfigError, match=r"args must be a PruneOPDConfig, .* got TrainingArguments"):
        PruneOPDTrainer(
            load_student(), load_teacher(), args, TASK.dataset(8, seed=0), processing_class=load_tokenizer()
        )


# The run went on and moved no weight
def test_an_optimizer_of_other_weights_is_refused(tmp_path):
    student = load_student()
    mine, other = (torch.optim.SGD(model.parameters(), lr=0.1) for model in (student, load_student()))
    given = {"args": settings(tmp_path), "train_dataset": TASK.dataset(8, seed=0), "processing_class": load_tokenizer()}
    PruneOPDTrainer(student, load_teacher(), optimizers=(mine, None), **given)
    with pytest.raises(ConfigError, match="optimizers holds no weight that is trained"):
        PruneOPDTrainer(student, load_teacher(), optimizers=(other, None), **given)


def test_several_updates_share_one_batch_of_rollouts(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=2, max_steps=4, learning_rate=1e-2)
    trainer.train()
    assert trainer.counts.rollouts == 2 * 8
    first, second = (entry["clip_share"] for entry in trainer.state.log_history[:2])
    assert second > first == 0  # a second update moves away from the weights that generated
    prompts = [tuple(batch["input_ids"].flatten().tolist()) for batch in trainer.get_train_dataloader()]
    assert prompts[0:2] == prompts[2:4]  # two micro-batches make a step, which comes twice
    assert prompts[0:2] != prompts[4:6]


def test_another_number_of_processes_does_not_go_on_with_one_share_of_the_rollouts(tmp_path):
    several = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, max_steps=1, **several).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    state = TrainingState.load(checkpoint)
    replace(state, processes=2 * state.processes).save(checkpoint)  # as two processes leave it
    resumed = make_trainer(tmp_path, max_steps=2, **several)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.counts.rollouts == 8 + 8


@pytest.mark.parametrize(("limit", "kept"), [(2, [2, 3, 99]), (-1, [1, 2, 3, 99])])  # below 1 all, as in Transformers
def test_save_total_limit_counts_complete_checkpoints_only(tmp_path, limit, kept):
    foreign = tmp_path / "run" / "checkpoint-99"
    foreign.mkdir(parents=True)
    (foreign / "trainer_state.json").write_text("{")
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=limit).train()
    found = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert sorted(found) == [f"checkpoint-{step}" for step in kept]
    assert not (tmp_path / "run" / ".unfinished").exists()


def test_the_best_checkpoint_is_known_by_its_final_place(tmp_path):
    def compute_metrics(prediction):
        return {"score": -trainer.state.global_step}  # the first is the best

    trainer = make_trainer(
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.compute_metrics = compute_metrics
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "run" / "checkpoint-1"
    for path in (tmp_path / "run").glob("checkpoint-*"):
        assert ".unfinished" not in (path / "trainer_state.json").read_text()


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)  # its name before Transformers 6
def test_gradient_checkpointing_changes_no_weight(tmp_path):
    weights = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, gradient_checkpointing=checkpointing, max_steps=2)
        trainer.train()
        weights.append(weights_of(trainer))
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_an_adapter_learns_from_its_own_base_and_nothing_else_moves(tmp_path):
    peft = pytest.importorskip("peft")
    student = load_student()
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    trainer = PruneOPDTrainer(
        model=student,
        teacher_model=student,
        args=settings(tmp_path, loss_type="generalized_jsd", pruning="none", temperature=1.0),
        train_dataset=TASK.dataset(32, seed=0),
        processing_class=load_tokenizer(),
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    prompts = prompts_of(trainer, 4)
    rollouts = trainer.generate_rollouts(prompts)
    original = load_student()  # what the base was
    sequences, mask = rollouts.sequences, rollouts.sequence_mask.long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        log_q = original(sequences, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
    time = rollouts.response_ids.shape[1]
    expected = log_q[:, -time - 1 : -1].gather(-1, rollouts.response_ids.unsqueeze(-1)).squeeze(-1)
    there = rollouts.response_mask
    torch.testing.assert_close(rollouts.teacher_token_log_probs[there], expected[there], atol=1e-4, rtol=1e-4)
    assert float((rollouts.token_log_probs - rollouts.teacher_token_log_probs)[there].abs().max()) > 0.01
    adapter = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    for name, parameter in trainer.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")])
    moved = [not torch.equal(p, adapter[name]) for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert moved
    assert all(moved)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_the_head_of_a_teacher_below_an_adapter_is_read_without_the_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    tokens = {"eos": load_tokenizer().eos_token_id, "pad": load_tokenizer().pad_token_id}
    student = tiny_model("qwen3", 1, vocab_size=64, **tokens)
    before = student.get_output_embeddings().weight.detach().clone()
    lora = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = PruneOPDTrainer(
        model=student,
        teacher_model=student,
        args=settings(tmp_path, loss_type="reverse_kl"),
        train_dataset=TASK.dataset(8, seed=0),
        processing_class=load_tokenizer(),
        peft_config=lora,
    )
    assert torch.equal(trainer.teacher.head_parameters().weight, before)
    assert not torch.equal(trainer.objective.parts.head_parameters().weight, before)


@pytest.mark.parametrize(
    ("dtype", "rate", "warned"), [("bfloat16", 1e-5, True), ("bfloat16", 1e-3, False), ("float32", 1e-6, False)]
)
def test_16_bit_weights_with_a_small_learning_rate_are_warned_of(dtype, rate, warned):
    model = tiny_model("qwen3", 0).to(getattr(torch, dtype))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_of_rounding(model, rate)
    assert [("rounded away" in str(warning.message)) for warning in said] == [True] * warned
    weight = torch.tensor(0.01, dtype=torch.bfloat16)
    assert weight - 1e-5 == weight  # the reason: 1e-5 is less than .01 / 512


@pytest.mark.parametrize("loss_type", ["topk_policy_gradient", "generalized_jsd"])
def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path, loss_type):
    gradients = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, loss_type=loss_type, bf16=bf16, pruning="none")
        trainer.model = trainer.accelerator.prepare_model(trainer.model)
        rollouts = Rollouts.load(tmp_path / "r") if bf16 else trainer.generate_rollouts(prompts_of(trainer, 4))
        rollouts.save(tmp_path / "r")
        trainer.compute_loss(trainer.model, {"rollouts": rollouts}).backward()
        parameters = list(trainer.model.parameters())
        assert {parameter.dtype for parameter in parameters} == {torch.float32}
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    difference = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    assert 1e-4 < difference < 0.1  # bfloat16 keeps 8 bits: 0.4% a number


def test_tokens_that_the_teacher_does_not_know_are_never_sampled(tmp_path):
    tokens = {"eos": load_tokenizer().eos_token_id, "pad": load_tokenizer().pad_token_id}
    student = tiny_model("qwen3", 1, vocab_size=80, **tokens)
    with torch.no_grad():
        student.get_output_embeddings().bias[64:] += 30.0  # left alone, the student would say nothing else
    trainer = make_trainer(tmp_path, student, tiny_model("qwen3", 2, vocab_size=64, **tokens))
    rollouts = trainer.generate_rollouts(prompts_of(trainer, 8))
    assert int(rollouts.response_ids.max()) < 64
    trainer.train()


def test_a_student_whose_end_token_the_teacher_does_not_know_ends_where_both_can(tmp_path):
    pad, eos = load_tokenizer().pad_token_id, load_tokenizer().eos_token_id
    student = tiny_model("qwen3", 1, vocab_size=80, eos=70, pad=pad)
    teacher = tiny_model("qwen3", 2, vocab_size=64, eos=9, pad=pad)
    trainer = make_trainer(tmp_path, student, teacher)
    assert trainer.end_tokens.token_ids == (eos, 9)
    assert set(trainer.end_tokens.left_out) == {70}


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    newest = tmp_path / "run" / "checkpoint-2"
    state = (newest / "trainer_state.json").read_text()
    (newest / "trainer_state.json").write_text(state[: len(state) // 2])
    resumed = make_trainer(tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    (tmp_path / "run" / "checkpoint-1" / "prune_opd_state.json").unlink()
    (newest / "trainer_state.json").write_text("")
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        make_trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=True)


def test_pruning_generates_less_and_counts_what_it_left_out(tmp_path):
    counts = {}
    for pruning in ("drift", "none"):
        trainer = make_trainer(tmp_path, pruning=pruning, max_steps=1, budget_initial=14)
        trainer.train()
        counts[pruning] = trainer.counts
    assert counts["none"].saved == 0
    assert counts["none"].kept == counts["none"].generated
    assert counts["drift"].kept < counts["none"].kept
    assert counts["drift"].kept + counts["drift"].saved <= 14 * counts["drift"].rollouts


def test_without_pruning_the_cap_stays_where_it_is(tmp_path):
    trainer = make_trainer(tmp_path, pruning="none", budget_initial=6, budget_minimum=4, budget_patience=1)
    trainer.train()
    caps = [entry["budget/cap"] for entry in trainer.state.log_history if "loss" in entry]
    assert caps == [14.0] * 3
    assert trainer.pruning.cap == 14


def test_evaluate_hands_decoded_completions_and_rows_to_compute_metrics(tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["pairs"] = list(zip(prediction.predictions, prediction.label_ids, strict=True))
        right = [is_correct(c.text, row["answer"], ended=c.ended) for c, row in seen["pairs"]]
        return {"accuracy": np.float32(sum(right) / len(right)), "eval_rows": torch.tensor(len(right))}

    task = ChainTask()  # what the teacher was trained on, and always solves when it decodes greedily
    trainer = make_trainer(tmp_path, student=load_teacher(), eval_temperature=0.0, max_completion_length=40)
    trainer.compute_metrics = compute_metrics
    problems = task.dataset(20, seed=1, split="evaluation")
    metrics = trainer.evaluate(problems)
    assert metrics["eval_accuracy"] == 1.0
    assert metrics["eval_rows"] == 20
    json.dumps(metrics)  # as a checkpoint writes it; the types of NumPy and torch failed there
    assert [row["prompt"] for _, row in seen["pairs"]] == problems["prompt"][:]
    assert all(completion.ended and completion.tokens == task.clean_response_tokens for completion, _ in seen["pairs"])


def test_conversations_go_through_the_chat_template(tmp_path):
    tokenizer = load_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if shout %} , +1{% endif %}"
    rows = [{"prompt": [{"role": "user", "content": problem.prompt}]} for problem in TASK.problems(4, seed=0)]
    trainer = PruneOPDTrainer(
        load_student(),
        load_teacher(),
        settings(tmp_path, chat_template_kwargs='{"shout": true}'),
        Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    plain = tokenizer(rows[0]["prompt"][0]["content"] + " , +1", add_special_tokens=False)["input_ids"]
    assert trainer.train_dataset[0]["input_ids"] == plain


def test_long_prompts_are_dropped_and_counted_never_cut(tmp_path, caplog):
    mixed = Dataset.from_list(
        [{"prompt": problem.prompt} for task in (TASK, ChainTask(operations=9)) for problem in task.problems(3, seed=0)]
    )
    args = settings(tmp_path, max_prompt_length=TASK.prompt_tokens)
    trainer = PruneOPDTrainer(load_student(), load_teacher(), args, mixed, processing_class=load_tokenizer())
    assert len(trainer.train_dataset) == 3
    assert "3 of 6 prompts" in caplog.text
    args = settings(tmp_path, max_prompt_length=2)
    with pytest.raises(InputError, match="no prompt is left"):
        PruneOPDTrainer(load_student(), load_teacher(), args, mixed, processing_class=load_tokenizer())


def test_a_teacher_with_another_tokenizer_is_refused_before_any_work(tmp_path):
    other = load_tokenizer()
    other.add_tokens(["<new>"])
    vocabulary = dict(other.get_vocab())
    vocabulary["+1"], vocabulary["+2"] = vocabulary["+2"], vocabulary["+1"]
    other.get_vocab = lambda: vocabulary
    first = min(vocabulary["+1"], vocabulary["+2"])
    with pytest.raises(VocabularyMismatchError, match=f"token id {first} "):
        PruneOPDTrainer(
            load_student(),
            load_teacher(),
            settings(tmp_path),
            TASK.dataset(4, seed=0),
            processing_class=load_tokenizer(),
            teacher_processing_class=other,
        )


def test_unequal_vocabulary_sizes_with_one_tokenizer_train(tmp_path):
    tokens = {"eos": load_tokenizer().eos_token_id, "pad": load_tokenizer().pad_token_id}
    student = tiny_model("qwen3", 1, vocab_size=64, **tokens)
    teacher = tiny_model("qwen3", 2, vocab_size=72, **tokens)
    trainer = make_trainer(tmp_path, student, teacher, max_steps=1)
    trainer.train()
    assert trainer.teacher.vocab_size == 64


def test_the_summary_is_the_record_of_the_run(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    summary = trainer.summary(dataset="embedded")
    assert (summary.steps, summary.rollouts, summary.kept_tokens) == (2, 16, trainer.counts.kept)
    assert summary.drift["top_k"] == 2
    assert str(tmp_path) not in summary.to_json()
    json.loads(summary.to_json())
