"""Folders to write to: may they be used, are they free, and what is said when their disk is full.

Asked before any work is spent. It knows neither records nor models.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prune_opd_hf.errors import ConfigError, DiskFullError

FULL = 2**20
"""With fewer free bytes than this, a failure to write is one of a full disk."""

_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_A_WRITER = re.compile(rf"os error (?:{'|'.join(map(str, _ERRNOS))})\b|inline_container|PytorchStreamWriter")


def refuse_used_folder(folder: str | os.PathLike[str], remedy: str = "choose another output_dir") -> None:
    """Refuse a folder that holds something, or that is none: nothing is overwritten."""
    path = Path(folder)
    check_folder(path)
    if path.exists() and any(path.iterdir()):
        raise ConfigError(f"the output folder {path} exists and is not empty: {remedy}")


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse what can be no folder that this user writes to.

    Raises:
        ConfigError: an empty name, a file, or a place that is read-only.
    """
    if not os.fspath(folder):
        raise ConfigError("output_dir is empty: name a folder, '.' for this one")
    path = Path(folder)
    existing = _existing(path)
    if not existing.is_dir():
        raise ConfigError(f"output_dir {path} cannot be a folder, {existing} is a file: choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir {path} cannot be written, {existing} is read-only for this user: choose another")


def check_room(folder: str | os.PathLike[str], needed: int, what: str) -> None:
    """Refuse to begin what could not be saved: `what` takes so many bytes at least."""
    free = shutil.disk_usage(_existing(Path(folder))).free
    if free < needed:
        raise DiskFullError(
            f"{what} takes {needed / 1e9:.2f} GB, and the disk of {folder} has {free / 1e9:.2f} GB free: make room, or choose "
            "another output_dir"
        )


@contextmanager
def naming_full_disk(
    path: str | os.PathLike[str], remedy: str = "make room, or choose another folder"
) -> Iterator[None]:
    """Say in one line that a disk is full, whatever the library that writes to `path` raises then."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:  # safetensors' and torch's writers have errors of their own
        named = isinstance(error, OSError) and error.errno in _ERRNOS
        if not named and not _OF_A_WRITER.search(str(error)) and shutil.disk_usage(_existing(Path(path))).free >= FULL:
            raise
        raise DiskFullError(f"{path} could not be written: No space left on device; {remedy}") from error


def _existing(path: Path) -> Path:
    """The path itself, or what there is above it."""
    return next(part for part in (path, *path.absolute().parents) if part.exists())
