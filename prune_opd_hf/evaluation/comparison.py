"""Whether two reports differ by more than the noise: a test paired over problems.

The test flips the signs of the problems' differences at random (Fisher's randomisation test): if neither model were better,
each difference would have been as likely the other way round. The interval holds every difference that the test does not reject
at 5%, so that it excludes 0 exactly when p < 0.05. It needs no search: with a random subset of the problems, of mean m+, and
the rest, of mean m-, a difference is rejected by these signs when it lies outside [min(m+, m-), max(m+, m-)] (Hartigan 1969).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from prune_opd_hf.errors import InputError
from prune_opd_hf.records.evaluation_report import BenchmarkResult, EvaluationReport

SIGNIFICANCE = 0.05

_EXACT_PROBLEMS = 14
_DRAWS = 10_000
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Difference:
    """Score of the second report minus score of the first.

    Attributes:
        name: the benchmark, or "mean of all".
        problems: how many were paired.
        low, high: the 95% interval of the difference.
        p_value: two-sided, of the sign-flip test.
    """

    name: str
    metric: str
    first: float
    second: float
    problems: int
    value: float
    low: float
    high: float
    p_value: float

    @property
    def is_larger_than_noise(self) -> bool:
        """Whether the test rejects "neither is better" at 5%."""
        return self.p_value < SIGNIFICANCE

    @property
    def verdict(self) -> str:
        figures = f"{100 * abs(self.value):.1f} points (95% interval of the difference {self._interval()}, p = {self.p_value:.2g})"
        if not self.is_larger_than_noise:
            return f"{self.name}: the difference of {figures} is within the noise of {self.problems} problems."
        better, worse = ("second", "first") if self.value > 0 else ("first", "second")
        return f"{self.name}: the {better} is better than the {worse} by {figures}: larger than the noise."

    def _interval(self) -> str:
        return f"{100 * self.low:+.1f} to {100 * self.high:+.1f}"


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side.

    Attributes:
        differences: one for each benchmark that both have, and their mean last where there are several.
        notes: what else differs between the reports and may explain a difference; what could not be compared.
    """

    first_name: str
    second_name: str
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def to_markdown(self) -> str:
        lines = [
            f"First: {self.first_name}. Second: {self.second_name}.",
            "",
            "| benchmark | metric | problems | first | second | difference | 95% interval | p |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for item in self.differences:
            lines.append(
                f"| {item.name} | {item.metric} | {item.problems} | {100 * item.first:.1f} | {100 * item.second:.1f} | "
                f"{100 * item.value:+.1f} | {item._interval()} | {item.p_value:.2g} |"
            )
        lines += ["", *[f"- {item.verdict}" for item in self.differences], *[f"- Note: {note}" for note in self.notes]]
        return "\n".join(lines) + "\n"


def compare_reports(first: EvaluationReport, second: EvaluationReport, metric: str = "avg") -> Comparison:
    """Compare two reports on the benchmarks that both have.

    The metric is "avg", whatever the number of samples, or a full name such as "pass@4".

    Raises:
        InputError: no common benchmark, one of the same name with other problems, or without the metric.
    """
    theirs = {result.name: result for result in second.benchmarks}
    differences, paired = [], []
    for ours in first.benchmarks:
        other = theirs.get(ours.name)
        if other is None:
            continue
        if ours.content_hash != other.content_hash:
            copies = [f"{each.source}, {each.problems} problems, {each.content_hash[:19]}" for each in (ours, other)]
            raise InputError(
                f"{ours.name} has other problems in the two reports ({', and '.join(copies)}): "
                "evaluate both models on the same copy"
            )
        name = _full_name(ours, metric)
        paired.append(
            (np.asarray(ours.problem_scores[name]), np.asarray(other.problem_scores[_full_name(other, metric)]))
        )
        differences.append(_difference(ours.name, name, paired[-1:]))
    if not paired:
        raise InputError(
            f"the reports share no benchmark: {[each.name for each in first.benchmarks]} and {list(theirs)}"
        )
    if len(paired) > 1:
        differences.append(_difference("mean of all", metric, paired))
    return Comparison(first.model_name, second.model_name, tuple(differences), _notes(first, second))


def paired_test(
    differences: Sequence[float] | Float[np.ndarray, " problems"], weights: Sequence[float] | None = None
) -> tuple[float, float, float]:
    """Interval of the (weighted) mean difference and p-value that it is 0, by random signs.

    Up to 14 problems all signs are tried, beyond that 10,000 draws with a fixed seed. Where all problems differ by the same
    amount, which leaves no spread to judge by, the interval is as wide as the share of problems that could do otherwise and
    not have shown up with probability 2.5%.

    Returns:
        low, high, p-value.
    """
    d = np.asarray(differences, dtype=np.float64)
    if not d.size or not bool((np.abs(d) <= 1).all()):
        raise InputError(f"a paired test needs at least one difference, and all in [-1, 1], got {d.size}")
    w = np.full(d.size, 1 / d.size) if weights is None else np.asarray(weights) / np.sum(weights)
    mean = float(w @ d)
    plus = _signs(d.size)  # 1.0 for the problems of one subset, 0.0 for those of the other
    mass, total = plus @ w, plus @ (w * d)
    split = (plus.min(axis=1) == 0) & (plus.max(axis=1) == 1)  # with one subset empty nothing is rejected
    means = np.stack([total[split] / mass[split], (mean - total[split]) / (1 - mass[split])])
    lows, highs = np.full(mass.size, -np.inf), np.full(mass.size, np.inf)
    lows[split], highs[split] = means.min(axis=0), means.max(axis=0)
    p_value = 1.0
    if mean != 0:
        p_value = float((lows <= _ROUNDING).mean() if mean > 0 else (highs >= -_ROUNDING).mean())
    low = float(np.quantile(lows, SIGNIFICANCE, method="inverted_cdf"))
    high = float(np.quantile(highs, 1 - SIGNIFICANCE, method="higher"))
    if np.ptp(d) == 0:
        evidence = 1 / float(w @ w)  # as many problems of equal weight would say as much
        unseen = (1 - (SIGNIFICANCE / 2) ** (1 / evidence)) * (1 + abs(mean))
        low, high = min(low, mean - unseen), max(high, mean + unseen)
    return max(low, -1.0), min(high, 1.0), p_value


@lru_cache(maxsize=4)
def _signs(problems: int) -> Float[np.ndarray, "draws problems"]:
    if problems <= _EXACT_PROBLEMS:
        return ((np.arange(2**problems)[:, None] >> np.arange(problems)) % 2).astype(np.float64)
    drawn = (np.random.default_rng(0).random((_DRAWS, problems)) < 0.5).astype(np.float64)
    drawn[0] = 1.0  # the signs that were seen count as one draw, so that p is never 0
    return drawn


def _difference(name: str, metric: str, paired: list[tuple[np.ndarray, np.ndarray]]) -> Difference:
    first, second = (float(np.mean([pair[side].mean() for pair in paired])) for side in (0, 1))
    differences = np.concatenate([b - a for a, b in paired])
    weights = np.concatenate([np.full(len(a), 1 / len(a)) for a, _ in paired])  # benchmarks count alike
    low, high, p_value = paired_test(differences, weights.tolist())
    return Difference(name, metric, first, second, differences.size, second - first, low, high, p_value)


def _full_name(result: BenchmarkResult, metric: str) -> str:
    for name in result.problem_scores:
        if name == metric or (metric == "avg" and name.startswith("avg@")):
            return name
    raise InputError(f"{result.name} has no {metric!r} in a report; it has {', '.join(result.problem_scores)}")


def _notes(first: EvaluationReport, second: EvaluationReport) -> tuple[str, ...]:
    ours, theirs = ({result.name: result for result in report.benchmarks} for report in (first, second))
    compared: list[tuple[str, Any, Any, tuple[str, ...]]] = [
        ("", first.sampling, second.sampling, tuple(name for name in vars(first.sampling) if name != "seed")),
        ("", first, second, ("dtype", "engine")),
    ]
    details = ("prompt_suffix", "prompt_form", "grader")
    compared += [(f" of {name}", ours[name], theirs[name], details) for name in ours if name in theirs]
    notes = [
        f"{name}{whose} differs: {getattr(a, name)!r} and {getattr(b, name)!r}."
        for whose, a, b, names in compared
        for name in names
        if getattr(a, name) != getattr(b, name)
    ]
    notes += [f"{name} is in the first report alone." for name in ours if name not in theirs]
    notes += [f"{name} is in the second report alone." for name in theirs if name not in ours]
    if first.model_hash == second.model_hash:
        notes.append("both reports are of the same weights.")
    return tuple(notes)
