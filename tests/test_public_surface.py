"""What users may rely on: the public names and the settings of training, and that importing them costs nothing before use."""

import ast
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from transformers import TrainingArguments

import prune_opd_hf
from prune_opd_hf import PruneOPDConfig
from prune_opd_hf.cli import COMMANDS

PUBLIC_NAMES = """
    DriftConfig DriftMonitor DriftProgress DriftStoppingCriteria EvaluationReport PreflightReport PruneOPDConfig
    PruneOPDError PruneOPDTrainer ResponseBudget Rollouts ServedTeacher StudentTopKLogitsProcessor Teacher TeacherScores
    TrainingSummary build_card candidate_log_probs choose_candidates divergence_from_hidden effective_length
    evaluate_model generalized_jsd_loss mass_overlap nucleus_accepts preflight pruned_generate publish_student
    reliability reverse_kl_loss sampled_token_loss shared_vocabulary tail_accepts topk_kl_loss topk_overlap
    topk_policy_gradient_loss topk_rewards weight_rewards weighted_overlap
""".split()

CONFIG_FIELDS = """
    allow_renamed_special_tokens beta budget_hit_ratio budget_initial budget_margin budget_minimum
    budget_natural_ends budget_patience budget_step chat_template_kwargs check_every clip_high clip_low
    compile_decoding drift_metric drift_min_length drift_threshold drift_top_k drift_weight_base drift_weight_drop dual_clip
    eos_token_id eval_max_completion_length eval_temperature eval_top_k eval_top_p final_assistant_message
    generation_batch_size generation_kwargs length_explosion log_completions loss_centered loss_support
    loss_temperature loss_top_k loss_type loss_weighting max_completion_length max_prompt_length
    max_skipped_steps max_tokens_per_micro_batch min_p model_init_kwargs num_completions_to_print num_generations
    num_generations_eval
    num_iterations offload_teacher pruning pruning_length pruning_match reliability_weights
    repetition_penalty rollout_dtype rollout_engine sampled_estimator save_dtype save_rollouts_steps shard_teacher
    shuffle_dataset
    teacher_model_init_kwargs teacher_model_kind teacher_model_name_or_path teacher_model_server_timeout
    teacher_model_server_url teacher_models teacher_prompt_template teacher_quantization_config teacher_sync_steps
    teacher_update_rate temperature top_k top_p topk_kl_direction topk_kl_tail
    use_vllm vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_mode vllm_server_base_url vllm_server_timeout
    vllm_weights_dir
""".split()


def test_the_public_names_are_these_and_no_others():
    assert prune_opd_hf.__all__ == sorted(PUBLIC_NAMES)


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_a_public_name_can_be_imported_listed_and_used(name):
    assert callable(getattr(prune_opd_hf, name))
    assert name in dir(prune_opd_hf)


def test_type_checkers_see_the_names_that_python_sees():
    tree = ast.parse(Path(prune_opd_hf.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: node.module.removeprefix("prune_opd_hf.")
        + (f":{alias.name}" if alias.name != alias.asname else "")
        for node in block.body
        for alias in node.names
    }
    assert seen == prune_opd_hf.PUBLIC_NAMES


def test_the_settings_of_training_are_these_and_those_of_transformers():
    own = {item.name for item in fields(PruneOPDConfig)} - {item.name for item in fields(TrainingArguments)}
    assert sorted(own) == sorted(CONFIG_FIELDS)


def test_preflight_is_the_function_in_whatever_order_it_is_imported():
    import_module("prune_opd_hf.preflight.preflight_report")
    with pytest.raises(TypeError, match="required"):
        prune_opd_hf.preflight()


HELP = """
from prune_opd_hf.cli import main
def shows_its_help(command):
    try: main([command, "--help"])
    except SystemExit as stop: assert stop.code == 0
shows_its_help"""


@pytest.mark.parametrize(
    "code",
    [
        "import prune_opd_hf",
        "from prune_opd_hf import PruneOPDError; dir(PruneOPDError)",
        "from prune_opd_hf.cli import main; assert main(['--version']) == 0",
        "from prune_opd_hf.cli import main; assert main(['--help']) == 0",
        "from prune_opd_hf.cli import main; assert main(['nope']) == 2",
        *[f"{HELP}('{command}')" for command in sorted(COMMANDS.keys() - {"train"})],
    ],
)
def test_what_needs_no_model_does_not_wait_for_torch(code):
    heavy = "{'torch', 'datasets', 'accelerate'}"
    check = f"{code}; import sys; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120, stdout=subprocess.DEVNULL)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'PruneOPDTrainr'"):
        prune_opd_hf.PruneOPDTrainr  # noqa: B018
