"""A run of the trainer as its publishable record: settings, tokens, seconds and metrics become a `TrainingSummary`."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from typing import Any

from transformers import TrainerState

from prune_opd_hf.records.environment import describe_hardware, package_versions
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.training.config import DICTIONARIES, PruneOPDConfig
from prune_opd_hf.training.metrics import TokenCounts

INHERITED_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim_args",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
)
"""Settings of `TrainingArguments` that change what is learnt, beside those that the summary names elsewhere."""

NOT_HYPERPARAMETERS = {
    "teacher_model_name_or_path": "the summary's teacher",
    "pruning": "the summary's pruning",
    "loss_type": "the summary's loss",
    "remove_unused_columns": "fixed by the trainer",
    "logging_steps": "changes no weight",
    "log_completions": "changes no weight",
    "num_completions_to_print": "changes no weight",
    "save_rollouts_steps": "changes no weight",
}
"""Our settings that are no hyperparameters, and why."""


def hyperparameters(args: PruneOPDConfig) -> dict[str, Any]:
    """Every setting that decides the result of a run, apart from the model, the data, the drift and the budget.

    Example: two runs that differ in their loss are told apart.
        >>> args = PruneOPDConfig(output_dir="unused", use_cpu=True, loss_type="generalized_jsd", beta=0.5)
        >>> hyperparameters(args)["beta"]
        0.5
    """
    settings = args.to_dict() | {name: args.dictionary(name) or None for name in DICTIONARIES}
    own = [name for name in PruneOPDConfig.__annotations__ if name not in NOT_HYPERPARAMETERS]
    names = dict.fromkeys([*INHERITED_SETTINGS, *own])
    chosen = {
        name: settings[name]
        for name in names
        if settings.get(name) is not None and not name.startswith(("drift_", "budget_"))
    }
    return {**chosen, "processes": args.world_size, "optimizer": str(settings["optim"])}


def summary_of(
    args: PruneOPDConfig, state: TrainerState, counts: TokenCounts, phase_seconds: Mapping[str, float], **known: Any
) -> TrainingSummary:
    """The record of a run so far.

    Args:
        args, state: settings and state of the trainer.
        counts, phase_seconds: totals of the run.
        known: fields of `TrainingSummary` given by the caller; they go before what is found here.
    """
    settings = args.to_dict()
    return TrainingSummary(
        **{
            "dataset": "unnamed dataset",
            "loss": args.loss_type,
            "pruning": args.pruning,
            "steps": state.global_step,
            "rollouts": counts.rollouts,
            "generated_tokens": counts.generated,
            "kept_tokens": counts.kept,
            "saved_tokens": counts.saved,
            "wall_seconds": sum(phase_seconds.values()),
            "phase_seconds": phase_seconds,
            "drift": asdict(args.drift_config()),
            "budget": {name: settings[name] for name in settings if name.startswith("budget_")},
            "hyperparameters": hyperparameters(args),
            "hardware": describe_hardware(),
            "versions": package_versions(),
            "seeds": {"seed": args.seed, "data_seed": args.seed if args.data_seed is None else args.data_seed},
            "history": [entry for entry in state.log_history if "loss" in entry or "eval_runtime" in entry],
            "created": date.today().isoformat(),
            **known,
        }
    )
