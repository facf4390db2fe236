"""The part of a checkpoint that is ours, and which checkpoints are whole.

The Trainer writes `trainer_state.json` last, after weights, optimizer, random states and our own state. A checkpoint counts
as complete when that file and ours can be read.
"""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from prune_opd_hf.errors import FileFormatError

STATE_FILE = "prune_opd_state.json"
TRAINER_STATE_FILE = "trainer_state.json"


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
    folders = Path(output_dir).glob("checkpoint-*")
    numbered = [
        (int(match[1]), folder) for folder in folders if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    ]
    for _, folder in sorted(numbered, reverse=True):
        if _is_complete(folder):
            return str(folder)
    return None


def _is_complete(folder: Path) -> bool:
    try:
        json.loads((folder / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
        load_state(folder)
    except (OSError, ValueError):
        return False
    return True
