"""Files on disk: one atomic writer, one JSON reader, one typed reader of records, one rule of what may be published.

Every other module goes through these. It knows neither models nor what a record means.

A record is a frozen dataclass of plain values. Its file is JSON: {"kind": ..., "version": ..., KEY: the fields}, where KEY is
the last word of the kind ("report" of "prune_opd_hf.evaluation_report").
"""

import difflib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path, PurePath
from typing import Any, ClassVar, TypeVar
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from prune_opd_hf.errors import ConfigError, FileFormatError
from prune_opd_hf.records.folders import naming_full_disk

T = TypeVar("T")

FREE_TEXT = {"free_text": True}
"""`field(metadata=FREE_TEXT)`: a text of somebody's own, such as a prompt, which may hold line breaks and any character."""

_LARGEST_INT = 2**64
_LONGEST_VALUE = 80
"""Characters of a wrong value that an error message shows."""

_MACHINE_PATH = re.compile(r"(?:/[^/\s]+/|~[\w.-]*/|\.{1,2}[/\\]|\\\\|[A-Za-z]:[/\\]|file:[/\\])", re.IGNORECASE)
_SECRET_SETTING = re.compile(
    r"^token$|(?:^|_)(?:hub_token|auth_token|access_token|api_?key|secrets?|passwords?|passwd|credentials?)(?:$|_)",
    re.IGNORECASE,
)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the same folder that becomes `path` if the block succeeds, and is removed if it fails.

    The folder is made where it is missing. The file gets the mode of any other new file, whatever wrote it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(f"{folder}/notes.txt") as temporary:
        ...         _ = temporary.write_text("complete")
        ...     Path(folder, "notes.txt").read_text()
        'complete'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid4().hex}.{target.name}")
    try:
        with naming_full_disk(target):
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors, for one, leaves a file that its owner alone may read
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file atomically, with the line ends of `text`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write plain values as JSON, atomically."""
    write_text(path, _to_json(value))


class SavedRecord:
    """A frozen dataclass with a JSON file of its own, or of a usual name inside a folder."""

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1
    FILE_NAME: ClassVar[str]

    def to_json(self) -> str:
        """The whole record, with its kind and version.

        Raises:
            ConfigError: a field that `from_json` would refuse.
        """
        return dump_record(self, self.KIND, self.VERSION)

    @classmethod
    def from_json(cls: type[T], text: str) -> T:
        """Read what `to_json` wrote.

        Raises:
            FileFormatError: it is something else, of another version, or has a value outside its range.
        """
        return _load_saved(cls, text)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the record atomically.

        Args:
            path: a file whose name ends in .json, or a folder, which gets it under its usual name.

        Returns:
            The file.
        """
        target = Path(path)
        if target.suffix != ".json" or target.is_dir():
            target /= self.FILE_NAME
        write_text(target, self.to_json())
        return target

    @classmethod
    def load(cls: type[T], path: str | os.PathLike[str]) -> T:
        """Read the file that `save` wrote, or the one in a folder.

        Raises:
            FileFormatError: there is none, or `from_json` refuses it.
        """
        return _load_saved(cls, Path(path))


def _load_saved(cls: Any, source: str | Path) -> Any:
    source = source / cls.FILE_NAME if isinstance(source, Path) and source.is_dir() else source
    return load_record(cls, source, cls.KIND, cls.VERSION, cls.KIND.partition(".")[2].replace("_", " "))


def read_json(source: str | Path, what: str = "JSON file") -> dict[str, Any]:
    """A JSON object from a `Path` to read, or from the JSON text itself; messages call it `what`.

    Raises:
        FileFormatError: no such file, not UTF-8, cut short, no object, nested too deeply, or a number that is not finite
            or beyond 64 bits.

    Example:
        >>> read_json('{"steps": 3}')
        {'steps': 3}
        >>> read_json('{"steps": NaN}', "summary")
        Traceback (most recent call last):
        prune_opd_hf.errors.FileFormatError: not a valid summary: it is not complete JSON (NaN is no finite number)
    """
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    except FileNotFoundError as error:
        raise FileFormatError(f"no such file: {printable(str(source))} (no {what})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{_named(source, what)}: {first_line(error)}") from error
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_bounded)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{_named(source, what)}: it is not complete JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{_named(source, what)}: it must be a JSON object, got {_shown(value)}")
    return value


def read_yaml(path: str | os.PathLike[str], known: Collection[str] | None = None) -> dict[str, Any]:
    """The fields of a YAML file; 2e-4 is a number there, which plain YAML 1.1 takes for text.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a field that is not `known`.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            names = [name.value for name, _ in node.value]
            for name, _ in node.value:
                if names.count(name.value) > 1:
                    raise yaml.YAMLError(f"line {name.start_mark.line + 1}: {name.value!r} is there twice")
            return node

    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"no such file: {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {printable(' '.join(str(error).split()))}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold fields with values, got {_shown(values)}")
    if known is not None:
        refuse_unknown(values, known, str(path))
    return values


def refuse_unknown(values: Iterable[object], known: Collection[str], where: str) -> None:
    """Refuse names that are not known, with the nearest ones that there are.

    Example:
        >>> refuse_unknown(["drift_treshold"], ["drift_threshold", "seed"], "train.yaml")
        Traceback (most recent call last):
        prune_opd_hf.errors.ConfigError: train.yaml has an unknown field 'drift_treshold'; did you mean drift_threshold?
    """
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{where} has an unknown field {_shown(name)}{hint}")


def dump_record(record: Any, kind: str, version: int) -> str:
    """A dataclass as JSON text with its kind and version. What was dumped can be loaded.

    Raises:
        ConfigError: a value that `load_record` would refuse.
    """
    check_values(record)
    try:
        text = _to_json({"kind": kind, "version": version, _key(kind): asdict(record)})
        load_record(type(record), text, kind, version, type(record).__name__)
    except (FileFormatError, TypeError, ValueError) as error:
        raise ConfigError(f"this {type(record).__name__} cannot be saved: {first_line(error)}") from error
    return text


def load_record(cls: type[T], source: str | Path, kind: str, version: int, what: str) -> T:
    """Read what `dump_record` wrote: every field of the type that the dataclass states, every text printable.

    Raises:
        FileFormatError: anything else, in one line that names the file, the field and what was found.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Note:
        ...     steps: int
        >>> load_record(Note, dump_record(Note(3), "my_note", 1), "my_note", 1, "note")
        Note(steps=3)
        >>> load_record(Note, '{"kind": "my_note", "version": 1, "note": {"steps": "three"}}', "my_note", 1, "note")
        Traceback (most recent call last):
        prune_opd_hf.errors.FileFormatError: not a valid note: steps: input should be a valid integer, got 'three'
    """
    document = read_json(source, what)
    if document.get("kind") != kind:
        raise FileFormatError(
            f"{_named(source, what)}: its 'kind' should be {kind!r}, got {_shown(document.get('kind'))}"
        )
    if document.get("version") != version or isinstance(document.get("version"), (bool, float)):
        raise FileFormatError(
            f"{_named(source, what)}: it has version {_shown(document.get('version'))}, this package reads version "
            f"{version}: use the package version that wrote it"
        )
    return parse_record(cls, document.get(_key(kind)), _named(source, what))


def parse_record(cls: type[T], values: Any, where: str) -> T:
    """A dataclass from plain JSON values.

    Raises:
        FileFormatError: a field is missing, unknown, of another type or outside its range; `where` begins the message.
    """
    try:
        record: T = _reader(cls).validate_json(json.dumps(values), strict=True, extra="forbid")
        check_values(record)
    except ValidationError as error:
        raise FileFormatError(f"{where}: {_first_fault(error)}") from error
    except (ConfigError, ArithmeticError, LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{where}: {first_line(error)}") from error
    return record


def check_values(value: Any, where: str = "") -> None:
    """Every number finite and every text printable, at any depth of dataclasses, mappings and sequences.

    Fields marked `FREE_TEXT` may hold any character that UTF-8 can write.

    Raises:
        ConfigError: names the first value that is not.

    Example:
        >>> check_values({"versions": {"torch": float("nan")}})
        Traceback (most recent call last):
        prune_opd_hf.errors.ConfigError: versions.torch must be a finite number, got nan
    """
    if is_dataclass(value):
        for item in fields(value):
            place, content = _join(where, item.name), getattr(value, item.name)
            if item.metadata.get("free_text") and isinstance(content, str):
                if any("\ud800" <= character <= "\udfff" for character in content):  # lone surrogates
                    raise ConfigError(f"{place} must be text that UTF-8 can write, got {_shown(content)}")
            else:
                check_values(content, place)
    elif isinstance(value, str):
        if not value.isprintable():
            raise ConfigError(f"{where or 'text'} must hold printable characters alone, got {_shown(value)}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{where or 'a number'} must be a finite number, got {value}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_values(key, f"a name in {where}" if where else "a name")
            check_values(item, _join(where, str(key)))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_values(item, _join(where, str(index)))


def publishable(value: Any) -> Any:
    """`value` as plain JSON that may leave this machine: no path of it, no setting that is named like a secret.

    Scalars of tensors and arrays become numbers, NaN and infinity null, and characters that do not print are escaped.

    Example:
        >>> publishable({"path": "~/runs/x/", "loss": float("nan"), "betas": (0.9, 0.95), "api_key": "abc"})
        {'path': 'x (local)', 'loss': None, 'betas': [0.9, 0.95]}
        >>> publishable("Qwen/Qwen3-1.7B")
        'Qwen/Qwen3-1.7B'
    """
    if isinstance(value, Enum):
        return publishable(value.value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return printable(f"{value.name} (local)")
    if isinstance(value, Mapping):
        return {
            _without_machine_path(str(key)): publishable(item)
            for key, item in value.items()
            if not _SECRET_SETTING.search(str(key))
        }
    if isinstance(value, (list, tuple)):
        return [publishable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((publishable(item) for item in value), key=str)
    if not isinstance(value, str) and hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return publishable(value.tolist())
    return _without_machine_path(str(value))


def check_publishable_name(what: str, value: str) -> None:
    """Refuse a name that tells something about this machine, is empty, or does not print.

    Example:
        >>> check_publishable_name("model_name", "Qwen/Qwen3-1.7B")
        >>> check_publishable_name("name", "../student")
        Traceback (most recent call last):
        prune_opd_hf.errors.ConfigError: name will be published: give a Hub id or a file's or folder's name alone, got '../student'
    """
    if not value or value[0] in "/~." or publishable(value) != value:
        raise ConfigError(
            f"{what} will be published: give a Hub id or a file's or folder's name alone, got {_shown(value)}"
        )


def first_line(error: BaseException) -> str:
    """What an error says, in one printable line; its type's name where it says nothing. Behind a colon the next line counts too.

    Example:
        >>> first_line(ValueError("no such thing\\nand a long explanation")), first_line(KeyError())
        ('no such thing', 'KeyError')
        >>> first_line(RuntimeError("errors in loading:\\n\\tsize mismatch"))
        'errors in loading: size mismatch'
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if lines and lines[0].endswith(":"):
        lines[0] = " ".join(lines[:2])
    return printable(lines[0]) if lines else type(error).__name__


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text for a terminal: control and bidirectional characters, odd blanks and lone surrogates are escaped.

    With `lines`, line breaks and tabs are kept.

    Example:
        >>> printable("clear \x1b[2J\nthis")
        'clear \\x1b[2J\\nthis'
    """
    kept = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


_reader: Any = cache(TypeAdapter)


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    place = ".".join(printable(str(part)) for part in fault["loc"] if not str(part).startswith(("dict[", "tuple[")))
    if fault["type"] == "value_error":  # what the record itself refused
        return first_line(fault["ctx"]["error"])
    message = fault["msg"][0].lower() + fault["msg"][1:]
    if fault["type"] in ("missing", "unexpected_keyword_argument"):
        return f"{place or 'its content'}: {'field required' if fault['type'] == 'missing' else 'unknown field'}"
    return f"{place + ': ' if place else ''}{message}, got {_shown(fault['input'])}"


def _shown(value: Any) -> str:
    try:
        text = printable(repr(value))
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nested too deeply
        text = type(value).__name__
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _named(source: str | Path, what: str) -> str:
    return f"{printable(str(source))} is not a valid {what}" if isinstance(source, Path) else f"not a valid {what}"


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _key(kind: str) -> str:
    return re.split(r"[._]", kind)[-1]


def _join(where: str, name: str) -> str:
    return f"{where}.{printable(name)}" if where else printable(name)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no finite number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text[:_LONGEST_VALUE])


def _bounded(text: str) -> int:
    value = int(text)
    if abs(value) > _LARGEST_INT:
        raise ValueError(f"a whole number of {len(text)} digits is too large")
    return value


def _without_machine_path(text: str) -> str:
    text = printable(text)
    if not _MACHINE_PATH.match(text):
        return text
    last = re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return f"{last or 'root'} (local)"
