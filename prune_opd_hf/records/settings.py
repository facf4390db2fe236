"""A setting: a field of a dataclass that a command line and YAML files read, with its default and what `--help` says of it.

What a file or a caller gives gets the type that the field states; any other is refused in one line.
"""

from collections.abc import Mapping
from dataclasses import MISSING, field
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.records.files import printable


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A field with this default, a list's anew for each record; `NEEDED` has none."""
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


NEEDED: Any = MISSING
"""In place of the default of a setting that must be given."""

PLAIN = (NoneType, bool, int, float, str, list, dict)
OF_ANY_TYPE = ("fsdp",)
"""Transformers takes true here as well, whatever its annotation says."""

WORD_OR_PATH = ("resume_from_checkpoint",)
"""Text that may be the word true, which YAML reads as no text."""

IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}


def typed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, those that are text made numbers where a field is one, and one alone a list where a field is a list.

    Objects, such as a model, and names that are no field stay as they are.

    Raises:
        ConfigError: a value of another type; names the field, what it takes and what was found.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Settings:
        ...     rate: float = 0.1
        ...     ends: list[int] | None = None
        >>> typed(Settings, {"rate": "2e-4", "ends": 5})
        {'rate': 0.0002, 'ends': [5]}
        >>> typed(Settings, {"rate": None})
        Traceback (most recent call last):
        prune_opd_hf.errors.ConfigError: rate must be a number, got None
    """
    hints = get_type_hints(cls)
    return {name: _typed(name, value, hints.get(name, Any)) for name, value in values.items()}


def _typed(name: str, value: Any, hint: Any) -> Any:
    kinds = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    if name in OF_ANY_TYPE or not isinstance(value, PLAIN):
        return value
    if name in WORD_OR_PATH and isinstance(value, bool):
        return str(value).lower()
    if any(get_origin(kind) is list for kind in kinds) and str not in kinds and isinstance(value, int | float | str):
        value = [value]
    choices = [kind for kind in kinds if _is_enum(kind)]
    read = choices[0] if choices and isinstance(value, str) else hint  # beside them Transformers' hints have any text
    try:  # true is no number, and 2.0 no whole one
        made = _reader(read).validate_python(value, strict=isinstance(value, bool | float))
    except ValidationError as error:
        if isinstance(value, int | float) and {*kinds} <= {str, NoneType, *choices}:
            raise ConfigError(
                f"{name} is text, got {value}: put it in quotes, or YAML reads it as a number, true or false"
            ) from error
        accepted = " or ".join(map(_in_words, choices or kinds))
        raise ConfigError(f"{name} must be {accepted}, got {printable(repr(value)):.80}") from error
    return value if choices or (isinstance(value, int) and isinstance(made, float)) else made


def _in_words(kind: Any) -> str:
    if get_origin(kind) is list:
        return f"a list ({_in_words(*get_args(kind))} each)"
    if _is_enum(kind):
        return f"one of {', '.join(str(one.value) for one in kind)}"
    return "a mapping" if dict in (kind, get_origin(kind)) else IN_WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


_reader: Any = cache(TypeAdapter)
