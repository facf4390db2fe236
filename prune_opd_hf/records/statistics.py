"""The statistics of repeated sampling: avg@k, pass@k and maj@k of problems, and intervals for their means.

Pure functions of numbers; this module knows neither models nor grading. A problem's score lies in [0, 1]; a benchmark's score is
the mean over its problems, and its interval says what it would be on other problems like these: samples of one problem are
no independent evidence, so problems are drawn, not samples.

The interval
    Bayesian bootstrap over problems (Rubin 1981): the mean under random weights ~ Dirichlet(1, ..., 1) of the problems, with
    half a problem of score 0 and half a problem of score 1 added (Jeffreys' prior, to which it reduces for scores of 0 and
    1 alone). Without them every interval of 30 problems that rests on their spread (percentile and BCa bootstrap, t) is too
    short for hard and easy benchmarks, of width 0 in the end: of 2,000 simulated benchmarks with 30 problems, 16 samples and
    difficulties ~ Beta, the t interval of avg@16 held the true mean in 55% at a mean of 0.02 and 94% at 0.5; this one in 94%
    to 98% everywhere. Tests repeat the simulation.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from prune_opd_hf.errors import ConfigError, InputError

CONFIDENCE = 0.95
METHOD = "Bayesian bootstrap over problems with half a problem at 0 and half at 1 (Jeffreys)"

_DRAWS = 20_000


@dataclass(frozen=True)
class Estimate:
    """A score with its uncertainty.

    Attributes:
        value: the score, as a share in [0, 1].
        low, high: the 95% interval.
        method: how the interval was computed.

    Raises:
        ConfigError: not 0 <= low <= value <= high <= 1; NaN among them.

    Example:
        >>> print(Estimate(0.5, 0.412, 0.583, "by hand"))
        50.0 [41.2, 58.3]
    """

    value: float
    low: float
    high: float
    method: str

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.value <= self.high <= 1:
            raise ConfigError(
                f"an estimate needs 0 <= low <= value <= high <= 1, got {self.low} <= {self.value} <= {self.high}"
            )

    def __str__(self) -> str:
        """In percent, with its interval."""
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of k samples is right, without bias from n samples of which c are right (arXiv 2107.03374).

    1 - C(n-c, k) / C(n, k) = 1 - Π_{i=n-c+1..n} (1 - k/i): the share of the subsets of k samples that hold a right one.

    Raises:
        InputError: not 0 <= c <= n or not 1 <= k <= n.

    Example: of the 6 pairs out of 4 samples, 3 hold the one that is right.
        >>> pass_at_k(samples=4, correct=1, k=2)
        0.5
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise InputError(f"pass@k needs 0 <= correct <= samples and 1 <= k <= samples, got {correct}, {samples}, k={k}")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1 - k / i for i in range(samples - correct + 1, samples + 1))


def majority_vote(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """Chance that the most frequent answer is right, where a tie is broken by drawing one of the tied answers.

    Args:
        answers: one parsed answer a sample; None does not vote.
        correct: whether it is right.

    Returns:
        The share of right answers among the most frequent ones; 0 where nobody votes.

    Example: "7" and "8" have two votes each.
        >>> majority_vote(["7", "8", "7", "8", "9", None], [True, False, True, False, False, False])
        0.5
    """
    votes = Counter((answer, right) for answer, right in zip(answers, correct, strict=True) if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    leaders = [right for (_, right), count in votes.items() if count == most]
    return sum(leaders) / len(leaders)


def score_problems(
    correct: Sequence[Sequence[bool]],
    answers: Sequence[Sequence[Hashable | None]],
    pass_ks: Sequence[int] | None = None,
) -> dict[str, tuple[float, ...]]:
    """The scores of each problem under every metric, by the metric's name.

    Args:
        correct: for each problem, whether each of its n samples is right; the same n for all problems.
        answers: the parsed answers in the same form; None does not vote.
        pass_ks: the k of pass@k; by default the powers of 4 up to n, without 1 (pass@1 is avg@n), and n.

    Returns:
        "avg@n", "pass@k" for each k, and "maj@n".

    Raises:
        InputError: no problem, no sample, or problems of different n.

    Example: two problems with two samples each.
        >>> score_problems([[True, False], [True, True]], [["1", "2"], ["3", "3"]])
        {'avg@2': (0.5, 1.0), 'pass@2': (1.0, 1.0), 'maj@2': (0.5, 1.0)}
    """
    sizes = {len(row) for row in correct} | {len(row) for row in answers}
    if len(correct) != len(answers) or len(sizes) != 1 or 0 in sizes:
        raise InputError(
            "scores need at least one problem and the same number of samples for each, "
            f"got {len(correct)} and {len(answers)} problems with {sorted(sizes)} samples"
        )
    [n] = sizes
    if pass_ks is None:
        pass_ks = sorted({4**power for power in range(1, 16) if 4**power <= n} | ({n} if n > 1 else set()))
    counts = [sum(row) for row in correct]
    return {
        f"avg@{n}": tuple(count / n for count in counts),
        **{f"pass@{k}": tuple(pass_at_k(n, count, k) for count in counts) for k in pass_ks},
        f"maj@{n}": tuple(majority_vote(*row) for row in zip(answers, correct, strict=True)),
    }


def estimate_mean(scores: Sequence[float]) -> Estimate:
    """The mean of the problems' scores with its 95% interval, by the method of this module. The order does not matter.

    Raises:
        InputError: no score, or one outside [0, 1].

    Example: all of 30 problems right; the interval is that of Jeffreys for 30 of 30.
        >>> estimate = estimate_mean([1.0] * 30)
        >>> estimate.value, round(estimate.low, 2), estimate.high
        (1.0, 0.92, 1.0)
    """
    values, counts = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    if not values.size or not (values[0] >= 0 and values[-1] <= 1):
        raise InputError(f"an estimate needs at least one score, and all in [0, 1], got {len(scores)} scores")
    value = min(1.0, math.fsum(scores) / len(scores))
    support = np.concatenate([[0.0, 1.0], values])
    weights = np.random.default_rng(0).standard_gamma(np.concatenate([[0.5, 0.5], counts]), (_DRAWS, support.size))
    means = weights @ support / weights.sum(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, min(float(low), value), max(float(high), value), METHOD)
