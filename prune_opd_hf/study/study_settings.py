"""What a study compares: its arms, seeds and budgets, from a YAML file."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from prune_opd_hf.errors import ConfigError, FileFormatError
from prune_opd_hf.records.files import parse_record, read_yaml, refuse_unknown
from prune_opd_hf.study.learning_curve import check_budgets
from prune_opd_hf.tasks import EMBEDDED
from prune_opd_hf.training import PruneOPDConfig

OWNED_BY_STUDY = {
    "output_dir": "output_dir of the study",
    "seed": "seeds",
    "data_seed": "seeds",
    "max_steps": "budgets",
    "pruning": "the arm",
}
"""Training settings that the study decides, and where."""


@dataclass(frozen=True)
class ArmSettings:
    """One way of training.

    Attributes:
        label: its name in tables.
        training: settings of `PruneOPDConfig` that only this arm has.
        length_from: another arm; `pruning_length` is what that arm kept on average with the same seed.
        purpose: what it is for, as the report says it.
    """

    label: str
    training: Mapping[str, Any]
    length_from: str | None = None
    purpose: str = ""


@dataclass(frozen=True)
class StudySettings:
    """A study.

    Attributes:
        model_name_or_path, teacher_model_name_or_path: Hub id, folder, or "embedded".
        dataset_name: training prompts, as for `prune-opd train`, or "embedded".
        eval_dataset_name: .json or .jsonl with `prompt` and `answer`; not needed with "embedded".
        arms: by name, in the order of the report. `none`, `fixed`, `random` and `drift` are what the name says unless set
            otherwise, the two controls with the mean length that `drift` kept.
        reference: the arm that every other one is compared with.
        seeds: each arm is trained once with each.
        budgets: what each run spends, by axis: steps, tokens (sampled), cpu_seconds, seconds. A run ends when all are spent;
            the report compares at each.
        compare_at: shares of each budget at which the arms are compared, in (0, 1]; between two evaluations an accuracy lies on
            the straight line.
        points: evaluations on the way.
        goal_accuracy: the report says what each arm spent to first reach it; in (0, 1].
        training_prompts: of the embedded task.
        evaluation_problems: problems of each evaluation.
        processes: runs at a time; None takes one for each core.
        training: settings of `PruneOPDConfig` for every arm.

    Raises:
        ConfigError: names the field, what it got and what it accepts.

    Example:
        >>> settings = StudySettings("embedded", "embedded", "embedded", seeds=(0, 1), budgets={"steps": 10},
        ...                          training={"per_device_train_batch_size": 8})
        >>> list(settings.arms), settings.arms["fixed"].length_from
        (['none', 'fixed', 'random', 'drift'], 'drift')
        >>> settings.runs()[:3]
        [('drift', 0), ('none', 0), ('fixed', 0)]
    """

    model_name_or_path: str
    teacher_model_name_or_path: str
    dataset_name: str
    seeds: tuple[int, ...]
    budgets: Mapping[str, float]
    training: Mapping[str, Any] = field(default_factory=dict)
    arms: Mapping[str, ArmSettings] = field(default_factory=dict)
    reference: str = "drift"
    eval_dataset_name: str | None = None
    compare_at: tuple[float, ...] = (1.0,)
    points: int = 12
    goal_accuracy: float = 0.8
    training_prompts: int = 16_384
    evaluation_problems: int = 256
    processes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        object.__setattr__(self, "compare_at", tuple(sorted(self.compare_at)))
        object.__setattr__(self, "arms", self.arms or {name: default_arm(name) for name in DEFAULT_ARMS})
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds must be different whole numbers of at least 0, got {list(self.seeds)}")
        check_budgets(self.budgets)
        object.__setattr__(self, "budgets", {axis: float(amount) for axis, amount in self.budgets.items()})
        for name in ("points", "training_prompts", "evaluation_problems"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.compare_at or not 0 < self.compare_at[0] <= self.compare_at[-1] <= 1:
            raise ConfigError(f"compare_at must hold shares of the budgets in (0, 1], got {list(self.compare_at)}")
        if not 0 < self.goal_accuracy <= 1:
            raise ConfigError(f"goal_accuracy must lie in (0, 1], got {self.goal_accuracy}")
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"processes must be at least 1, got {self.processes}")
        embedded = [self.model_name_or_path, self.teacher_model_name_or_path, self.dataset_name].count(EMBEDDED)
        if embedded not in (0, 3):
            raise ConfigError(
                "model_name_or_path, teacher_model_name_or_path and dataset_name must all be 'embedded', or none of them"
            )
        if not embedded and self.eval_dataset_name is None:
            raise ConfigError("eval_dataset_name is needed: a .json or .jsonl file with the columns prompt and answer")
        if self.reference not in self.arms:
            raise ConfigError(f"the reference {self.reference!r} is none of the arms {', '.join(self.arms)}")
        known = [item.name for item in fields(PruneOPDConfig) if item.init]
        refuse_unknown(self.training, known, "training")
        for name, arm in self.arms.items():
            if not re.fullmatch(r"[\w.-]+", name):
                raise ConfigError(
                    f"an arm's name is part of file names: letters, digits, '.', '_' and '-', got {name!r}"
                )
            refuse_unknown(arm.training, known, f"training of the arm {name!r}")
            for setting in (*self.training, *arm.training):
                if setting in OWNED_BY_STUDY and not (setting == "pruning" and setting in arm.training):
                    raise ConfigError(f"training must not hold {setting}: set {OWNED_BY_STUDY[setting]} instead")
            if "pruning" not in arm.training:
                raise ConfigError(f"the arm {name!r} needs training: {{pruning: ...}}")
            if arm.length_from is not None and (
                arm.length_from not in self.arms or self.arms[arm.length_from].length_from is not None
            ):
                raise ConfigError(
                    f"the arm {name!r} takes its length from {arm.length_from!r}, which must be an arm with a length of its own"
                )

    def runs(self) -> list[tuple[str, int]]:
        """Every run as (arm, seed): seed by seed, and within a seed first those that others wait for."""
        awaited = [arm.length_from for arm in self.arms.values() if arm.length_from is not None]
        names = sorted(self.arms, key=lambda name: name not in awaited)
        return [(name, seed) for seed in self.seeds for name in names]

    def comparison_points(self) -> list[tuple[str, float]]:
        """Where the arms are compared, as (axis, amount).

        Example:
            >>> study = StudySettings("embedded", "embedded", "embedded", (0,), {"steps": 40, "tokens": 900}, compare_at=(0.5, 1))
            >>> study.comparison_points()
            [('steps', 20.0), ('steps', 40.0), ('tokens', 450.0), ('tokens', 900.0)]
        """
        return [(axis, share * amount) for axis, amount in self.budgets.items() for share in self.compare_at]

    def fingerprint(self, arm: str) -> str:
        """Everything that a run of this arm depends on besides its seed, as JSON: a finished run counts only for the same."""
        others = ("seeds", "arms", "processes", "reference", "goal_accuracy", "compare_at")
        kept = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in others}
        own = self.arms[arm]
        return json.dumps([kept, dict(own.training), own.length_from], sort_keys=True, default=str)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "StudySettings":
        """Read a YAML file.

        Raises:
            ConfigError: no such file, not YAML with known fields, or values out of range.
        """
        return cls.from_json(read_yaml(path), source=str(path))

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str = "the study") -> "StudySettings":
        """From plain values, as YAML or JSON give them.

        Raises:
            ConfigError: an unknown or missing field, a field of another type, or a value out of range.
        """
        refuse_unknown(values, [item.name for item in fields(cls)], source)
        arms = values.get("arms") or {}
        if isinstance(arms, list):
            arms = dict.fromkeys(arms)
        if not isinstance(arms, Mapping):
            raise ConfigError(f"{source}: arms must be a mapping or a list of names, got {arms!r}")
        arms = {str(name): _arm(str(name), arm, source) for name, arm in arms.items()}
        try:
            return parse_record(cls, {**values, "arms": arms}, source)
        except FileFormatError as error:
            raise ConfigError(str(error)) from error


def default_arm(name: str) -> ArmSettings:
    """What a usual name stands for.

    Raises:
        ConfigError: not a usual name.
    """
    if name not in DEFAULT_ARMS:
        raise ConfigError(f"the arm {name!r} needs settings; without any only {', '.join(DEFAULT_ARMS)} are known")
    return DEFAULT_ARMS[name]


DEFAULT_ARMS = {
    "none": ArmSettings("plain OPD", {"pruning": "none"}, purpose="no pruning"),
    "fixed": ArmSettings(
        "fixed length, matched",
        {"pruning": "fixed", "pruning_match": "kept"},
        length_from="drift",
        purpose="every response truncated at one length, so that as many tokens are kept as by drift",
    ),
    "random": ArmSettings(
        "random length, matched",
        {"pruning": "random", "pruning_match": "kept"},
        length_from="drift",
        purpose="truncated at random lengths, so that as many tokens are kept as by drift",
    ),
    "drift": ArmSettings("Prune-OPD", {"pruning": "drift"}, purpose="stopped and weighted by drift"),
}


def _arm(name: str, values: Any, source: str) -> dict[str, Any]:
    """Fields of an arm: what its usual name stands for, and what the file says over it."""
    if values is None:
        return asdict(default_arm(name))
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: the arm {name!r} must be a mapping, got {values!r}")
    refuse_unknown(values, [item.name for item in fields(ArmSettings)], f"{source}: the arm {name!r}")
    usual = DEFAULT_ARMS.get(name)
    start: dict[str, Any] = {"label": name, "training": {}} if usual is None else asdict(usual)
    return {**start, **values, "training": {**start["training"], **(values.get("training") or {})}}
