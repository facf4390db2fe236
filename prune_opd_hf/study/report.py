"""What a study found: accuracy at each budget with intervals over seeds, paired differences, and a verdict in plain words.

Statistics of plain numbers; it knows neither models nor files of runs. Seeds are the sample: an interval says what another
seed would give, on this task with these settings. Intervals are Student's t over seeds; differences are paired by seed, since
runs of one seed share prompts, problems and the first student.
"""

import json
import math
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from prune_opd_hf.errors import FileFormatError, InputError
from prune_opd_hf.study.learning_curve import AXES, accuracy_at, spent_to_reach
from prune_opd_hf.study.settings import StudySettings
from prune_opd_hf.study.worker import ArmResult

FILE_KIND = "prune_opd_hf.study_report"
FILE_VERSION = 1
CONFIDENCE = 0.95

AXIS_WORDS = {
    "steps": "optimizer steps",
    "tokens": "sampled tokens",
    "cpu_seconds": "CPU seconds",
    "seconds": "seconds",
}


def look_name(axis: str, amount: float) -> str:
    """An amount in words.

    Example:
        >>> look_name("tokens", 25000.0), look_name("cpu_seconds", 6.666)
        ('25,000 sampled tokens', '6.7 CPU seconds')
    """
    number = f"{amount:,.0f}" if amount == round(amount) or amount >= 100 else f"{amount:.1f}"
    return f"{number} {AXIS_WORDS[axis]}"


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds.

    Attributes:
        mean: over the seeds.
        low, high: Student's 95% interval; None with one seed.
        values: one a seed.
    """

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], bounds: tuple[float, float] = (-math.inf, math.inf)) -> "SeedMean":
        """The mean with its interval: mean ± t_{n-1} s / √n, cut at the bounds of what can be.

        Raises:
            InputError: no values.

        Example: t is 12.71 for two seeds, s / √2 is 1.
            >>> estimate = SeedMean.of([1.0, 3.0])
            >>> estimate.mean, round(estimate.low, 2), round(estimate.high, 2)
            (2.0, -10.71, 14.71)
        """
        if not values:
            raise InputError("a mean over seeds needs at least one value")
        mean = statistics.fmean(values)
        if len(values) == 1:
            return cls(mean, None, None, tuple(values))
        half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
        return cls(mean, max(bounds[0], mean - float(half)), min(bounds[1], mean + float(half)), tuple(values))

    def percent(self, signed: bool = False) -> str:
        """In percent or percentage points, with its interval.

        Example:
            >>> SeedMean.of([0.5, 0.5]).percent(), SeedMean.of([0.25]).percent(signed=True)
            ('50.0 [50.0, 50.0]', '+25.0')
        """
        sign = "+" if signed else ""
        # Adding 0 turns -0.0 into 0.0.
        mean, low, high = (
            None if share is None else f"{round(100 * share, 1) + 0.0:{sign}.1f}"
            for share in (self.mean, self.low, self.high)
        )
        return f"{mean}" if low is None else f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Comparison:
    """The reference arm against another one at one budget.

    Attributes:
        axis, budget: what was equal.
        arm: the other arm.
        difference: accuracy of the reference minus that of the other, by seed.
    """

    axis: str
    budget: float
    arm: str
    difference: SeedMean

    @property
    def outcome(self) -> str:
        """ "better", "worse", or "open" where the interval holds 0 or there is none."""
        if self.difference.low is None or self.difference.high is None:
            return "open"
        if self.difference.low > 0:
            return "better"
        return "worse" if self.difference.high < 0 else "open"


@dataclass(frozen=True)
class StudyReport:
    """The findings of a study.

    Attributes:
        settings: of the study, as plain values.
        accuracy: by `look_name(axis, amount)`, then arm.
        comparisons: of the reference with every other arm at every budget.
        spent: by arm, means over seeds of what the whole run spent and kept.
        to_goal: by axis, then arm: what each seed had spent when it first reached the goal accuracy; None where it never did.
        curves: by arm, one learning curve for each seed.
        verdict: in plain words, one sentence a line.
        hardware, versions: what it ran on.
    """

    settings: Mapping[str, Any]
    accuracy: Mapping[str, Mapping[str, SeedMean]]
    comparisons: tuple[Comparison, ...]
    spent: Mapping[str, Mapping[str, float]]
    to_goal: Mapping[str, Mapping[str, tuple[float | None, ...]]]
    curves: Mapping[str, tuple[tuple[Mapping[str, float], ...], ...]]
    verdict: tuple[str, ...]
    hardware: str | None
    versions: Mapping[str, str]

    @classmethod
    def of(cls, settings: StudySettings, results: Sequence[ArmResult]) -> "StudyReport":
        """Compare the finished runs.

        Raises:
            InputError: a run is missing.
        """
        by_run = {(result.arm, result.seed): result for result in results}
        missing = [run for run in settings.runs() if run not in by_run]
        if missing:
            raise InputError(f"the study has no result of {missing[0][0]} with seed {missing[0][1]}")
        accuracy: dict[str, dict[str, SeedMean]] = {}
        comparisons: list[Comparison] = []
        for axis, budget in settings.looks():
            at = {arm: [_accuracy(by_run[arm, seed], axis, budget) for seed in settings.seeds] for arm in settings.arms}
            accuracy[look_name(axis, budget)] = {
                arm: SeedMean.of(values, bounds=(0.0, 1.0)) for arm, values in at.items()
            }
            for arm in settings.arms:
                if arm != settings.reference:
                    pairs = zip(at[settings.reference], at[arm], strict=True)
                    comparisons.append(
                        Comparison(axis, budget, arm, SeedMean.of([mine - other for mine, other in pairs]))
                    )
        some = results[0]
        return cls(
            settings=settings.to_json(),
            accuracy=accuracy,
            comparisons=tuple(comparisons),
            spent={arm: _spent([by_run[arm, seed] for seed in settings.seeds]) for arm in settings.arms},
            to_goal={
                axis: {
                    arm: tuple(
                        spent_to_reach(by_run[arm, seed].curve, axis, settings.goal_accuracy) for seed in settings.seeds
                    )
                    for arm in settings.arms
                }
                for axis in settings.budgets
            },
            curves={
                arm: tuple(tuple(asdict(point) for point in by_run[arm, seed].curve) for seed in settings.seeds)
                for arm in settings.arms
            },
            verdict=tuple(_verdict(settings, comparisons)),
            hardware=some.hardware,
            versions=some.versions,
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.json into a folder, whole or not at all."""
        target = Path(folder) / "report.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        document = {"kind": FILE_KIND, "version": FILE_VERSION, "report": asdict(self)}
        write_text(target, json.dumps(document, indent=1))
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "StudyReport":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            FileFormatError: something else.
        """
        source = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
        if not source.is_file():
            raise FileNotFoundError(2, "no study report", str(source))
        try:
            document = json.loads(source.read_text(encoding="utf-8"))
            if document["kind"] != FILE_KIND or document["version"] != FILE_VERSION:
                raise FileFormatError(f"{source} is not a study report of version {FILE_VERSION}")
            values = document["report"]
            return cls(
                **{
                    **values,
                    "accuracy": {
                        look: {arm: _seed_mean(value) for arm, value in arms.items()}
                        for look, arms in values["accuracy"].items()
                    },
                    "comparisons": tuple(
                        Comparison(**{**item, "difference": _seed_mean(item["difference"])})
                        for item in values["comparisons"]
                    ),
                    "to_goal": {
                        axis: {arm: tuple(spent) for arm, spent in arms.items()}
                        for axis, arms in values["to_goal"].items()
                    },
                    "curves": {
                        arm: tuple(tuple(curve) for curve in curves) for arm, curves in values["curves"].items()
                    },
                    "verdict": tuple(values["verdict"]),
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"{source} is not a whole study report: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _accuracy(result: ArmResult, axis: str, budget: float) -> float:
    value = accuracy_at(result.curve, axis, budget)
    if value is None:
        raise InputError(
            f"the run {result.arm} of seed {result.seed} ended before its budget of {budget:g} {AXIS_WORDS[axis]} was spent"
        )
    return value


def _spent(results: Sequence[ArmResult]) -> dict[str, float]:
    means = {
        axis: statistics.fmean(getattr(result.curve[-1], name) for result in results) for axis, name in AXES.items()
    }
    means["kept_length"] = statistics.fmean(result.mean_kept_length for result in results)
    means["kept_share"] = statistics.fmean(
        result.curve[-1].kept_tokens / max(result.curve[-1].generated_tokens, 1) for result in results
    )
    means["cpu_seconds_per_step"] = statistics.fmean(
        result.curve[-1].cpu_seconds / max(result.curve[-1].step, 1) for result in results
    )
    means["tokens_per_step"] = statistics.fmean(
        result.curve[-1].generated_tokens / max(result.curve[-1].step, 1) for result in results
    )
    return means


def _verdict(settings: StudySettings, comparisons: Sequence[Comparison]) -> list[str]:
    reference = settings.arms[settings.reference].label
    if not comparisons:
        return [f"{reference} is the only arm, so there is nothing to compare it with."]
    lines = []
    for axis, budget in settings.looks():
        parts = []
        for comparison in comparisons:
            if (comparison.axis, comparison.budget) == (axis, budget):
                other = settings.arms[comparison.arm].label
                words = {
                    "better": f"beats {other}",
                    "worse": f"loses to {other}",
                    "open": f"is not shown to differ from {other}",
                }
                parts.append(f"{words[comparison.outcome]} ({comparison.difference.percent(signed=True)} points)")
        lines.append(f"At {look_name(axis, budget)}, {reference} " + ", ".join(parts) + ".")
    wins = {item.arm for item in comparisons if item.outcome == "better"}
    losses = {item.arm for item in comparisons if item.outcome == "worse"}
    always = [
        settings.arms[arm].label
        for arm in settings.arms
        if arm != settings.reference and all(item.outcome == "better" for item in comparisons if item.arm == arm)
    ]
    never = [settings.arms[arm].label for arm in settings.arms if arm != settings.reference and arm not in wins]
    if always:
        lines.append(f"{reference} beats {_listed(always)} at every budget.")
    if never:
        lines.append(f"{reference} beats {_listed(never)} at no budget.")
    if losses:
        losing_to = [settings.arms[arm].label for arm in settings.arms if arm in losses]
        lines.append(f"{reference} loses somewhere to {_listed(losing_to)}.")
    return lines


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _seed_mean(values: Mapping[str, Any]) -> SeedMean:
    return SeedMean(values["mean"], values["low"], values["high"], tuple(values["values"]))
