"""A setting: a field of a dataclass that a command line reads, with its default and what `--help` says of it."""

from dataclasses import MISSING, field
from typing import Any


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A field with this default, a list's anew for each record; `NEEDED` has none."""
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


NEEDED: Any = MISSING
"""In place of the default of a setting that must be given."""
