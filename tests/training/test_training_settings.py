"""Settings act or are refused or named; a run begins by saying what it will do.

Public reports: verl-project/verl#7270 (a generation config's penalty in rollouts), modelscope/ms-swift#9526.
"""

import ast
import logging
import re
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import torch
from trainer_helpers import make_trainer, prompts_of
from transformers import TrainingArguments

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.tasks import load_student
from prune_opd_hf.training import PruneOPDConfig
from prune_opd_hf.training.metrics import StepTotals, TokenCounts
from prune_opd_hf.training.objective import LOSSES
from prune_opd_hf.training.safeguards import Safeguards
from prune_opd_hf.training.setting_rules import ACTS_WITH, CLIPS


def config(**changes):
    return PruneOPDConfig(output_dir="unused", use_cpu=True, report_to="none", **changes)


# ---------------------------------------------------------------------- settings of a loss

OTHERS = {
    "loss_top_k": 3,
    "loss_support": "teacher",
    "loss_centered": False,
    "loss_weighting": "uniform",
    "topk_kl_direction": "forward",
    "topk_kl_tail": "bucket",
    "sampled_estimator": "k3",
    "beta": 0.3,
    "loss_temperature": 2.0,
    "clip_low": 0.01,
    "clip_high": 0.01,
    "dual_clip": 1.01,
}
OF_A_LOSS = {name: choices for name, (other, choices) in ACTS_WITH.items() if other == "loss_type"}


@pytest.fixture(scope="module")
def trainer_and_rollouts(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("acts"), num_iterations=2, loss_top_k=16)
    return trainer, trainer.generate_rollouts(prompts_of(trainer, 8))


def loss_and_gradient(trainer, rollouts, **changes):
    """In a second update, where the ratio of the policy gradients is not 1."""
    args, before = trainer.args, {name: getattr(trainer.args, name) for name in changes}
    for name, value in changes.items():
        setattr(args, name, value)
    trainer.model.zero_grad()
    count = rollouts.response_mask.sum().float()
    first = trainer.objective(trainer.model, rollouts, count)
    old = None
    if first.old_log_probs is not None:
        noise = torch.randn(first.old_log_probs.shape, generator=torch.Generator().manual_seed(0))
        old = first.old_log_probs + 0.3 * noise
    trainer.model.zero_grad()
    value = trainer.objective(trainer.model, rollouts, count, old)
    value.loss.backward()
    for name, usual in before.items():
        setattr(args, name, usual)
    gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    return torch.cat([value.loss.detach().reshape(1), gradient])


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_setting_of_the_loss_acts_with_the_losses_that_it_is_said_to_be_for_and_with_no_other(
    trainer_and_rollouts, loss_type
):
    usual = loss_and_gradient(*trainer_and_rollouts, loss_type=loss_type)
    assert OTHERS.keys() == OF_A_LOSS.keys()
    for name, value in OTHERS.items():
        changed = not torch.equal(usual, loss_and_gradient(*trainer_and_rollouts, loss_type=loss_type, **{name: value}))
        assert changed == (loss_type in OF_A_LOSS[name]), name


@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_that_cannot_act_under_the_chosen_loss_is_refused_by_name(name):
    other = next(loss for loss in LOSSES if loss not in OF_A_LOSS[name])
    with pytest.raises(ConfigError, match=f"{name}=.* has no effect with loss_type='{other}': it is for "):
        config(loss_type=other, num_iterations=2, **{name: OTHERS[name]})
    config(loss_type=OF_A_LOSS[name][0], num_iterations=2, **{name: OTHERS[name]})


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_refused_where_every_batch_is_used_once(name):
    with pytest.raises(ConfigError, match=f"{name}=.* has no effect with num_iterations=1"):
        config(**{name: OTHERS[name]})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vllm_gpu_memory_utilization": 0.5}, "has no effect with rollout_engine='auto': it is for vllm"),
        ({"vllm_mode": "server"}, "has no effect with rollout_engine='auto': it is for vllm"),
        ({"rollout_dtype": "bfloat16"}, "has no effect with rollout_engine='auto': it is for loop"),
        (
            {"rollout_dtype": "float16", "rollout_engine": "loop"},
            "rollout_dtype must be one of bfloat16, got 'float16'",
        ),
        ({"use_vllm": True, "vllm_server_timeout": 9.0}, "has no effect with vllm_mode='colocate': it is for server"),
    ],
)
def test_a_setting_of_an_engine_that_does_not_sample_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        config(**changes)


# ---------------------------------------------------------------------- lengths that follow the cap


# With a cap at or below 1,024 (TRL's default is 512) the default minimum was the cap: pruning stopped nothing
@pytest.mark.parametrize(
    ("cap", "minimum", "initial", "step"),
    [(12288, 1024, 2048, 100), (4096, 1024, 2048, 100), (1024, 256, 1024, 85), (512, 128, 512, 42), (2, 1, 2, 1)],
)
def test_default_lengths_follow_the_cap_and_are_the_published_ones_at_the_published_cap(cap, minimum, initial, step):
    settings = config(max_completion_length=cap)
    budget = settings.make_budget()
    assert (budget.minimum, budget.length, budget.maximum) == (minimum, initial, cap)
    assert (budget.step, budget.margin) == (step, step)
    assert settings.drift_config().min_length == minimum


def test_a_low_initial_cap_lowers_the_default_minimum():
    assert config(budget_initial=300).make_budget().minimum == 300


def test_pruning_stops_rows_at_trls_default_cap():
    settings = config(max_completion_length=512)
    assert settings.make_pruning().obstacle(settings.drift_config(), settings.check_every, 151_936) is None


# ---------------------------------------------------------------------- what a run says first


def said(tmp_path, **changes):
    """The lines that a run would begin with."""
    callbacks = make_trainer(tmp_path, problems=8, **changes).callback_handler.callbacks
    return next(callback.opening for callback in callbacks if hasattr(callback, "opening"))


def test_a_run_begins_with_its_ends_its_sampling_its_pruning_and_its_step(tmp_path, capsys):
    make_trainer(tmp_path, max_steps=1).train()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("end tokens: '<eos>' 2 (the student's generation config, ")
    assert lines[1:4] == [
        "sampling: from the student's own distribution",
        "pruning: a row stops at drift event 4, not before token 1; the cap begins at 14 tokens and moves between 4 and 14",
        "a step: 8 rollouts, 2 of each of 4 prompts",
    ]
    assert lines[4].startswith("step 1/1")


def test_a_batch_of_one_prompt_is_called_that(tmp_path):
    changes = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert "a step: 4 rollouts, all of one prompt" in said(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"pruning": "none"}, "pruning: no response has more than 14 tokens"),
        ({"pruning": "fixed", "pruning_length": 5}, "pruning: every response ends at 5 tokens at the latest"),
        (
            {"pruning": "random", "pruning_length": 5},
            "pruning: each response ends at a length drawn from 1 to 14, 5 on average",
        ),
    ],
)
def test_settings_that_this_way_of_pruning_does_not_look_at_are_named(tmp_path, changes, line):
    lines = said(tmp_path, **changes)
    assert line in lines
    [named] = [text for text in lines if text.startswith("without effect")]
    assert named.startswith(f"without effect, since pruning is '{changes['pruning']}': budget_minimum, budget_step, ")


def test_a_weight_that_no_token_gets_and_a_number_of_completions_that_nobody_sees_are_named(tmp_path):
    lines = said(tmp_path, pruning="none", drift_weight_base=0.2, num_completions_to_print=9)
    assert any(
        line.startswith("without effect, since pruning") and line.endswith("drift_weight_base") for line in lines
    )
    assert "without effect, since log_completions is not set: num_completions_to_print" in lines
    weighted = said(tmp_path, pruning="none", drift_weight_base=0.2, reliability_weights=True)
    assert not any("drift_weight_base" in line for line in weighted)


@pytest.mark.parametrize("name", ["model_init_kwargs", "teacher_model_init_kwargs"])
def test_arguments_for_loading_a_model_that_is_loaded_already_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"^{name} has no effect on a model that is loaded already"):
        make_trainer(tmp_path, **{name: {"dtype": "bfloat16"}})


def test_what_the_students_generation_config_says_of_sampling_is_named_as_left_out(tmp_path):
    student = load_student()
    student.generation_config.repetition_penalty = 1.1
    student.generation_config.top_k = 20
    lines = said(tmp_path, student=student)
    assert lines[1] == (
        "sampling: from the student's own distribution; its generation config says repetition_penalty=1.1, top_k=20, which is "
        "left out"
    )


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 4}, {"min_p": 0.1}, {"repetition_penalty": 1.2}]
)
def test_warped_sampling_is_named_with_what_it_means_for_loss_and_overlap(tmp_path, caplog, changes):
    [(name, value)] = changes.items()
    with caplog.at_level(logging.WARNING):
        lines = said(tmp_path, **changes)
    assert f"sampling: {name}={value}" in lines
    assert f"rollouts are sampled with {name}={value}, so tokens do not come from the distribution p" in caplog.text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"drift_weight_drop": 0.0}, "drift_weight_drop is 0"),
        ({"drift_weight_drop": 0.01}, "it takes 100 drift events, and no response has more than 14 tokens"),
        ({"drift_min_length": 14}, "drift_min_length is 14, and no response has more than 14 tokens"),
        ({"drift_top_k": 64, "drift_metric": "weighted_overlap"}, "two sets of 64 among 64 tokens share 1.00 at least"),
        ({"drift_top_k": 64}, "two sets of 64 among 64 tokens share 1.00 at least, and the threshold is 0.5"),
        ({"check_every": 14}, "the teacher looks every 14 tokens, and no response has more than 14"),
        ({}, None),
    ],
)
def test_pruning_that_can_stop_nothing_is_named_with_the_reason(tmp_path, caplog, changes, why):
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, problems=8, **changes)
    lines = [record.getMessage() for record in caplog.records if "can stop no response" in record.getMessage()]
    assert len(lines) == (why is not None)
    assert all(why in line for line in lines)


def test_equal_responses_to_one_prompt_are_named(tmp_path, caplog):
    make_trainer(tmp_path, problems=8, temperature=0.0, eval_temperature=0.0, num_generations_eval=3)
    assert "temperature 0 gives 2 equal responses to each prompt: set num_generations=1" in caplog.text
    assert "eval_temperature 0 gives 3 equal responses to each prompt: set num_generations_eval=1" in caplog.text


def test_an_evaluation_beyond_the_context_is_refused_by_its_own_setting(tmp_path):
    with pytest.raises(
        ConfigError, match=r"eval_max_completion_length make 1 \+ 5000 .* lower eval_max_completion_length to"
    ):
        make_trainer(tmp_path, problems=8, eval_max_completion_length=5000)


def totals(events):
    """A step of 10 rows that all drifted and kept 100 tokens."""
    return StepTotals(TokenCounts(rollouts=10, kept=100), drifted=10, capped=0, weight_sum=100.0, events=events)


# Settings that the preflight recommends may stop every row; the trainer advised to lower the threshold again
def test_rows_that_all_drift_are_warned_of_only_where_most_tokens_are_events_and_without_advice_against_the_preflight(
    caplog,
):
    safeguards = Safeguards(5, "warn")
    safeguards.watch_rollouts(1, totals(events=40))
    assert caplog.text == ""
    safeguards.watch_rollouts(2, totals(events=60))
    assert "all 10 rollouts of step 2 drifted, and 60% of the tokens that they kept are drift events" in caplog.text
    assert "prune-opd preflight" in caplog.text
    assert "lower drift_threshold" not in caplog.text


# ---------------------------------------------------------------------- TRL's names


def test_prompts_keep_their_order_without_shuffle_dataset(tmp_path):
    orders = []
    for shuffled in (False, True):
        trainer = make_trainer(tmp_path, problems=8, shuffle_dataset=shuffled)
        rows = [row for batch in trainer.get_train_dataloader() for row in batch["input_ids"].tolist()]
        orders.append(rows[::2])  # each prompt comes twice in a row
    prompts = trainer.train_dataset["input_ids"][:]
    assert orders[0] == prompts
    assert sorted(orders[1]) == sorted(prompts) != orders[1]


FROM_TRL = (Path(__file__).parents[2] / "docs" / "guides" / "from_trl.md").read_text(encoding="utf-8")


def test_the_script_that_the_page_for_users_of_trl_ports_is_one_of_theirs_and_its_trainer_is_given_a_teacher():
    """TRL's trainer does not read `teacher_model_name_or_path`; its own script does."""
    trl = pytest.importorskip("trl")
    calls = {
        node.func.id: {keyword.arg for keyword in node.keywords}
        for node in ast.walk(ast.parse(FROM_TRL.partition("```python\n")[2].partition("```")[0]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert calls["DistillationConfig"] <= {item.name for item in fields(trl.DistillationConfig)}
    assert "teacher_model" in calls["DistillationTrainer"] <= {*signature(trl.DistillationTrainer).parameters}


def test_the_page_for_users_of_trl_lists_every_default_that_differs():
    trl = pytest.importorskip("trl")
    theirs, ours = (
        {item.name: item.default for item in fields(config)} for config in (trl.DistillationConfig, PruneOPDConfig)
    )
    differ = {name for name in theirs.keys() & ours.keys() if theirs[name] != ours[name]}
    listed = FROM_TRL.partition("## Other defaults")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", listed, flags=re.MULTILINE)) == differ


def test_the_page_for_users_of_trl_says_of_every_setting_of_theirs_whether_it_is_here_or_what_takes_its_place():
    trl = pytest.importorskip("trl")
    theirs = {item.name for item in fields(trl.DistillationConfig)} - {item.name for item in fields(TrainingArguments)}
    ours = {item.name for item in fields(PruneOPDConfig)}
    table = FROM_TRL.partition("## Every setting")[2].partition("\n## ")[0]
    unexplained = {name for name in theirs - ours if f"`{name}`" not in table}
    assert {name for name in unexplained if not name.startswith("vllm_")} == set()
    assert "other `vllm_...`" in table
    accepted = table.partition("| not here |")[0]
    assert {name for name in theirs & ours if f"`{name}`" not in accepted} == set()
