"""What a user sees and keeps of a run: a readable line for each log call, rollouts on disk, the published record."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState

from prune_opd_hf.records.environment import describe_hardware, package_versions, today
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.training.config import DICTIONARIES, PruneOPDConfig
from prune_opd_hf.training.metrics import TokenCounts
from prune_opd_hf.training.setting_rules import is_changed

ROLLOUTS_FOLDER = "rollouts"


def progress_line(logs: Mapping[str, Any], step: int, max_steps: int) -> str:
    """One readable line of what the Trainer logs.

    Example:
        >>> logs = {"loss": 0.01234, "kl/sampled": 0.5, "prune/overlap": 0.71, "prune/response_length_mean": 34.2,
        ...         "budget/cap": 112, "prune/stopped_share": 0.61, "time/generate": 1.25, "time/update": 0.25}
        >>> progress_line(logs, 12, 60).replace(" | ", "|")
        'step 12/60|loss 0.0123|kl 0.500|overlap 0.71|kept 34 of 112 tokens, 61% stopped|1.50 s: generate 1.25, update 0.25'
    """
    parts = [f"step {step}/{max_steps}", f"loss {_rounded(logs['loss'], 4)}"]
    if "kl/sampled" in logs:  # the centred loss is 0 in value, so this is what falls
        parts.append(f"kl {_rounded(logs['kl/sampled'], 3)}")
    if "prune/overlap" in logs:
        parts.append(f"overlap {logs['prune/overlap']:.2f}")
    if "prune/response_length_mean" in logs:
        parts.append(
            f"kept {logs['prune/response_length_mean']:.0f} of {logs['budget/cap']:.0f} tokens, "
            f"{logs['prune/stopped_share']:.0%} stopped"
        )
    for name in ("student/entropy", "student/topk_mass"):
        if name in logs:
            parts.append(f"{name.partition('/')[2].replace('topk_', '')} {logs[name]:.2f}")
    skipped = sum(value for name, value in logs.items() if name.startswith("skipped/"))
    if skipped:
        parts.append(f"{skipped:.0f} steps skipped")
    phases = {name.removeprefix("time/"): value for name, value in logs.items() if name.startswith("time/")}
    if phases:
        by_phase = ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())
        parts.append(f"{sum(phases.values()):.2f} s: {by_phase}")
    return " | ".join(parts)


def _rounded(value: float, digits: int) -> str:
    """With so many digits behind the point; 0 has no sign.

    Example:
        >>> _rounded(-0.00001, 4), _rounded(-0.00006, 4)
        ('0.0000', '-0.0001')
    """
    return f"{round(value, digits) + 0.0:.{digits}f}"


def readable_line(logs: Mapping[str, Any] | None, state: Any) -> str | None:
    """A log call as one line; None for one that holds neither a loss nor an evaluation."""
    if not logs:
        return None
    if "loss" in logs:
        return progress_line(logs, state.global_step, state.max_steps)
    named = [f"{name.removeprefix('eval_')} {value:.4g}" for name, value in logs.items() if name.startswith("eval_")]
    return " | ".join(["evaluation", *named]) if named else None


class ProgressLine(ProgressCallback):
    """The Trainer's progress bar, with the lines that open a run and one readable line for each log call."""

    def __init__(self, opening: Sequence[str] = ()) -> None:
        super().__init__()
        self.opening = opening

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self.training_bar.write("\n".join(self.opening))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        line = readable_line(logs, state)
        if line is not None and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line)


class PlainProgressLine(PrinterCallback):
    """The same without a bar."""

    def __init__(self, opening: Sequence[str] = ()) -> None:
        self.opening = opening

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            print("\n".join(self.opening), flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        line = readable_line(logs, state)
        if line is not None and state.is_local_process_zero:
            print(line, flush=True)


def use_readable_lines(trainer: Trainer, opening: Sequence[str] = ()) -> None:
    """Put our lines in place of the dictionaries that Transformers' own two callbacks print; others stay as they are."""
    for theirs, ours in ((ProgressCallback, ProgressLine), (PrinterCallback, PlainProgressLine)):
        if any(type(callback) is theirs for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(theirs)
            trainer.add_callback(ours(opening))


def save_rollouts(rollouts: Rollouts, output_dir: str, step: int, process: int | None) -> None:
    """Store the rollouts of a step, from 1, in `output_dir/rollouts`; `process` is None where there is only one."""
    folder = Path(output_dir) / ROLLOUTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "" if process is None else f"-process-{process}"
    rollouts.save(folder / f"step-{step:06d}{suffix}.safetensors")


# ---------------------------------------------------------------------- the published record

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
    **dict.fromkeys(("teacher_model_name_or_path", "teacher_models"), "the summary's teacher"),
    **dict.fromkeys(("teacher_model_server_url", "teacher_model_server_timeout"), "of this machine and its network"),
    **dict.fromkeys(("offload_teacher", "shard_teacher", "logging_steps", "log_completions"), "changes no weight"),
    **dict.fromkeys(("num_completions_to_print", "save_rollouts_steps"), "changes no weight"),
    "pruning": "the summary's pruning",
    "loss_type": "the summary's loss",
    "remove_unused_columns": "fixed by the trainer",
    "num_generations_eval": "of evaluations",
    "use_vllm": "rollout_engine says it",
}
"""Our settings that are no hyperparameters, and why."""


def hyperparameters(args: PruneOPDConfig) -> dict[str, Any]:
    """Every setting that decides the result of a run, apart from the model, the data, the drift and the budget."""
    settings = args.to_dict() | {name: args.dictionary(name) or None for name in DICTIONARIES}
    own = [name for name in PruneOPDConfig.__annotations__ if name not in NOT_HYPERPARAMETERS]
    unused = () if args.teacher_model_kind == "ema" else ("teacher_update_rate", "teacher_sync_steps")
    names = [name for name in dict.fromkeys([*INHERITED_SETTINGS, *own]) if name not in unused]
    chosen = {
        name: settings[name]
        for name in names
        if (settings.get(name) is not None or is_changed(args, name))
        and not name.startswith(("drift_", "budget_", "eval_", "vllm_"))
    }
    return {**chosen, "processes": args.world_size, "optimizer": str(settings["optim"])}


def summary_of(
    args: PruneOPDConfig, state: TrainerState, counts: TokenCounts, phase_seconds: Mapping[str, float], **known: Any
) -> TrainingSummary:
    """The record of a run so far; fields that are `known` go before what is found here."""
    budget = args.make_budget()
    measured = [entry for entry in state.log_history if any(name == "loss" or name[:5] == "eval_" for name in entry)]
    limits = ("minimum", "step", "hit_ratio", "margin", "patience", "natural_ends")
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
            "budget": {"budget_initial": budget.length, **{f"budget_{name}": getattr(budget, name) for name in limits}},
            "hyperparameters": hyperparameters(args),
            "hardware": describe_hardware(),
            "versions": package_versions(),
            "seeds": {"seed": args.seed, "data_seed": args.seed if args.data_seed is None else args.data_seed},
            "history": measured,
            "created": today(),
            **known,
        }
    )
