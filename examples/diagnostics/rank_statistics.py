"""Rank statistics over tokens, with intervals that know that tokens of one rollout belong together.

Tokens of a rollout share its fate, so they are no independent sample: whole rollouts are drawn with replacement (cluster
bootstrap), and the interval is that of the percentiles. Plain arrays; it knows neither models nor rollouts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from prune_opd_hf.errors import InputError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A statistic with its interval over rollouts.

    Attributes:
        value: on all tokens; NaN where it is not defined (one class, or no spread).
        low, high: the 95% interval; NaN where it could not be had.
        tokens, rollouts: how many it rests on.
    """

    value: float
    low: float
    high: float
    tokens: int
    rollouts: int

    def __str__(self) -> str:
        """Value and interval; a dash where there is none.

        Example:
            >>> print(Interval(0.5, 0.4, 0.61, 100, 10), Interval(np.nan, np.nan, np.nan, 0, 0))
            0.50 [0.40, 0.61] -
        """
        if np.isnan(self.value):
            return "-"
        if np.isnan(self.low):
            return f"{self.value:.2f}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def spearman(x: np.ndarray, y: np.ndarray, clusters: np.ndarray, *, draws: int = 200, seed: int = 0) -> Interval:
    """Spearman's rank correlation of two values of each token.

    Args:
        x, y: one value a token; tokens where either is NaN are left out.
        clusters: the rollout of each token.
        draws: of the bootstrap.
        seed: of the draws.

    Example: a monotone relation is a correlation of 1, whatever its shape.
        >>> x = np.arange(12.0)
        >>> spearman(x, np.exp(x), np.repeat([0, 1, 2], 4)).value
        1.0
    """
    return _with_interval(_spearman, x, y, clusters, draws, seed)


def auc(scores: np.ndarray, positive: np.ndarray, clusters: np.ndarray, *, draws: int = 200, seed: int = 0) -> Interval:
    """Chance that a positive token has a higher score than a negative one, ties counting one half.

    Args:
        scores: higher means more suspect; tokens where it is NaN are left out.
        positive: the label of each token.
        clusters, draws, seed: as for `spearman`.

    Example: of the four pairs of a positive and a negative token one is the wrong way round.
        >>> auc(np.array([0.9, 0.2, 0.3, 0.1]), np.array([True, True, False, False]), np.arange(4)).value
        0.75
    """
    return _with_interval(_auc, scores, positive.astype(float), clusters, draws, seed)


def _with_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    x: np.ndarray,
    y: np.ndarray,
    clusters: np.ndarray,
    draws: int,
    seed: int,
) -> Interval:
    if not len(x) == len(y) == len(clusters):
        raise InputError(
            f"one value and one cluster are needed for each token, got {len(x)}, {len(y)} and {len(clusters)}"
        )
    known = ~(np.isnan(x) | np.isnan(y))
    x, y, clusters = x[known], y[known], clusters[known]
    if not len(x):
        return Interval(np.nan, np.nan, np.nan, 0, 0)
    order = np.argsort(clusters, kind="stable")
    x, y, clusters = x[order], y[order], clusters[order]
    names, starts = np.unique(clusters, return_index=True)
    groups = np.split(np.arange(len(x)), starts[1:])
    value = statistic(x, y)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws if len(names) > 1 else 0):
        tokens = np.concatenate([groups[index] for index in random.integers(len(groups), size=len(groups))])
        drawn.append(statistic(x[tokens], y[tokens]))
    defined = np.array(drawn)[~np.isnan(drawn)] if drawn else np.array([])
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) if len(defined) else (np.nan, np.nan)
    return Interval(value, float(low), float(high), len(x), len(names))


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


def _auc(scores: np.ndarray, positive: np.ndarray) -> float:
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return float("nan")
    ranks = stats.rankdata(scores)
    return float((ranks[positive > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))
