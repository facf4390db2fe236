"""The record of a run: two runs that differ in a setting have different records."""

import pytest
from transformers import TrainerState

from prune_opd_hf.training import PruneOPDConfig
from prune_opd_hf.training.metrics import TokenCounts
from prune_opd_hf.training.run_output import NOT_HYPERPARAMETERS, summary_of
from prune_opd_hf.training.setting_rules import ACTS_WITH, CLIPS

# Another accepted value for every setting of ours that may change what is learnt.
OTHERS = {
    "learning_rate": 2e-6,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.02,
    "model_init_kwargs": '{"dtype": "bfloat16"}',
    "teacher_model_init_kwargs": {"dtype": "float32"},
    "max_prompt_length": None,
    "chat_template_kwargs": {"enable_thinking": True},
    "num_generations": 2,
    "num_iterations": 2,
    "temperature": 0.9,
    "top_p": 0.9,
    "top_k": 5,
    "final_assistant_message": "drop",
    "allow_renamed_special_tokens": True,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "eos_token_id": [2, 6],
    "shuffle_dataset": False,
    "save_dtype": "bfloat16",
    "max_completion_length": 4096,
    "generation_batch_size": 4,
    "generation_kwargs": {"no_repeat_ngram_size": 3},
    "pruning_length": 2000.0,
    "pruning_match": "kept",
    "reliability_weights": False,
    "drift_metric": "mass",
    "drift_top_k": 8,
    "drift_threshold": 0.8,
    "drift_weight_drop": 0.02,
    "drift_weight_base": 0.0,
    "drift_min_length": 3,
    "check_every": 16,
    "budget_initial": 1500,
    "budget_minimum": 1000,
    "budget_step": 50,
    "budget_hit_ratio": 0.2,
    "budget_margin": 10,
    "budget_patience": 2,
    "budget_natural_ends": "miss",
    "loss_top_k": 8,
    "loss_centered": False,
    "loss_weighting": "teacher",
    "loss_support": "union",
    "topk_kl_direction": "forward",
    "topk_kl_tail": "bucket",
    "sampled_estimator": "k3",
    "beta": 0.5,
    "loss_temperature": 2.0,
    "max_skipped_steps": 0,
    "length_explosion": "stop",
    "clip_low": 0.1,
    "clip_high": 0.3,
    "dual_clip": 4.0,
    "max_tokens_per_micro_batch": 4096,
    "teacher_model_kind": "live",
    "teacher_update_rate": 0.5,
    "teacher_sync_steps": 2,
    "teacher_prompt_template": "{prompt} {answer}",
    "teacher_quantization_config": {"quant_method": "fp8"},
    # of Transformers
    "max_grad_norm": 2.0,
    "adam_beta2": 0.9,
    "warmup_steps": 5,
    "optim": "sgd",
    "per_device_train_batch_size": 16,
    "rollout_dtype": "bfloat16",
    "compile_decoding": True,
    "gradient_accumulation_steps": 2,
    "seed": 1,
}
USUAL = {
    **{name: {"loss_type": losses[0]} for name, (other, losses) in ACTS_WITH.items() if other == "loss_type"},
    **{name: {"num_iterations": 2} for name in CLIPS},
    **{name: {"teacher_model_kind": "ema"} for name in ("teacher_update_rate", "teacher_sync_steps")},
    **{key: {"rollout_engine": "loop"} for key in ("rollout_dtype", "compile_decoding")},
    "pruning_length": {"pruning": "fixed", "pruning_length": 1000.0},
}
"""What the other run has, where the defaults do not go with the setting."""


def summary(**changes):
    args = PruneOPDConfig(output_dir="unused", use_cpu=True, report_to="none", **changes)
    known = {"dataset": "d", "created": "2026-01-01", "hardware": None}
    return summary_of(args, TrainerState(), TokenCounts(), {}, **known)


@pytest.mark.parametrize("name", OTHERS)
def test_two_runs_that_differ_in_one_setting_have_two_records(name):
    usual = USUAL.get(name, {})
    assert summary(**{**usual, name: OTHERS[name]}) != summary(**usual)


def test_every_setting_of_ours_is_compared_above_or_said_to_be_no_hyperparameter():
    only_one_choice_today = {"rollout_engine"}
    named = {name for name in PruneOPDConfig.__annotations__ if not name.startswith(("eval_", "vllm_"))}
    assert named <= set(OTHERS) | set(NOT_HYPERPARAMETERS) | only_one_choice_today


def test_what_is_only_shown_or_stored_leaves_the_record_alone():
    usual = summary()
    assert summary(log_completions=True, save_rollouts_steps=2, num_completions_to_print=1, logging_steps=7) == usual
