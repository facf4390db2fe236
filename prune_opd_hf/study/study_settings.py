"""What a study compares: its arms, seeds and budgets, from a YAML file."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch

from prune_opd_hf.errors import ConfigError, FileFormatError
from prune_opd_hf.records.files import parse_record, read_yaml, refuse_unknown
from prune_opd_hf.study.learning_curve import AXES
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
        answer_type: how its answers are graded: "math", or "chain" for chains of arithmetic as those of the embedded task.
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
    answer_type: Literal["math", "chain"] = "math"
    compare_at: tuple[float, ...] = (1.0,)
    points: int = 12
    goal_accuracy: float = 0.8
    training_prompts: int = 16_384
    evaluation_problems: int = 256
    processes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        object.__setattr__(self, "compare_at", tuple(sorted(self.compare_at)))
        object.__setattr__(self, "arms", self.arms or DEFAULT_ARMS)
        shares = self.compare_at or (0.0,)
        different = len(set(self.seeds)) == len(self.seeds) > 0
        for name, rule, holds in (
            ("seeds", "must be different whole numbers of at least 0", different and min(self.seeds) >= 0),
            ("points", "must be at least 1", self.points >= 1),
            ("training_prompts", "must be at least 1", self.training_prompts >= 1),
            ("evaluation_problems", "must be at least 1", self.evaluation_problems >= 1),
            ("processes", "must be at least 1", self.processes is None or self.processes >= 1),
            ("goal_accuracy", "must lie in (0, 1]", 0 < self.goal_accuracy <= 1),
            ("compare_at", "must hold shares of the budgets in (0, 1]", shares[0] > 0 and shares[-1] <= 1),
            ("budgets", f"must be counted in {', '.join(AXES)}", set() < self.budgets.keys() <= AXES.keys()),
            ("reference", f"must be one of the arms {', '.join(self.arms)}", self.reference in self.arms),
        ):
            if not holds:
                raise ConfigError(f"{name} {rule}, got {getattr(self, name)!r}")
        for axis, amount in self.budgets.items():
            if not 0 < amount < float("inf"):
                raise ConfigError(f"the budget of {axis} must be a finite number above 0, got {amount!r}")
        object.__setattr__(self, "budgets", {axis: float(amount) for axis, amount in self.budgets.items()})
        embedded = [self.model_name_or_path, self.teacher_model_name_or_path, self.dataset_name].count(EMBEDDED)
        if embedded not in (0, 3):
            raise ConfigError(
                "model_name_or_path, teacher_model_name_or_path and dataset_name must all be 'embedded', or none of them"
            )
        if not embedded and self.eval_dataset_name is None:
            raise ConfigError("eval_dataset_name is needed: a .json or .jsonl file with the columns prompt and answer")
        for name, arm in self.arms.items():
            self._check_arm(name, arm)

    def _check_arm(self, name: str, arm: ArmSettings) -> None:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"an arm's name is part of file names: letters, digits, '.', '_' and '-', got {name!r}")
        known = [item.name for item in fields(PruneOPDConfig) if item.init]
        refuse_unknown(self.training, known, "training")
        refuse_unknown(arm.training, known, f"training of the arm {name!r}")
        if "pruning" not in arm.training:
            raise ConfigError(f"the arm {name!r} needs training: {{pruning: ...}}")
        for setting in (*self.training, *(arm.training.keys() - {"pruning"})):
            if setting in OWNED_BY_STUDY:
                raise ConfigError(f"training must not hold {setting}: set {OWNED_BY_STUDY[setting]} instead")
        if arm.length_from is not None:
            source = self.arms.get(arm.length_from)
            if source is None or source.length_from is not None:
                raise ConfigError(
                    f"the arm {name!r} takes its length from {arm.length_from!r}, which must be an arm with a length of its own"
                )
        if [other.label for other in self.arms.values()].count(arm.label) > 1:
            raise ConfigError(
                f"{arm.label!r} is the label of several arms, which tables and figures could not tell apart"
            )
        longest = None  # that this arm may have, and that its source may keep
        if arm.length_from is not None:
            of_both = ({**self.training, **one.training} for one in (arm, self.arms[arm.length_from]))
            default = PruneOPDConfig.max_completion_length
            longest = min(settings.get("max_completion_length", default) for settings in of_both)
        try:
            self.config(name, self.seeds[0], longest, "unused")
        except ConfigError as error:
            raise ConfigError(f"the arm {name!r}: {error}") from error

    def config(self, arm: str, seed: int, pruning_length: float | None, output_dir: str) -> PruneOPDConfig:
        """How an arm is trained with a seed; `pruning_length`: where the arm takes it from another one."""
        settings = {
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "use_cpu": not torch.cuda.is_available(),
            **self.training,
            **self.arms[arm].training,
            "output_dir": output_dir,
            "seed": seed,
            "data_seed": seed,
            "max_steps": 10_000_000,  # the budgets end the run
        }
        if not settings.keys() & {"teacher_models", "teacher_model_kind"}:
            settings["teacher_model_name_or_path"] = self.teacher_model_name_or_path
        if pruning_length is not None:
            settings["pruning_length"] = pruning_length
        return PruneOPDConfig(**settings)

    def length_for(self, arm: str, seed: int, kept: float) -> float:
        """The `pruning_length` of an arm whose source kept so many tokens of each rollout.

        Raises:
            ConfigError: the arm's own settings do not allow it.
        """
        length = round(kept, 2)
        try:
            self.config(arm, seed, length, "unused")
        except ConfigError as error:
            source = self.arms[arm].length_from
            raise ConfigError(
                f"the arm {arm!r} cannot have the mean length {length:g} that {source!r} kept: {error}"
            ) from error
        return length

    def runs(self) -> list[tuple[str, int]]:
        """Every run as (arm, seed): first those that others wait for."""
        awaited = {arm.length_from for arm in self.arms.values()}
        runs = [(name, seed) for seed in self.seeds for name in self.arms]
        return sorted(runs, key=lambda run: run[0] not in awaited)

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
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "StudySettings":
        """Read a YAML file.

        Raises:
            ConfigError: no such file, not YAML, an unknown or missing field, a field of another type or out of range.
        """
        return cls.from_json(read_yaml(path), source=str(path))

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str = "the study") -> "StudySettings":
        """From plain values, as YAML or JSON give them; a usual arm needs no more than its name."""
        refuse_unknown(values, [item.name for item in fields(cls)], source)
        arms = values.get("arms") or {}
        if isinstance(arms, list):
            if len(set(map(str, arms))) < len(arms):
                raise ConfigError(f"{source}: the arms need names of their own, got {arms}")
            arms = {str(name): None for name in arms}
        if isinstance(arms, Mapping):
            arms = {str(name): _complete_arm(str(name), arm, source) for name, arm in arms.items()}
        try:
            return parse_record(cls, {**values, "arms": arms}, source)
        except FileFormatError as error:
            raise ConfigError(str(error)) from error


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


def _complete_arm(name: str, values: Any, source: str) -> Any:
    """Fields of an arm: what its usual name stands for, and what the file says over it."""
    usual: dict[str, Any] = asdict(DEFAULT_ARMS[name]) if name in DEFAULT_ARMS else {"label": name, "training": {}}
    if values is None:
        return usual
    if not isinstance(values, Mapping):
        return values  # refused with its type
    refuse_unknown(values, [item.name for item in fields(ArmSettings)], f"{source}: the arm {name!r}")
    own = values.get("training") or {}
    return {**usual, **values, "training": {**usual["training"], **own} if isinstance(own, Mapping) else own}
