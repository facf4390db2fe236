"""Rules over the settings of a run: their ranges, and which have an effect only beside certain choices of others.

A setting that cannot act is refused where it was surely meant (a loss, an engine), and named when the run begins where several runs
share their settings (the ways of pruning that a study compares).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from string import Formatter
from typing import TYPE_CHECKING, Any

import torch
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.utils import is_liger_kernel_available

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.models.loading import quantization
from prune_opd_hf.records.files import first_line

if TYPE_CHECKING:
    from prune_opd_hf.training.config import PruneOPDConfig

RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "be at least 1": (
        lambda value: 1 <= value < math.inf,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_generations num_generations_eval "
        "num_iterations generation_batch_size check_every max_prompt_length max_completion_length eval_max_completion_length "
        "max_tokens_per_micro_batch drift_top_k loss_top_k dual_clip teacher_sync_steps budget_step budget_patience",
    ),
    "be a finite number of at least 0": (
        lambda value: 0 <= value < math.inf,
        "learning_rate weight_decay adam_epsilon warmup_steps neftune_noise_alpha logging_steps eval_steps eval_delay temperature "
        "eval_temperature top_k eval_top_k save_rollouts_steps dataloader_num_workers max_skipped_steps num_completions_to_print "
        "drift_weight_base drift_min_length budget_margin clip_low clip_high",
    ),
    "be a finite number above 0": (
        lambda value: 0 < value < math.inf,
        "num_train_epochs save_steps repetition_penalty loss_temperature teacher_model_server_timeout",
    ),
    "lie in (0, 1]": (lambda value: 0 < value <= 1, "top_p eval_top_p teacher_update_rate drift_threshold"),
    "lie in [0, 1]": (lambda value: 0 <= value <= 1, "min_p beta drift_weight_drop budget_hit_ratio"),
    "lie in [0, 1)": (lambda value: 0 <= value < 1, "adam_beta1 adam_beta2"),
    "be a number, where 0, those below it and inf clip nothing": (lambda value: not math.isnan(value), "max_grad_norm"),
    "be at least 1, or -1 for num_train_epochs": (lambda value: value >= 1 or value == -1, "max_steps"),
    "lie in 0 to 2**32 - 1": (lambda value: 0 <= value < 2**32, "seed"),
}
"""Which numbers settings may be, in words and as a function, by which NaN is none of them."""

ON_CANDIDATES = ("topk_policy_gradient", "topk_kl")
CLIPS = ("clip_low", "clip_high", "dual_clip")
ACTS_WITH: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "loss_top_k": ("loss_type", ON_CANDIDATES),
    "loss_support": ("loss_type", ON_CANDIDATES),
    "loss_centered": ("loss_type", ("topk_policy_gradient",)),
    "loss_weighting": ("loss_type", ("topk_policy_gradient",)),
    "topk_kl_direction": ("loss_type", ("topk_kl",)),
    "topk_kl_tail": ("loss_type", ("topk_kl",)),
    "sampled_estimator": ("loss_type", ("sampled_token",)),
    "beta": ("loss_type", ("generalized_jsd",)),
    "loss_temperature": ("loss_type", ("generalized_jsd", "reverse_kl")),
    **dict.fromkeys(CLIPS, ("loss_type", ("topk_policy_gradient", "sampled_token"))),
    **dict.fromkeys(("budget_initial", "budget_minimum", "budget_step", "budget_hit_ratio"), ("pruning", ("drift",))),
    **dict.fromkeys(("budget_margin", "budget_patience", "budget_natural_ends"), ("pruning", ("drift",))),
    **dict.fromkeys(
        ("vllm_mode", "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode"), ("rollout_engine", ("vllm",))
    ),
    **dict.fromkeys(("rollout_dtype", "compile_decoding"), ("rollout_engine", ("loop",))),
    **dict.fromkeys(("teacher_update_rate", "teacher_sync_steps"), ("teacher_model_kind", ("ema",))),
    **dict.fromkeys(("vllm_server_base_url", "vllm_server_timeout", "vllm_weights_dir"), ("vllm_mode", ("server",))),
    "drift_min_length": ("pruning", ("drift", "random")),
    "pruning_match": ("pruning", ("fixed", "random")),
}
"""Settings that have an effect with some choices of another setting only: that setting, and the choices."""

ANSWERED = "an evaluation answers prompts with the student as it is trained, and compute_metrics gets the completions"
WITHOUT_EFFECT: Mapping[str, str] = {
    "remove_unused_columns": "prompts, and what their teachers read, are columns of the dataset",
    "label_smoothing_factor": "the loss compares two distributions and knows no labels",
    "auto_find_batch_size": "it would change how many rollouts a step has: lower per_device_train_batch_size and raise "
    "gradient_accumulation_steps, or set generation_batch_size",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "include_for_metrics"), ANSWERED),
    **dict.fromkeys(("batch_eval_metrics", "eval_accumulation_steps", "eval_do_concat_batches"), ANSWERED),
    **dict.fromkeys(("eval_use_gather_object", "label_names"), ANSWERED),
}
"""Settings of Transformers that do not act here, and why."""


def check_rules(args: "PruneOPDConfig") -> None:
    """Refuse a value outside of its range, and a setting that cannot act."""
    for item in fields(args):
        value, accepted = getattr(args, item.name), item.metadata.get("choices")
        chosen = value is not None or item.default is not None
        named = [value]
        if item.name == "ddp_backend" and value is not None:  # torch takes one for each device: "cpu:gloo,cuda:nccl"
            named = [part.rpartition(":")[2] for part in value.split(",")]
        if accepted is not None and chosen and any(one not in accepted for one in named):
            raise ConfigError(f"{item.name} must be one of {', '.join(accepted)}, got {value!r}")
    for words, (lies_inside, listed) in RANGES.items():
        for name in listed.split():
            value = getattr(args, name)
            if value is not None and not lies_inside(value) and not (math.isfinite(value) and is_unread(args, name)):
                raise ConfigError(f"{name} must {words}, got {value}")
    if is_changed(args, "teacher_model_server_timeout") and not (args.teacher_model_server_url or args.teacher_models):
        raise ConfigError(
            "teacher_model_server_timeout has no effect without teacher_model_server_url or teacher_models"
        )
    names = ("teacher_quantization_config", "offload_teacher", "shard_teacher")
    refuse_beside_server(args.teacher_model_server_url, **{name: getattr(args, name) for name in names})
    if args.shard_teacher and args.offload_teacher:
        raise ConfigError("shard_teacher and offload_teacher contradict each other: leave one of them out")
    for name in ("shard_teacher", "fsdp"):
        if getattr(args, name) and args.world_size == 1:
            raise ConfigError(f"{name} needs several processes: start with accelerate launch, or leave it out")
    if args.save_strategy == "best" and (args.eval_strategy == "no" or args.metric_for_best_model is None):
        raise ConfigError("save_strategy='best' needs metric_for_best_model, and an eval_strategy that measures it")
    for other in ("loss_type", "vllm_mode", "rollout_engine", "teacher_model_kind"):
        for name in without_effect(args, other):
            raise ConfigError(
                f"{name}={getattr(args, name)!r} has no effect with {other}={getattr(args, other)!r}: it is for "
                f"{' or '.join(ACTS_WITH[name][1])}"
            )
    for name, reason in WITHOUT_EFFECT.items():
        if is_changed(args, name):
            raise ConfigError(f"{name}={getattr(args, name)!r} has no effect here: {reason}")
    if args.num_iterations == 1 and (clips := [name for name in CLIPS if is_changed(args, name)]):
        raise ConfigError(
            f"{clips[0]}={getattr(args, clips[0])!r} has no effect with num_iterations=1, where nothing is ever clipped"
        )


def is_unread(args: "PruneOPDConfig", name: str) -> bool:
    """Whether Transformers does not look at this number beside what was chosen for others, whatever number it is."""
    unread = {
        "num_train_epochs": args.max_steps > 0,
        "logging_steps": args.logging_strategy != "steps",
        "save_steps": args.save_strategy != "steps",
        "eval_steps": args.eval_strategy != "steps",
        "eval_delay": args.eval_strategy == "no",
    }
    return unread.get(name, False)


def refuse_beside_server(url: str | None, **settings: Any) -> None:
    """Refuse settings of how the teacher is loaded, by name, where servers at a URL have loaded it."""
    for name, value in settings.items():
        if url and value:
            raise ConfigError(
                f"{name} is for a teacher that is loaded here, and servers at teacher_model_server_url load their own (vllm serve "
                "--quantization quantizes it there): leave one of the two out"
            )


def check_needs(args: "PruneOPDConfig") -> None:
    """Refuse an optimizer, a schedule, a quantization or kernels that lack a package or an argument, before a model is loaded."""
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError("use_liger_kernel needs a package: pip install liger-kernel, or leave the setting out")
    of_student = args.dictionary("model_init_kwargs").get("quantization_config")
    for settings in (of_student, args.dictionary("teacher_quantization_config")):
        if settings and isinstance(settings, dict):
            quantization(settings)
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        if "to pass a " not in str(error):  # some see the model first, which is not there yet
            raise ConfigError(f"optim={args.optim.value}, or its optim_args: {first_line(error)}") from error
    try:
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=1.0),
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value}, lr_scheduler_kwargs: {first_line(error)}"
        ) from error


def check_template(template: str) -> None:
    """Refuse a `teacher_prompt_template` that is none, or that names no column."""
    try:
        columns = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ConfigError(
            f"teacher_prompt_template {template!r} is no template ({error}): columns stand in braces, others are written twice"
        ) from error
    if not columns:
        raise ConfigError(
            f"teacher_prompt_template {template!r} names no column of the dataset, so that every teacher's prompt would be the same"
        )


def is_changed(args: "PruneOPDConfig", name: str) -> bool:
    """Whether a setting is another than its default."""
    setting = type(args).__dataclass_fields__[name]
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    return getattr(args, name) != default


def without_effect(args: "PruneOPDConfig", other: str) -> list[str]:
    """Settings that were changed and have no effect with what was chosen for another setting."""
    acting = {name: choices for name, (setting, choices) in ACTS_WITH.items() if setting == other}
    return [name for name, choices in acting.items() if is_changed(args, name) and getattr(args, other) not in choices]
