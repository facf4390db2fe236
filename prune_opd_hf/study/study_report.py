"""What a study found: accuracy at each budget with intervals over seeds, paired differences, and a verdict in plain sentences.

Statistics of plain numbers; it knows no models. Seeds are the sample: an interval says what another
seed would give, on this task with these settings. Intervals are Student's t over seeds; differences are paired by seed, since
runs of one seed share prompts, problems and the first student.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from scipy import stats

from prune_opd_hf.records.files import SavedRecord
from prune_opd_hf.study.arm_training import ArmRun
from prune_opd_hf.study.learning_curve import AXES, CurvePoint, accuracy_at, spent, spent_to_reach
from prune_opd_hf.study.study_settings import StudySettings

CONFIDENCE = 0.95


def amount_name(axis: str, amount: float) -> str:
    """An amount with its unit.

    Example:
        >>> amount_name("tokens", 25000.0), amount_name("cpu_seconds", 6.666)
        ('25,000 sampled tokens', '6.7 CPU seconds')
    """
    number = f"{amount:,.0f}" if amount == round(amount) or amount >= 100 else f"{amount:.1f}"
    return f"{number} {AXES[axis][1]}"


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
        """The mean with its interval: mean ± t_{n-1} s / √n, clipped to the bounds."""
        mean = statistics.fmean(values)
        if len(values) == 1:
            return cls(mean, None, None, tuple(values))
        half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
        return cls(mean, max(bounds[0], mean - float(half)), min(bounds[1], mean + float(half)), tuple(values))

    def percent(self, signed: bool = False) -> str:
        """In percent or percentage points, with its interval."""
        sign = "+" if signed else ""
        shares = [self.mean] if self.low is None or self.high is None else [self.mean, self.low, self.high]
        mean, *ends = (f"{round(100 * share, 1) + 0.0:{sign}.1f}" for share in shares)  # adding 0 turns -0.0 into 0.0
        return f"{mean} [{', '.join(ends)}]" if ends else mean


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
class StudyReport(SavedRecord):
    """The findings of a study.

    Attributes:
        settings: of the study, as plain values.
        accuracy: by `amount_name(axis, amount)`, then arm.
        comparisons: of the reference with every other arm at every budget.
        spent: by arm, means over seeds of what the whole run spent and kept.
        to_goal: by axis, then arm: what each seed had spent when it first reached the goal accuracy; None where it never did.
        curves: by arm, one learning curve for each seed.
        verdict: plain sentences.
        hardware, versions: what it ran on.
    """

    KIND: ClassVar[str] = "prune_opd_hf.study_report"
    FILE_NAME: ClassVar[str] = "report.json"

    settings: Mapping[str, Any]
    accuracy: Mapping[str, Mapping[str, SeedMean]]
    comparisons: tuple[Comparison, ...]
    spent: Mapping[str, Mapping[str, float]]
    to_goal: Mapping[str, Mapping[str, tuple[float | None, ...]]]
    curves: Mapping[str, tuple[tuple[CurvePoint, ...], ...]]
    verdict: tuple[str, ...]
    hardware: str | None
    versions: Mapping[str, str]

    @classmethod
    def of(cls, settings: StudySettings, runs: Sequence[ArmRun]) -> "StudyReport":
        by_run = {(run.arm, run.seed): run for run in runs}
        curves = {arm: tuple(by_run[arm, seed].curve for seed in settings.seeds) for arm in settings.arms}
        accuracy: dict[str, dict[str, SeedMean]] = {}
        comparisons: list[Comparison] = []
        for axis, budget in settings.comparison_points():
            at = {arm: [accuracy_at(curve, axis, budget) for curve in of_arm] for arm, of_arm in curves.items()}
            accuracy[amount_name(axis, budget)] = {arm: SeedMean.of(values, (0.0, 1.0)) for arm, values in at.items()}
            for arm in settings.arms:
                if arm != settings.reference:
                    ahead = [mine - other for mine, other in zip(at[settings.reference], at[arm], strict=True)]
                    comparisons.append(Comparison(axis, budget, arm, SeedMean.of(ahead)))
        goal = settings.goal_accuracy
        return cls(
            settings=settings.to_json(),
            accuracy=accuracy,
            comparisons=tuple(comparisons),
            spent={arm: _spent([by_run[arm, seed] for seed in settings.seeds]) for arm in settings.arms},
            to_goal={
                axis: {
                    arm: tuple(spent_to_reach(curve, axis, goal) for curve in of_arm) for arm, of_arm in curves.items()
                }
                for axis in settings.budgets
            },
            curves=curves,
            verdict=tuple(_verdict(settings, comparisons)),
            hardware=runs[0].summary.hardware,
            versions=runs[0].summary.versions,
        )


def _spent(runs: Sequence[ArmRun]) -> dict[str, float]:
    ends = [run.curve[-1] for run in runs]
    per_run = {
        **{axis: [spent(end, axis) for end in ends] for axis in AXES},
        "kept_length": [run.mean_kept_length for run in runs],
        "cpu_seconds_per_step": [end.cpu_seconds / max(end.step, 1) for end in ends],
        "tokens_per_step": [end.generated_tokens / max(end.step, 1) for end in ends],
    }
    return {name: statistics.fmean(values) for name, values in per_run.items()}


def _verdict(settings: StudySettings, comparisons: Sequence[Comparison]) -> list[str]:
    labels = {name: arm.label for name, arm in settings.arms.items()}
    reference = labels.pop(settings.reference)
    if not comparisons:
        return [f"{reference} is the only arm, so there is nothing to compare it with."]
    words = {"better": "beats", "worse": "loses to", "open": "is not shown to differ from"}
    lines = []
    for axis, budget in settings.comparison_points():
        parts = [
            f"{words[item.outcome]} {labels[item.arm]} ({item.difference.percent(signed=True)} points)"
            for item in comparisons
            if (item.axis, item.budget) == (axis, budget)
        ]
        lines.append(f"At {amount_name(axis, budget)}, {reference} " + ", ".join(parts) + ".")
    if len(settings.seeds) == 1:
        return [*lines, "One seed gives no interval, so no difference is shown."]
    outcomes = {arm: {item.outcome for item in comparisons if item.arm == arm} for arm in labels}
    for statement, arms in (
        ("beats {} at every budget", [arm for arm, seen in outcomes.items() if seen == {"better"}]),
        ("beats {} at no budget", [arm for arm, seen in outcomes.items() if "better" not in seen]),
        ("loses somewhere to {}", [arm for arm, seen in outcomes.items() if "worse" in seen]),
    ):
        if arms:
            lines.append(f"{reference} {statement.format(' and '.join(labels[arm] for arm in arms))}.")
    return lines
