"""Checkpoints that are whole or not there: written aside, moved into place by one rename, deleted by the same way back.

A checkpoint is written into `.unfinished/checkpoint-STEP` and renamed to `checkpoint-STEP` when every process is done, so a
run that is killed at any moment leaves complete checkpoints only. Folders of other origin are checked all the same: one
counts as complete when the Trainer's state, which is written last, and ours can be read.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prune_opd_hf.errors import FileFormatError
from prune_opd_hf.records.rollouts import Rollouts

STATE_FILE = "prune_opd_state.json"
TRAINER_STATE_FILE = "trainer_state.json"
UNFINISHED = ".unfinished"
"""Folder beside the checkpoints where those stand that are being written or deleted."""


def save_state(checkpoint: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write our state into a checkpoint folder, atomically."""
    folder = Path(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{STATE_FILE}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(state, file, indent=2)
    os.replace(temporary, folder / STATE_FILE)


def load_state(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        FileFormatError: the checkpoint has none, or it is cut short.
    """
    path = Path(checkpoint) / STATE_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"{checkpoint} is not a complete checkpoint of PruneOPDTrainer: {STATE_FILE} cannot be read ({error})"
        ) from error


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete checkpoint with the most steps in a run's folder; None where there is none."""
    for _, folder in sorted(_numbered(output_dir), reverse=True):
        if _is_complete(folder):
            return str(folder)
    return None


def _numbered(output_dir: str | os.PathLike) -> list[tuple[int, Path]]:
    folders = Path(output_dir).glob("checkpoint-*")
    return [(int(match[1]), folder) for folder in folders if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))]


def _is_complete(folder: Path) -> bool:
    try:
        json.loads((folder / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
        load_state(folder)
    except (OSError, ValueError):
        return False
    return True


def put_in_place(unfinished: str | os.PathLike, final: str | os.PathLike) -> None:
    """Move a finished checkpoint to where it belongs; one that stands there already is moved aside first and deleted."""
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
    leaves by a rename, so none is ever seen half deleted.

    Args:
        output_dir: the run's folder.
        keep: how many complete checkpoints stay; None or 0 keeps all.
        protected: checkpoints that stay in any case: the one just written, and the best.
        resumable: whether checkpoints hold all that resuming needs, or weights only.
    """
    if not keep:
        return
    stay = {Path(path).resolve() for path in protected if path is not None}
    complete = [folder for _, folder in sorted(_numbered(output_dir)) if _is_complete(folder) or not resumable]
    surplus = len(complete) - max(keep, len(stay))
    for folder in [folder for folder in complete if folder.resolve() not in stay][: max(surplus, 0)]:
        doomed = Path(output_dir) / UNFINISHED / f"{folder.name}.old"
        doomed.parent.mkdir(exist_ok=True)
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def save_reused(checkpoint: str | os.PathLike, process: int, samples: Sequence[dict[str, Any]]) -> None:
    """Save the rollouts of a step that further updates will reuse, with their old log-probabilities."""
    folder = Path(checkpoint)
    Rollouts.cat([sample["rollouts"] for sample in samples]).save(folder / f"reused_rollouts_{process}.safetensors")
    rest = {
        "rows": [len(sample["rollouts"]) for sample in samples],
        "old": [sample["old"].get("log_probs") for sample in samples],
    }
    torch.save(rest, folder / f"reused_old_{process}.pt")


def load_reused(checkpoint: str | os.PathLike, process: int, device: torch.device) -> list[dict[str, Any]]:
    """What `save_reused` saved on this process; empty where a checkpoint has none."""
    path = Path(checkpoint) / f"reused_rollouts_{process}.safetensors"
    if not path.is_file():
        return []
    rollouts = Rollouts.load(path).to(device)
    rest = torch.load(Path(checkpoint) / f"reused_old_{process}.pt", map_location=device, weights_only=True)
    samples = []
    rows = torch.arange(len(rollouts), device=device).split(rest["rows"])
    for index, old in zip(rows, rest["old"], strict=True):
        part = rollouts.select(index)
        samples.append(
            {"input_ids": part.sequences, "rollouts": part, "old": {} if old is None else {"log_probs": old}}
        )
    return samples
