"""What a training run leaves for its readers: one record that cards, reports and later runs are made from.

Plain JSON values only; it knows neither trainers nor models. Whatever enters the record is made fit to be published:
tensors' and arrays' scalars become numbers, NaN and infinity become null, paths of this machine keep only their last
part, and settings whose name says that they are secret are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.records.files import FREE_TEXT, SavedRecord, check_values, publishable

SUMMARY_FILE = "training_summary.json"
"""Name of the record inside a student's folder and inside its Hub repository."""
COUNTS = ("steps", "rollouts", "generated_tokens", "kept_tokens", "saved_tokens", "wall_seconds")


@dataclass(frozen=True)
class TrainingSummary(SavedRecord):
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
        teachers: each teacher as a mapping: its `name` among several, `model`, `revision`, `where` it ran, and what it `read`.
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

    KIND: ClassVar[str] = "prune_opd_hf.training_summary"
    FILE_NAME: ClassVar[str] = SUMMARY_FILE

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
    teachers: Sequence[Mapping[str, Any]] = ()
    drift: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    hardware: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    created: str | None = None
    command: str | None = field(default=None, metadata=FREE_TEXT)
    example_prompt: str | None = field(default=None, metadata=FREE_TEXT)

    def __post_init__(self) -> None:
        for item in fields(self):
            if not item.metadata.get("free_text"):
                object.__setattr__(self, item.name, publishable(getattr(self, item.name)))
        check_values(self)
        for name in ("dataset", "loss", "pruning"):
            if not str(getattr(self, name)).strip():
                raise ConfigError(f"a training summary needs a {name}, got {getattr(self, name)!r}")
        counts = {name: getattr(self, name) for name in COUNTS}
        counts |= {f"phase_seconds.{phase}": seconds for phase, seconds in self.phase_seconds.items()}
        for name, value in counts.items():
            if value is None or value < 0:
                raise ConfigError(f"{name} must be a finite number of at least 0, got {value!r}")

    @property
    def stopped_tokens(self) -> int:
        """Tokens between the ends of stopped responses and the caps of their steps, sampled in vain or not at all; 0 where pruning
        has stopped none."""
        return self.saved_tokens + self.generated_tokens - self.kept_tokens

    @property
    def saved_seconds(self) -> float:
        """Upper bound of the time that stopping saved: `saved_tokens` at the run's own pace of generation and teacher."""
        seconds = sum(self.phase_seconds.get(phase, 0.0) for phase in ("generate", "teacher"))
        return self.saved_tokens * seconds / max(self.generated_tokens, 1)
