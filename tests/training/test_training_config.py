"""Settings of the trainer: defaults as published, ranges refused with the field's name."""

import importlib.util
import math
from typing import get_args, get_type_hints

import jaxtyping
import pytest
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.training import PruneOPDConfig
from prune_opd_hf.training.setting_rules import WITHOUT_EFFECT, check_rules


def config(**changes):
    return PruneOPDConfig(output_dir="unused", use_cpu=True, report_to="none", **changes)


def test_defaults_are_those_of_the_published_scripts_but_for_the_metric():
    settings = config()
    drift, budget = settings.drift_config(), settings.make_budget()
    assert (drift.top_k, drift.weight_drop, drift.weight_base) == (16, 0.01, 0.5)
    assert (drift.metric, drift.threshold) == ("weighted_overlap", 0.5)
    assert config(drift_metric="overlap").drift_config().threshold == 0.7
    assert (budget.length, budget.minimum, budget.maximum) == (2048, 1024, 12288)
    assert (budget.step, budget.hit_ratio, budget.margin, budget.patience) == (100, 0.1, 100, 3)
    assert (settings.learning_rate, settings.lr_scheduler_type, settings.weight_decay) == (1e-6, "constant", 0.01)
    assert drift.min_length == budget.minimum


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pruning", "half"),
        ("loss_type", "mse"),
        ("loss_support", "both"),
        ("loss_weighting", "none"),
        ("drift_metric", "cosine"),
        ("drift_top_k", 0),
        ("drift_threshold", 0.0),
        ("drift_threshold", 1.01),
        ("drift_weight_drop", -0.1),
        ("drift_weight_base", -1.0),
        ("num_generations", 0),
        ("check_every", 0),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_k", -1),
        ("eval_top_p", 1.1),
        ("eval_temperature", -0.1),
        ("num_generations_eval", 0),
        ("eval_max_completion_length", 0),
        ("save_dtype", "int8"),
        ("budget_patience", 0),
        ("chat_template_kwargs", "[1]"),
        ("final_assistant_message", "keep"),
        ("generation_kwargs", "{not json"),
        ("generation_kwargs", {"max_new_tokens": 3}),
        ("generation_kwargs", {"num_return_sequences": 2}),
        ("eos_token_id", ["end"]),
        ("max_grad_norm", None),
        ("metric_for_best_model", [1]),
        ("bf16", "perhaps"),
        ("eval_strategy", "sometimes"),
        ("save_strategy", False),
        ("lr_scheduler_type", "cosin"),
        ("log_level", "loud"),
        ("max_steps", 0),
        ("dual_clip", 0.5),
        ("seed", 2**32),
    ],
)
def test_a_value_outside_its_range_or_of_another_type_is_refused_by_name(field, value, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checker
    with pytest.raises(ConfigError, match=field.removeprefix("drift_").removeprefix("budget_")):
        config(**{field: value})


HINTS = {name: {hint, *get_args(hint)} for name, hint in get_type_hints(PruneOPDConfig).items()}
NUMBERS = [name for name, kinds in HINTS.items() if kinds & {int, float} and str not in kinds]
OF_TRANSFORMERS = {"data_seed", "local_rank", "ddp_timeout", "ddp_bucket_cap_mb", "save_total_limit"}  # take any number
BESIDE = {
    "vllm_server_timeout": {"use_vllm": True, "vllm_mode": "server"},
    "pruning_length": {"pruning": "fixed"},
    "eval_steps": {"eval_strategy": "steps"},
    "eval_delay": {"eval_strategy": "steps"},
}


# NaN passed every comparison with a bound, and a dual_clip of -1 trained on rewards of the wrong sign
@pytest.mark.parametrize("name", sorted({*NUMBERS} - OF_TRANSFORMERS))
def test_every_number_has_a_range_which_is_checked_at_once(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checker
    for value in (-5, math.nan)[name == "max_grad_norm" :]:  # below 0 clips nothing
        with pytest.raises(ConfigError, match=name if name[:6] != "budget" else "budget"):
            config(**{name: value, **BESIDE.get(name, {"use_vllm": name[:4] == "vllm"})})


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": 0.0},
        {"max_grad_norm": -1.0},
        {"num_train_epochs": -1, "max_steps": 3},
        {"save_steps": 0, "save_strategy": "no"},
        {"save_steps": 0, "save_strategy": "epoch"},
        {"logging_steps": -1, "logging_strategy": "epoch"},
        {"eval_steps": -1, "eval_strategy": "epoch"},
        {"eval_delay": -1, "eval_strategy": "no"},
    ],
)
def test_a_number_that_transformers_does_not_read_beside_the_others_is_accepted(changes):
    settings = config(**changes)
    assert {name: getattr(settings, name) for name in changes} == changes


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_epochs": -1},
        {"save_steps": 0, "save_strategy": "steps"},
        {"eval_steps": -1, "eval_strategy": "steps"},
        {"save_steps": math.nan, "save_strategy": "no"},  # the Trainer makes a whole number of it all the same
    ],
)
def test_a_number_that_transformers_reads_is_refused_outside_of_its_range(changes):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))} must be "):
        config(**changes)


# accelerate refuses it by itself where there is no GPU, before our rules
def test_a_backend_for_each_device_is_accepted_and_an_unknown_one_among_them_is_not():
    settings = config()
    settings.ddp_backend = "cpu:gloo,cuda:nccl"
    check_rules(settings)
    settings.ddp_backend = "cpu:gloo,cuda:nickel"
    with pytest.raises(ConfigError, match=r"ddp_backend must be one of nccl, gloo, .*, got 'cpu:gloo,cuda:nickel'"):
        check_rules(settings)


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_before_a_model_is_loaded():
    with pytest.raises(ConfigError, match=r"report_to must name some of .*wandb.*; got 'wanda'"):
        PruneOPDConfig(output_dir="unused", use_cpu=True, report_to=["wanda"])
    missing = [name for name in ("comet_ml", "neptune", "wandb") if importlib.util.find_spec(name) is None]
    with pytest.raises(ConfigError, match=f"report_to={missing[0]}: .*Or leave it out of report_to") as refusal:
        PruneOPDConfig(output_dir="unused", use_cpu=True, report_to=missing[0])
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("report_to", ["none", "all", ["none"], [], None])
def test_what_is_installed_or_nothing_may_be_reported_to(report_to):
    settings = PruneOPDConfig(output_dir="unused", use_cpu=True, report_to=report_to)
    assert settings.report_to == [] or report_to == "all"


CHANGED = {
    **dict.fromkeys(WITHOUT_EFFECT, True),
    "label_smoothing_factor": 0.1,
    "include_for_metrics": ["loss"],
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "label_names": ["labels"],
}


# huggingface/trl#5862: a beta that nothing reads; the same of what Transformers' own Trainer reads and this one does not
@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_setting_of_transformers_that_does_not_act_here_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=f"^{name}=.* has no effect here: "):
        config(**{name: CHANGED[name]})


PACKAGES = {"adamw_bnb_8bit": "bitsandbytes", "galore_adamw": "galore_torch", "adamw_anyprecision": "torchdistx"}
PACKAGES |= {"adamw_torch_npu_fused": "torch_npu"}


# They failed when the first step was to begin, with both models loaded
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(({"optim": name}, f"optim={name}, .*(install|import)") for name in PACKAGES),
        ({"optim_args": "betas"}, "optim=.*, or its optim_args: not enough values"),
        ({"save_strategy": "best"}, "save_strategy='best' needs metric_for_best_model, and an eval_strategy"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy='best' needs"),
        ({"fsdp": "full_shard"}, "fsdp needs several processes: start with accelerate launch"),
        ({"deepspeed": "zero2.json"}, "deepspeed"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr, .* min_lr"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"lowest": 1}}, "unexpected keyword argument 'lowest'"),
        ({"load_best_model_at_end": True}, "strategy to match, .*Evaluation strategy: .*NO.* Save strategy: .*STEPS"),
        ({"use_liger_kernel": True}, "use_liger_kernel needs a package: pip install liger-kernel"),
    ],
)
def test_what_an_optimizer_a_schedule_or_kernels_lack_is_named_before_a_model_is_loaded(changes, said):
    package = {"use_liger_kernel": "liger_kernel", "deepspeed": "deepspeed"}.get(next(iter(changes)))
    package = package or PACKAGES.get(changes.get("optim"))
    if package is not None and importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=said) as refusal:
        config(**changes)
    assert len(str(refusal.value).splitlines()) == 1
    config(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1})


def test_models_load_after_a_deepspeed_setting_was_refused():
    with pytest.raises(ConfigError) as refusal:
        config(deepspeed="no_such_file.json")
    assert (
        not is_deepspeed_zero3_enabled()
    )  # asked by from_pretrained; `refusal` keeps the half-made configuration alive
    assert refusal.value.__cause__ is not None


def test_rollouts_of_a_step_must_be_a_multiple_of_num_generations():
    with pytest.raises(ConfigError, match="not a multiple of num_generations 4"):
        config(per_device_train_batch_size=2, gradient_accumulation_steps=3)
