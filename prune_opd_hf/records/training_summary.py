"""What a training run leaves for its readers: one record that cards, reports and later runs are made from.

Plain JSON values only; it knows neither trainers nor models. Whatever enters the record is made fit to be published:
tensors' and arrays' scalars become numbers, NaN and infinity become null, paths of this machine keep only their last
part, and settings whose name says that they are secret are left out.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

from prune_opd_hf.errors import ConfigError, FileFormatError

FILE_KIND = "prune_opd_hf.training_summary"
FILE_VERSION = 1
SUMMARY_FILE = "training_summary.json"
"""Name of the record inside a student's folder and inside its Hub repository."""

_MACHINE_PATH = re.compile(r"(?:/[^/\s]+/|~[\w.-]*/|\.{1,2}[/\\]|\\\\|[A-Za-z]:[/\\]|file:)", re.IGNORECASE)
_SECRET_SETTING = re.compile(
    r"(?:^|_)(?:hub_token|auth_token|access_token|api_?key|secrets?|passwords?|passwd|credentials?)(?:$|_)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class TrainingSummary:
    """How a student was trained: what went in, what it cost, how it went.

    Attributes:
        dataset: Hub id or name of the prompts.
        loss: name of the loss.
        pruning: "drift", "fixed", "random" or "none".
        steps: optimizer steps.
        rollouts: responses sampled.
        generated_tokens: response tokens that the student sampled, those that were cut again included.
        kept_tokens: response tokens that entered the loss.
        saved_tokens: tokens that stopped responses left unsampled below the cap of their step: an upper bound of what
            stopping saved, because some of them would have ended by themselves.
        wall_seconds: duration of the training, evaluations left out.
        student_base: Hub id or name of the model that training started from; None for a student trained from scratch.
        teacher: Hub id or name of the teacher.
        drift: the settings that decide when a token is drift.
        budget: the settings of the response budget.
        hyperparameters: every other setting that changes the result.
        phase_seconds: `wall_seconds` by phase, for example generate, teacher, update.
        hardware: devices in words.
        versions: version of each package that matters, by name.
        seeds: seed by what it seeds.
        history: the metrics logged, one mapping a log call, each with its "step".
        created: date of the run, ISO 8601.
        command: the command that repeats the run; None where there is none.
        example_prompt: a prompt of the kind trained on, for the card's usage snippet.

    Raises:
        ConfigError: a count or a duration is negative or not finite, or a name is empty.

    Example: a path of this machine does not enter the record.
        >>> summary = TrainingSummary(dataset="/home/me/prompts.jsonl", loss="topk_policy_gradient", pruning="drift",
        ...     steps=2, rollouts=8, generated_tokens=100, kept_tokens=60, saved_tokens=300, wall_seconds=4.0,
        ...     hyperparameters={"learning_rate": 1e-4, "output_dir": "/home/me/runs/a", "hub_token": "x"})
        >>> summary.dataset, summary.hyperparameters
        ('prompts.jsonl (local)', {'learning_rate': 0.0001, 'output_dir': 'a (local)'})
        >>> TrainingSummary.from_json(summary.to_json()) == summary
        True
    """

    dataset: str
    loss: str
    pruning: str
    steps: int
    rollouts: int
    generated_tokens: int
    kept_tokens: int
    saved_tokens: int
    wall_seconds: float
    student_base: str | None = None
    teacher: str | None = None
    drift: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    hardware: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    created: str | None = None
    command: str | None = None
    example_prompt: str | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name not in {"command", "example_prompt"}:  # these two are words, not settings
                object.__setattr__(self, item.name, publishable(getattr(self, item.name)))
        for name in ("dataset", "loss", "pruning"):
            if not str(getattr(self, name)).strip():
                raise ConfigError(f"a training summary needs a {name}, got {getattr(self, name)!r}")
        for name in ("steps", "rollouts", "generated_tokens", "kept_tokens", "saved_tokens", "wall_seconds"):
            value = getattr(self, name)
            if value is None or value < 0:
                raise ConfigError(f"{name} must be a finite number of at least 0, got {value!r}")

    @property
    def saved_seconds(self) -> float:
        """Upper bound of the time that stopping saved: `saved_tokens` at the run's own pace of generation and teacher."""
        seconds = sum(self.phase_seconds.get(phase, 0.0) for phase in ("generate", "teacher"))
        return self.saved_tokens * seconds / max(self.generated_tokens, 1)

    def to_json(self) -> str:
        """The whole record, with its kind and version."""
        document = {"kind": FILE_KIND, "version": FILE_VERSION, "summary": asdict(self)}
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "the training summary") -> "TrainingSummary":
        """Read what `to_json` wrote.

        Args:
            text: the JSON text.
            source: what to call it in an error message.

        Raises:
            FileFormatError: it is not JSON, is something else, or is of a version this package does not read.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"{source} is not complete JSON ({error}): write it again with its run") from error
        if not isinstance(document, dict) or document.get("kind") != FILE_KIND:
            raise FileFormatError(f"{source} is not a training summary: its 'kind' should be {FILE_KIND!r}")
        if document.get("version") != FILE_VERSION:
            raise FileFormatError(
                f"{source} has version {document.get('version')!r}, this package reads {FILE_VERSION}: "
                "use the version that wrote it"
            )
        try:
            return cls(**document["summary"])
        except (KeyError, TypeError, ConfigError) as error:
            raise FileFormatError(f"{source} does not hold a valid training summary: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record; the file is there whole or not at all. A folder gets it under its usual name."""
        target = Path(path)
        if target.is_dir():
            target = target / SUMMARY_FILE
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TrainingSummary":
        """Read a file that `save` wrote, or a folder that holds one.

        Raises:
            FileFormatError: there is none, it is cut short, of another kind or of another version.
        """
        source = Path(path)
        if source.is_dir():
            source = source / SUMMARY_FILE
        try:
            text = source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileFormatError(f"{source} cannot be read as a training summary: {error}") from error
        return cls.from_json(text, source=str(source))


def publishable(value: Any) -> Any:
    """`value` as plain JSON, without paths of this machine and without settings that are named like secrets.

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
    if isinstance(value, str):
        return _without_machine_path(value)
    if isinstance(value, PurePath):
        return f"{value.name} (local)"
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
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return publishable(value.tolist())
    return _without_machine_path(str(value))


def _without_machine_path(text: str) -> str:
    if not _MACHINE_PATH.match(text):
        return text
    last = re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return f"{last or 'root'} (local)"
