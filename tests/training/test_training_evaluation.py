"""Evaluations inside training: their own sampling, and metrics that a checkpoint can be chosen by.

Public reports: huggingface/trl#4886, #2959, #3729 (sampling of its own), #3539 (`num_generations_eval`), #5811 and
huggingface/transformers#29801 (KeyError: 'eval_loss'), verl-project/verl#6202 (temperature of validations).
"""

from pathlib import Path

import pytest
import torch
from trainer_helpers import TASK, make_trainer
from trainer_helpers import settings as settings_of_run

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.training.evaluate_student import METRICS, check_best_metric

LOSSES = {
    "topk_policy_gradient": {},
    "topk_kl": {"topk_kl_direction": "forward", "topk_kl_tail": "bucket"},
    "sampled_token": {"sampled_estimator": "k3"},
    "generalized_jsd": {"beta": 0.0},
    "reverse_kl": {},
}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_kl_overlap_and_entropy_are_those_of_full_passes_over_the_answers(tmp_path, loss_type):
    changes = {"loss_type": loss_type, "per_device_eval_batch_size": 3, **LOSSES[loss_type]}
    trainer = make_trainer(tmp_path, eval_max_completion_length=9, **changes)
    answers = {}

    def remember(prediction):
        answers["texts"] = [completion.text for completion in prediction.predictions]
        return {}

    kept, generate = [], trainer.evaluation.engine.generate
    trainer.evaluation.engine.generate = lambda *given: (kept.append(done) or done for done in generate(*given))
    trainer.compute_metrics = remember
    measured = trainer.evaluate()
    rows = trainer.eval_dataset["input_ids"]
    kl, teacher_log_prob, overlap, entropy, loss, tokens = 0.0, 0.0, 0.0, 0.0, 0.0, 0
    with torch.no_grad():
        for number, response, _ in kept:
            ids = torch.tensor([[*rows[number], *response]])
            span = slice(len(rows[number]) - 1, ids.shape[1] - 1)
            log_p, log_q = (
                model(ids).logits[0, span].float().log_softmax(-1) for model in (trainer.model, trainer.teacher.model)
            )
            token = torch.tensor(response).unsqueeze(-1)
            d = (log_p - log_q).gather(-1, token)[:, 0]
            top = log_p.topk(16).indices
            p, q = log_p.gather(-1, top).exp(), log_q.gather(-1, top).exp()
            rest = torch.stack([1 - p.sum(-1), 1 - q.sum(-1)]).clamp(min=1e-6)
            loss += {
                "topk_policy_gradient": (p * (p / q).log()).sum(),
                "topk_kl": (q * (q / p).log()).sum() + (rest[1] * (rest[1] / rest[0]).log()).sum(),
                "sampled_token": (torch.expm1(-d) + d).sum(),
                "generalized_jsd": (log_q.exp() * (log_q - log_p)).sum(),
                "reverse_kl": (log_p.exp() * (log_p - log_q)).sum(),
            }[loss_type]
            kl += d.sum()
            teacher_log_prob += log_q.gather(-1, token).sum()
            entropy -= (log_p.exp() * log_p).sum()
            two = log_p.topk(2).indices, log_q.topk(2).indices
            overlap += sum(
                len({*ours} & {*theirs}) / 2 for ours, theirs in zip(*(t.tolist() for t in two), strict=True)
            )
            tokens += len(response)
    expected = {"loss": loss, "kl": kl, "teacher_log_prob": teacher_log_prob, "overlap": overlap, "entropy": entropy}
    for name, value in expected.items():
        assert measured[f"eval_{name}"] == pytest.approx(float(value) / tokens, rel=1e-3, abs=1e-5), name
    assert measured["eval_mean_tokens"] == tokens / 8
    assert {f"eval_{name}" for name in METRICS} == set(measured)


def test_an_evaluation_is_sampled_by_its_own_settings(tmp_path):
    training = {"temperature": 0.7, "top_p": 0.8, "top_k": 5, "repetition_penalty": 1.3, "max_completion_length": 14}
    evaluation = {"eval_temperature": 0.5, "eval_top_p": 0.9, "eval_top_k": 7, "eval_max_completion_length": 20}
    trainer = make_trainer(tmp_path, **training, **evaluation, per_device_eval_batch_size=3, num_generations_eval=2)
    sampling = trainer.evaluation.engine.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.max_completion_length, trainer.evaluation.engine.slots) == (20, 3)
    assert sampling.generate_arguments()["repetition_penalty"] == 1.0
    untouched = make_trainer(tmp_path, **training).evaluation.engine.sampling
    assert (untouched.temperature, untouched.top_p, untouched.top_k, untouched.max_completion_length) == (
        1.0,
        1.0,
        0,
        14,
    )
    seen = {}

    def look(prediction):
        seen["rows"] = [row["prompt"] for row in prediction.label_ids]
        seen["texts"] = [completion.text for completion in prediction.predictions]
        return {}

    trainer.compute_metrics = look
    trainer.evaluate()
    prompts = trainer.eval_dataset["prompt"][:]
    assert seen["rows"] == [prompt for prompt in prompts for _ in range(2)]
    assert any(first != second for first, second in zip(seen["texts"][::2], seen["texts"][1::2], strict=True))


def test_an_answer_does_not_depend_on_the_batch_and_leaves_training_as_it_was(tmp_path):
    metrics = [
        make_trainer(tmp_path, per_device_eval_batch_size=rows, check_every=check).evaluate()
        for rows, check in ((8, 4), (3, 9))
    ]
    for name in ("eval_kl", "eval_overlap", "eval_loss", "eval_mean_tokens"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4), name
    weights = []
    for evaluated in (True, False):
        changes = {"eval_strategy": "steps", "eval_steps": 1} if evaluated else {}
        trainer = make_trainer(tmp_path, max_steps=2, **changes)
        trainer.train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    assert torch.equal(*weights)


# The default of load_best_model_at_end is eval_loss, which was not measured: KeyError at the first evaluation
@pytest.mark.parametrize(("metric", "best"), [(None, min), ("kl", min), ("eval_overlap", max)])
def test_the_best_checkpoint_can_be_chosen_by_what_an_evaluation_measures(tmp_path, metric, best):
    trainer = make_trainer(
        tmp_path,
        max_steps=3,
        learning_rate=3e-3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
    )
    trainer.train()
    name = f"eval_{(metric or 'loss').removeprefix('eval_')}"
    values = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert len(set(values)) == 3
    step = values.index(best(values)) + 1
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{step}"


def test_a_metric_that_no_evaluation_measures_is_refused_before_the_first_step(tmp_path):
    problems = TASK.dataset(4, seed=1)
    saved = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = settings_of_run(tmp_path, load_best_model_at_end=True, metric_for_best_model="accuracy", **saved)
    with pytest.raises(ConfigError, match=r"metric_for_best_model must be one of loss, kl, .* got 'accuracy'"):
        make_trainer(tmp_path, load_best_model_at_end=True, metric_for_best_model="accuracy", **saved).train()
    check_best_metric(args, problems, computes_more=True)
    args = settings_of_run(tmp_path, load_best_model_at_end=True, **saved)
    check_best_metric(args, problems, computes_more=False)
    # With several sets the metrics have their names in front; huggingface/sentence-transformers#2749
    with pytest.raises(ConfigError, match=r"one of easy_loss, easy_kl, .*hard_loss, .* got 'loss'"):
        check_best_metric(args, {"easy": problems, "hard": problems}, computes_more=False)


def test_a_long_evaluation_is_recorded_in_parts(tmp_path, monkeypatch):
    whole = make_trainer(tmp_path).evaluate()
    monkeypatch.setattr("prune_opd_hf.training.evaluate_student.TOKENS_AT_ONCE", 3 * 14)
    parts = make_trainer(tmp_path, per_device_eval_batch_size=2).evaluate()
    for name in ("eval_kl", "eval_overlap", "eval_loss", "eval_mean_tokens", "eval_truncated_share"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4), name
