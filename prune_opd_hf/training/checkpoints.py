"""Atomic checkpoints: write to `.unfinished/checkpoint-STEP`, then rename to `checkpoint-STEP`; deleted by a rename as well.

The rename comes when every process is done, so a run that is killed at any moment leaves complete checkpoints only. The Trainer's
own way is to write file by file in place, and to delete old checkpoints before every process has written. Folders of other origin
are checked all the same: one counts as complete when the Trainer's state, which is written last, and ours can be read.
"""

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.models.loading import is_adapted
from prune_opd_hf.records.files import SavedRecord
from prune_opd_hf.records.folders import check_room, naming_full_disk
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.metrics import MetricMeans, TokenCounts
from prune_opd_hf.training.micro_batches import StepRollouts, micro_batch
from prune_opd_hf.training.safeguards import SafeguardsState
from prune_opd_hf.training.saved_student import SavedForm

TRAINER_STATE_FILE = "trainer_state.json"
GO_ON = "nothing was saved: make room and go on with resume_from_checkpoint, the last complete checkpoint is untouched"
UNFINISHED = ".unfinished"
"""Folder beside the checkpoints where those stand that are being written or deleted."""
TWO_MOMENTS = ("adamw_torch", "adamw_torch_fused")
"""Values of `optim` whose optimizer keeps two numbers for each weight, of the weight's dtype; others keep fewer or smaller ones."""


class AtomicSavingTrainer(Trainer):
    """Base of a Trainer whose checkpoints are atomic, and whose students are saved in the form `saved_form`."""

    saved_form: SavedForm
    _is_saving = False

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if self.optimizer is not None:
            moved = {id(weight) for group in self.optimizer.param_groups for weight in group["params"]}
            if not any(weight.requires_grad and id(weight) in moved for weight in self.model.parameters()):
                raise ConfigError("optimizers holds no weight that is trained: make it of the (PEFT) model passed")
        if self.args.should_save:
            check_disk(self.model, self.args, self.optimizer)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint aside, rename it when all processes are done, and only then delete old ones."""
        args, name = self.args, f"checkpoint-{self.state.global_step}"
        limit, args.save_total_limit = args.save_total_limit, None
        self._is_saving = True
        try:
            unfinished = os.path.join(self._get_output_dir(trial), name)
            if args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            with naming_full_disk(args.output_dir, GO_ON):
                super()._save_checkpoint(model, trial)
        finally:
            self._is_saving, args.save_total_limit = False, limit
        self.accelerator.wait_for_everyone()
        final = os.path.join(self._get_output_dir(trial), name)
        best = self.state.best_model_checkpoint
        if best is not None and os.path.abspath(best) == os.path.abspath(unfinished):
            self.state.best_model_checkpoint = best = final
            if args.should_save:
                self.state.save_to_json(os.path.join(unfinished, TRAINER_STATE_FILE))
        if args.should_save:
            rename_finished(unfinished, final)
            delete_old_checkpoints(os.path.dirname(final), limit, [final, best], resumable=not args.save_only_model)
            with suppress(OSError):  # not empty: left by a run that was killed
                os.rmdir(os.path.dirname(unfinished))
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the student; in a checkpoint with the weights as they are trained, so that a run goes on as it was."""
        form = replace(self.saved_form, dtype=None) if self._is_saving else self.saved_form
        folder = self.args.output_dir if output_dir is None else output_dir
        form.prepare(self.model)
        with naming_full_disk(folder, GO_ON):
            super()._save(output_dir, form.weights(self.model, state_dict))
            if self.args.should_save:
                form.complete(self.model, folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints are not sent to the Hub: there they would be weights without a card."""


def check_disk(model: nn.Module, args: PruneOPDConfig, optimizer: Any = None) -> None:
    """Refuse a disk that does not hold the student and, where there are checkpoints, one of them.

    Args:
        optimizer: given in place of `args.optim`; what it keeps is not known and not counted.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = trained if is_adapted(model) else list(model.parameters())
    needed, what = _bytes(saved, args.save_dtype), "the student"
    if args.save_strategy != "no":
        keeps_moments = optimizer is None and not args.save_only_model and args.optim in TWO_MOMENTS
        keeps_average = args.teacher_model_kind == "ema" and not args.save_only_model
        needed += _bytes(saved) + (2 * keeps_moments + keeps_average) * _bytes(trained)
        what = "the student with one checkpoint (less with save_only_model or save_strategy no)"
    check_room(args.output_dir, needed, what)


def _bytes(weights: Iterable[Tensor], dtype: str | None = None) -> int:
    """What weights take in their own dtype, or in another."""
    size = None if dtype is None else getattr(torch, dtype).itemsize
    return sum(weight.numel() * (size or weight.element_size()) for weight in weights)


def rename_finished(unfinished: str | os.PathLike, final: str | os.PathLike) -> None:
    """Rename a finished checkpoint to its final name; one of that name is moved aside first and deleted."""
    unfinished, final = Path(unfinished), Path(final)
    for file in unfinished.iterdir():
        if file.is_file():
            _flush(file)
    aside = unfinished.with_name(f"{final.name}.replaced")
    if final.exists():
        os.replace(final, aside)
    os.replace(unfinished, final)
    _flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_old_checkpoints(
    output_dir: str | os.PathLike, keep: int | None, protected: Sequence[str | None], *, resumable: bool = True
) -> None:
    """Delete the oldest complete checkpoints beyond `keep`.

    Only complete ones count, so a half-written folder of other origin never costs a complete one its place. A checkpoint
    is renamed before it is deleted, so none is ever seen half deleted. `protected` ones stay in any case: the one just written,
    and the best. Those that are not `resumable` hold weights only.
    """
    if keep is None or keep <= 0:  # all, as in Transformers
        return
    stay = {Path(path).resolve() for path in protected if path is not None}
    complete = [folder for _, folder in sorted(_numbered(output_dir)) if is_complete(folder) or not resumable]
    surplus = len(complete) - max(keep, len(stay))
    for folder in [folder for folder in complete if folder.resolve() not in stay][: max(surplus, 0)]:
        doomed = Path(output_dir) / UNFINISHED / f"{folder.name}.old"
        doomed.parent.mkdir(exist_ok=True)
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def complete_checkpoint(named: str | bool, output_dir: str | os.PathLike, unchanging: Mapping[str, Any]) -> str:
    """The checkpoint to go on from: the folder that is named, or with True the last complete one in `output_dir`. One that was
    saved with another value of what is `unchanging`, by names of `TrainingState`, is refused."""
    found = last_complete_checkpoint(output_dir) if named is True else str(named)
    if found is None:
        raise ConfigError(f"no complete checkpoint in {output_dir}: train without resume_from_checkpoint")
    if not is_complete(found):
        raise ConfigError(f"{found} is no complete checkpoint of PruneOPDTrainer")
    state = TrainingState.load(found)
    for name, now in unchanging.items():
        if (was := getattr(state, name)) != now:
            raise ConfigError(
                f"{found} was trained with {name}={was!r}, and this run has {now!r}: go on with the settings, the model and the "
                "adapter as they were, or begin a run anew in another output_dir"
            )
    return found


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete checkpoint with the most steps in a run's folder; None where there is none."""
    return next((str(folder) for _, folder in sorted(_numbered(output_dir), reverse=True) if is_complete(folder)), None)


def how_to_resume(output_dir: str | os.PathLike) -> str:
    """What an interrupted run leaves, and what goes on from there."""
    checkpoint = last_complete_checkpoint(output_dir)
    if checkpoint is None:
        return "no checkpoint was saved yet (save_steps): with resume_from_checkpoint true the command begins anew"
    return f"the last checkpoint is {checkpoint}: with resume_from_checkpoint true the same run goes on from there"


def _numbered(output_dir: str | os.PathLike) -> list[tuple[int, Path]]:
    folders = Path(output_dir).glob("checkpoint-*")
    return [(int(match[1]), folder) for folder in folders if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))]


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether a run can go on from this folder."""
    try:
        TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_FILE))
        TrainingState.load(checkpoint)
    except (OSError, ValueError, TypeError):
        return False
    return True


@dataclass(frozen=True)
class ProcessState:
    """What one process has measured since the last log line, the sum of its losses among it."""

    means: MetricMeans
    loss_since_log: float


@dataclass(frozen=True)
class TrainingState(SavedRecord):
    """What a resumed run needs beside the Trainer's own files: totals of the run, the state of each process by number, how many
    weights are trained, what kind of teacher its student is, and the class of the optimizer (None: not known)."""

    KIND: ClassVar[str] = "prune_opd_hf.training_state"
    FILE_NAME: ClassVar[str] = "prune_opd_state.json"

    pruning: dict[str, Any]
    counts: TokenCounts
    safeguards: SafeguardsState
    phase_seconds: dict[str, float]
    last_logged_step: int
    processes: list[ProcessState]
    trained_weights: int
    teacher_model_kind: str | None = None
    optimizer: str | None = None


def save_reused(checkpoint: str | os.PathLike, process: int, step: StepRollouts) -> None:
    """Save this process's rollouts of a step that further updates will reuse, with their old log-probabilities."""
    folder = Path(checkpoint)
    Rollouts.cat([batch["rollouts"] for batch in step.micro_batches]).save(
        folder / f"reused_rollouts_{process}.safetensors"
    )
    rest = {
        "rows": [len(batch["rollouts"]) for batch in step.micro_batches],
        "old": [batch["old"].values for batch in step.micro_batches],
        "token_count": step.token_count,
        "weight_sum": step.weight_sum,
    }
    torch.save(rest, folder / f"reused_old_{process}.pt")


def load_reused(checkpoint: str | os.PathLike, process: int, device: torch.device) -> StepRollouts | None:
    """What `save_reused` saved on this process; None where a checkpoint has nothing."""
    path = Path(checkpoint) / f"reused_rollouts_{process}.safetensors"
    if not path.is_file():
        return None
    rollouts = Rollouts.load(path).to(device)
    rest = torch.load(Path(checkpoint) / f"reused_old_{process}.pt", map_location="cpu", weights_only=True)
    parts = torch.arange(len(rollouts), device=device).split(rest["rows"])
    old = [None if values is None else values.to(device) for values in rest["old"]]
    batches = [micro_batch(rollouts.select(rows), values) for rows, values in zip(parts, old, strict=True)]
    return StepRollouts(rollouts, batches, rest["token_count"].to(device), rest["weight_sum"])
