"""A run of the trainer as its publishable record: settings, tokens, seconds and metrics become a `TrainingSummary`."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from typing import Any

from transformers import TrainerState

from prune_opd_hf.records.environment import describe_hardware, package_versions
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.metrics import TokenCounts

HYPERPARAMETERS = (
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "num_iterations",
    "temperature",
    "top_p",
    "max_prompt_length",
    "max_completion_length",
    "pruning_length",
    "pruning_length_from",
    "pruning_match",
    "reliability_weights",
    "check_every",
    "loss_top_k",
    "loss_centered",
    "loss_weighting",
    "loss_support",
    "bf16",
    "fp16",
)
"""Settings that a training summary shows, beside those of drift and budget."""


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
    shown = {name: settings[name] for name in HYPERPARAMETERS if settings.get(name) is not None}
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
            "hyperparameters": {**shown, "processes": args.world_size, "optimizer": str(settings["optim"])},
            "hardware": describe_hardware(),
            "versions": package_versions(),
            "seeds": {"seed": args.seed, "data_seed": args.seed if args.data_seed is None else args.data_seed},
            "history": [entry for entry in state.log_history if "loss" in entry or "eval_runtime" in entry],
            "created": date.today().isoformat(),
            **known,
        }
    )
