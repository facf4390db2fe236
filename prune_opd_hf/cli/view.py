"""The command line of the drift viewer: `prune-opd view ROLLOUTS -o drift.html`. Thin over `write_drift_view`."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prune_opd_hf.errors import InputError
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.viewer.document import DEFAULT_CANDIDATES, check_output, write_drift_view

EMBEDDED = "embedded"
"""Stands for the tokenizer of the embedded task, as in the other commands."""


@dataclass(frozen=True)
class ViewArguments:
    """Arguments of `prune-opd view`."""

    rollouts: str = field(metadata={"help": "a file that Rollouts.save wrote"})
    output: str = field(
        default="drift.html",
        metadata={"aliases": ["-o"], "help": "the HTML file; it needs no network and nothing beside it"},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of the student's tokenizer, to read text instead of token ids; 'embedded' for the "
            "embedded task"
        },
    )
    limit: int | None = field(default=None, metadata={"help": "take the first so many rollouts only"})
    candidates: int = field(
        default=DEFAULT_CANDIDATES,
        metadata={"help": "how many of each model's top-k to keep at each position; most of the file's size"},
    )
    force: bool = field(default=False, metadata={"help": "replace the output if it exists"})

    def __post_init__(self) -> None:
        for name in ("limit", "candidates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, got {value}")


def view(arguments: ViewArguments) -> int:
    """Write the viewer and say where it lies.

    Returns:
        The exit code, 0.

    Raises:
        FileNotFoundError, FileFormatError: the rollouts cannot be read.
        InputError: the output or the tokenizer does not fit.
        VocabularyMismatchError: the tokenizer is of another vocabulary.
    """
    output = Path(arguments.output)
    check_output(output, arguments.force)
    rollouts = Rollouts.load(arguments.rollouts)
    tokenizer = None if arguments.tokenizer is None else _load_tokenizer(arguments.tokenizer)
    name = None if arguments.tokenizer is None else os.path.basename(os.path.normpath(arguments.tokenizer))
    write_drift_view(
        rollouts,
        output,
        tokenizer=tokenizer,
        tokenizer_name=name,
        source=Path(arguments.rollouts).name,
        candidates=arguments.candidates,
        limit=arguments.limit,
        force=arguments.force,
    )
    shown = len(rollouts) if arguments.limit is None else min(arguments.limit, len(rollouts))
    tokens = int(rollouts.lengths[:shown].sum())
    print(f"{output}: {shown} rollouts, {tokens:,} tokens, {output.stat().st_size / 1e6:.1f} MB. Open it in a browser.")
    if tokenizer is None:
        print("It shows token ids; pass --tokenizer to read text.", file=sys.stderr)
    return 0


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from prune_opd_hf.tasks.pair import WEIGHTS

    try:
        return AutoTokenizer.from_pretrained(os.fspath(WEIGHTS / "student") if name == EMBEDDED else name)
    except Exception as error:  # Transformers raises by its mood: OSError, ValueError, KeyError, JSON and Hub errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load the tokenizer {name!r}: {reason}") from error
