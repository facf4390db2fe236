"""From agreement to reliability: drift metrics, drift events, their running count, and where a sequence is exhausted.

Pure functions of tensors over (batch, time). The monitor calls them while it generates and a replay calls them on a stored
record, so that both decide alike. Source: REFERENCE formulas of Prune-OPD (arXiv 2605.07804), section 1:

    B_t = 1 if the agreement at t is too low, on response tokens; 0 on padding
    C_t = B_1 + ... + B_t
    R_t = clip(1 - weight_drop * C_t, 0, 1)
    L_t = R_t + weight_base on response tokens; 0 on padding
    stop at the first t >= min_length with R_t <= 1e-8

A new metric is a function in `overlap.py` and an entry of `METRICS`.

Departures
1. R_t is set to exactly 0 from the C_t at which 1 - weight_drop * C_t <= 1e-8, and stays above it before; that count is
   computed once, exactly. In float32 the rounding of 1 - 49 * (1/49) is above 1e-8 and the sequence would live one event
   longer.
2. The reference stops nothing while it generates: it only caps the length of the next step's rollouts. Here a sequence ends at
   its exhausted token (`drift_stops`).
3. The default metric counts candidates by their probability: one threshold then fits sharp and flat distributions, and nobody has
   to find it (examples/results/three_pairs).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from numbers import Real
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prune_opd_hf.algorithm.overlap import (
    mass_overlap,
    nucleus_accepts,
    tail_accepts,
    topk_overlap,
    weighted_overlap,
)
from prune_opd_hf.errors import ConfigError, InputError

RELIABILITY_FLOOR = 1e-8
"""R_t at or below this counts as zero (the reference's constant)."""

STOP_REASONS = ("eos", "drift", "length", "criterion")
"""Why a row ended. "eos": it sampled a token that ends a response; "drift": its reliability was used up; "length": it met its
cap; "criterion": another stopping criterion ended it, which is no natural end."""


@dataclass(frozen=True)
class ScoredPositions:
    """What drift is judged by at each position: the sampled token and both models' most likely tokens.

    Log-probabilities are over the full vocabulary, at temperature 1.

    Attributes:
        token_ids: y_t.
        teacher_topk_ids, teacher_topk_log_probs: T_t and log q on it, most likely first.
        student_topk_ids, student_topk_log_probs: S_t and log p on it; None where the student was not observed.
        teacher_log_probs: log q on S_t; None where the student was not observed or the teacher cannot score given ids.
        teacher_token_log_probs: log q of y_t; None where it was not kept.
    """

    token_ids: Int[Tensor, "batch time"]
    teacher_topk_ids: Int[Tensor, "batch time k"]
    teacher_topk_log_probs: Float[Tensor, "batch time k"]
    student_topk_ids: Int[Tensor, "batch time k"] | None = None
    student_topk_log_probs: Float[Tensor, "batch time k"] | None = None
    teacher_log_probs: Float[Tensor, "batch time k"] | None = None
    teacher_token_log_probs: Float[Tensor, "batch time"] | None = None

    def first(self, top_k: int) -> "ScoredPositions":
        """The same with the first `top_k` candidates only.

        Raises:
            InputError: fewer were recorded.
        """
        recorded = self.teacher_topk_ids.shape[-1]
        if recorded < top_k:
            raise InputError(
                f"the drift settings compare {top_k} candidates, and {recorded} were recorded: lower top_k, or record more "
                f"with Teacher(model, top_k={top_k})"
            )
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        of_candidates = {name: value for name, value in values.items() if value is not None and value.ndim == 3}
        return replace(self, **{name: value[..., :top_k] for name, value in of_candidates.items()})


@dataclass(frozen=True)
class DriftMetric:
    """How a position's agreement is measured.

    Attributes:
        needs_student: the student's candidates must be known.
        needs_candidate_scores: the teacher must score the student's candidates, not only its own top k.
        agreement: O_t or M_t, which is compared with the threshold; None where the metric accepts or rejects a token instead.
        accepts: whether each token is accepted at a threshold.
        threshold: the default; None where none is right for every pair.
        needs_token_score: the teacher's score of the sampled token must be known.
    """

    needs_student: bool
    needs_candidate_scores: bool
    agreement: Callable[[ScoredPositions], Float[Tensor, "batch time"]] | None
    accepts: Callable[[ScoredPositions, float], Bool[Tensor, "batch time"]]
    threshold: float | None
    needs_token_score: bool = False


def _compared(
    agreement: Callable[[ScoredPositions], Float[Tensor, "batch time"]],
    threshold: float,
    *,
    needs_candidate_scores: bool = False,
) -> DriftMetric:
    """A metric whose agreement must reach the threshold."""

    def accepts(positions: ScoredPositions, threshold: float) -> Bool[Tensor, "batch time"]:
        return agreement(positions) >= threshold

    return DriftMetric(True, needs_candidate_scores, agreement, accepts, threshold)


def _in_nucleus(at: ScoredPositions, mass: float) -> Bool[Tensor, "batch time"]:
    return nucleus_accepts(at.token_ids, at.teacher_topk_ids, at.teacher_topk_log_probs, mass)


def _outside_of_tail(at: ScoredPositions, mass: float) -> Bool[Tensor, "batch time"]:
    return tail_accepts(at.token_ids, at.teacher_topk_ids, at.teacher_topk_log_probs, at.teacher_token_log_probs, mass)


METRICS: dict[str, DriftMetric] = {
    "overlap": _compared(lambda at: topk_overlap(at.student_topk_ids, at.teacher_topk_ids), 0.7),
    "weighted_overlap": _compared(
        lambda at: weighted_overlap(at.student_topk_ids, at.student_topk_log_probs, at.teacher_topk_ids), 0.5
    ),
    "mass": _compared(
        lambda at: mass_overlap(at.student_topk_log_probs, at.teacher_log_probs), 0.5, needs_candidate_scores=True
    ),
    "nucleus": DriftMetric(False, False, None, _in_nucleus, None),
    "tail": DriftMetric(False, False, None, _outside_of_tail, 0.99, needs_token_score=True),
}


@dataclass(frozen=True)
class DriftConfig:
    """When a token counts as drift and what that costs.

    Attributes:
        metric: "weighted_overlap" compares both models' top-k sets, each candidate counted by its probability, "overlap" the same
            with all counted alike, as published; "mass" the probability they share on the student's. "nucleus" and "tail" ask
            whether the teacher would accept the sampled token, and need no student logits: "nucleus" as published rejects all
            that lies outside of the k candidates, "tail" what is surely less likely than nearly all of the teacher's mass.
        top_k: number of candidates k compared at each position.
        threshold: agreement below it is a drift event; with "nucleus" and "tail" the teacher mass of what is accepted. In
            (0, 1]. By default the metric's own: weighted_overlap 0.5, overlap 0.7, mass 0.5, tail 0.99. "nucleus" has
            none: on open text about a fifth of what a model itself writes lies outside of its 16 likeliest tokens.
        weight_drop: how much reliability one drift event takes, in [0, 1]; 0 never stops anything.
        weight_base: added to the reliability of every response token when rewards are weighted, >= 0.
        min_length: no sequence is stopped before it has this many response tokens.

    Raises:
        ConfigError: a value is outside its range.

    Drop and base are those of the published scripts, whose metric and threshold are DriftConfig("overlap"); the reference code's
    own defaults are 0.9 / 0.02 / 0.

    Example: with these settings reliability is used up by the hundredth drift event.
        >>> DriftConfig().events_to_exhaustion
        100
        >>> DriftConfig(threshold=1.5)
        Traceback (most recent call last):
            ...
        prune_opd_hf.errors.ConfigError: threshold must lie in (0, 1], got 1.5
    """

    metric: str = "weighted_overlap"
    top_k: int = 16
    threshold: float = None  # type: ignore[assignment]  # always a number once made
    weight_drop: float = 0.01
    weight_base: float = 0.5
    min_length: int = 0

    def __post_init__(self) -> None:
        if self.metric not in tuple(METRICS):  # whatever its type
            raise ConfigError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        own = METRICS[self.metric].threshold
        if self.threshold is None and own is None:
            raise ConfigError(
                f"the metric {self.metric!r} has no threshold of its own, for it counts every token outside of the teacher's top_k "
                "candidates as drift: choose metric='tail', or give a threshold, such as 0.95"
            )
        if self.threshold is None:
            object.__setattr__(self, "threshold", own)
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
            raise ConfigError(f"top_k must be a whole number of at least 1, got {self.top_k!r}")
        if not (_is_number(self.threshold) and 0 < self.threshold <= 1):
            raise ConfigError(f"threshold must lie in (0, 1], got {self.threshold!r}")
        if not (_is_number(self.weight_drop) and 0 <= self.weight_drop <= 1):
            raise ConfigError(f"weight_drop must lie in [0, 1], got {self.weight_drop!r}")
        if not (_is_number(self.weight_base) and 0 <= self.weight_base < math.inf):
            raise ConfigError(f"weight_base must be a finite number of at least 0, got {self.weight_base!r}")
        if isinstance(self.min_length, bool) or not isinstance(self.min_length, int) or self.min_length < 0:
            raise ConfigError(f"min_length must be a whole number of at least 0, got {self.min_length!r}")

    @property
    def events_to_exhaustion(self) -> int | None:
        """Number of drift events that use the reliability up; None where nothing ever does (`weight_drop` 0)."""
        return events_to_exhaustion(self.weight_drop)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def events_to_exhaustion(weight_drop: float) -> int | None:
    """The smallest C with 1 - weight_drop * C <= 1e-8, or None for `weight_drop` 0."""
    if weight_drop == 0:
        return None
    spendable = 1 - Fraction(str(RELIABILITY_FLOOR))
    return math.ceil(spendable / Fraction(str(weight_drop)))  # as written: 0.1 is a tenth


def agreement(metric: str, top_k: int, positions: ScoredPositions) -> Float[Tensor, "batch time"]:
    """The value that a metric compares with its threshold, over the first `top_k` recorded candidates.

    Args:
        metric: "overlap" gives O_t, "mass" gives M_t; "weighted_overlap" gives O_t weighted by p.
        top_k: how many of the recorded candidates count.
        positions: what is known of each position.

    Raises:
        ConfigError: a metric without such a value.
        InputError: the metric needs what was not recorded.
    """
    measure = METRICS[metric].agreement if metric in METRICS else None
    if measure is None:
        known = ", ".join(name for name, one in METRICS.items() if one.agreement is not None)
        raise ConfigError(f"only {known} measure agreement by a number, got {metric!r}")
    _check_recorded(metric, positions)
    return measure(positions.first(top_k))


def find_drift_events(
    config: DriftConfig, mask: Bool[Tensor, "batch time"], positions: ScoredPositions
) -> Bool[Tensor, "batch time"]:
    """B_t under any metric; False where `mask` is.

    Args:
        config: metric, `top_k` and threshold.
        mask: True on response tokens.
        positions: what is known of each position; at least `top_k` candidates.

    Raises:
        InputError: the metric needs what was not recorded, or more candidates than were recorded.

    Example: the student is torn between two tokens of which the teacher knows one. Of the two candidate sets one id in two is
    shared, .5 of the probability, and the sampled token is not the teacher's.
        >>> import torch
        >>> mask = torch.tensor([[True]])
        >>> positions = ScoredPositions(
        ...     token_ids=torch.tensor([[4]]), teacher_topk_ids=torch.tensor([[[7, 9]]]),
        ...     teacher_topk_log_probs=torch.tensor([[[0.98, 0.01]]]).log(), student_topk_ids=torch.tensor([[[7, 4]]]),
        ...     student_topk_log_probs=torch.tensor([[[0.5, 0.5]]]).log(),
        ...     teacher_log_probs=torch.tensor([[[0.98, 0.002]]]).log())
        >>> [bool(find_drift_events(DriftConfig(metric, 2, threshold), mask, positions))
        ...  for metric, threshold in (("overlap", 0.5), ("overlap", 0.6), ("mass", 0.5), ("mass", 0.6), ("nucleus", 0.9))]
        [False, True, False, True, True]
    """
    _check_recorded(config.metric, positions)
    return ~METRICS[config.metric].accepts(positions.first(config.top_k), config.threshold) & mask


def _check_recorded(metric: str, positions: ScoredPositions) -> None:
    needs = METRICS[metric]
    if needs.needs_student and (positions.student_topk_ids is None or positions.student_topk_log_probs is None):
        raise InputError(f"the metric {metric!r} needs the student's candidates, and this record has none")
    if needs.needs_candidate_scores and positions.teacher_log_probs is None:
        raise InputError(
            f"the metric {metric!r} needs the teacher's scores of the student's candidates; there are none"
        )
    if needs.needs_token_score and positions.teacher_token_log_probs is None:
        raise InputError(
            f"the metric {metric!r} needs the teacher's score of the sampled token, and this record has none"
        )


def reliability(
    drift_events: Bool[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], weight_drop: float
) -> Float[Tensor, "batch time"]:
    """R_t = clip(1 - weight_drop * C_t, 0, 1), 0 on padding. It never rises again within a sequence.

    Args:
        drift_events: B_t.
        mask: True on response tokens.
        weight_drop: reliability lost at each event, in [0, 1].

    Returns:
        float32, whatever the models computed in: counts in bfloat16 stop growing at 256.

    Example: events at the second and the fourth token, half of the reliability each.
        >>> import torch
        >>> events = torch.tensor([[False, True, False, True, False, False]])
        >>> mask = torch.tensor([[True, True, True, True, True, False]])
        >>> reliability(events, mask, weight_drop=0.5)
        tensor([[1.0000, 0.5000, 0.5000, 0.0000, 0.0000, 0.0000]])
    """
    event_counts = (drift_events & mask).long().cumsum(dim=-1)
    return reliability_of_counts(event_counts, weight_drop) * mask


def reliability_of_counts(event_counts: Int[Tensor, "*positions"], weight_drop: float) -> Float[Tensor, "*positions"]:
    """R for a given number of drift events so far; exactly 0 once the events exhaust it (departure 1)."""
    values = (1 - weight_drop * event_counts.float()).clamp(2 * RELIABILITY_FLOOR, 1)
    limit = events_to_exhaustion(weight_drop)
    if limit is None or limit > torch.iinfo(event_counts.dtype).max:
        return values
    return values.masked_fill(event_counts >= limit, 0.0)


def loss_weights(
    reliability: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], weight_base: float
) -> Float[Tensor, "batch time"]:
    """L_t = R_t + weight_base on response tokens, 0 on padding."""
    return (reliability.float() + weight_base) * mask


def effective_length(
    reliability: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Int[Tensor, " batch"]:
    """E: number of response tokens whose reliability is above 1e-8.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, True, True], [True, False, False]])
        >>> effective_length(torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]]), mask)
        tensor([2, 1])
    """
    return ((reliability > RELIABILITY_FLOOR) & mask).sum(dim=-1)


class Stops(NamedTuple):
    """Where rows end.

    Attributes:
        lengths: response tokens that each row keeps.
        drifted: rows that end because their reliability is used up.
    """

    lengths: Int[Tensor, " batch"]
    drifted: Bool[Tensor, " batch"]


def drift_stops(
    drift_events: Bool[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    config: DriftConfig,
    *,
    ended: Bool[Tensor, " batch"] | None = None,
    events_before: Int[Tensor, " batch"] | None = None,
    tokens_before: Int[Tensor, " batch"] | None = None,
) -> Stops:
    """The one rule for where drift ends a row: at its first token at or beyond `min_length` with R_t <= 1e-8, inclusive.

    A row whose last token is both its own end and its exhausted token has ended by itself.

    Args:
        drift_events: B_t.
        mask: True on response tokens, the first ones of each row.
        config: `weight_drop` and `min_length`.
        ended: rows whose last masked token ends them (an end token, another criterion); none by default.
        events_before, tokens_before: drift events and response tokens before the first column; 0 by default. A generation that
            is judged block by block gives the same answer as one that is judged whole.

    Returns:
        Lengths counted from the beginning of the response; a row that does not drift keeps all its masked tokens.

    Example: exhausted at its third token; with a minimum of 4 it keeps 4; with one of 6 it is not stopped.
        >>> import torch
        >>> events, mask = torch.tensor([[False, True, True, True, True]]), torch.ones(1, 5, dtype=torch.bool)
        >>> [drift_stops(events, mask, DriftConfig(weight_drop=0.5, min_length=least)).lengths.item() for least in (0, 4, 6)]
        [3, 4, 5]
        >>> drift_stops(events, mask, DriftConfig(weight_drop=0.5, min_length=6)).drifted.tolist()
        [False]
    """
    rows, time = mask.shape
    none = torch.zeros(rows, dtype=torch.long, device=mask.device)
    before, tokens = (none if value is None else value for value in (events_before, tokens_before))
    whole = tokens + mask.sum(dim=-1)
    if time == 0:
        return Stops(whole, none.bool())
    counts = before.unsqueeze(-1) + (drift_events & mask).long().cumsum(dim=-1)
    lengths = tokens.unsqueeze(-1) + torch.arange(1, time + 1, device=mask.device)
    exhausted = reliability_of_counts(counts, config.weight_drop) <= RELIABILITY_FLOOR
    beyond = whole.amax() + 1
    first = torch.where(exhausted & mask & (lengths >= config.min_length), lengths, beyond).amin(dim=-1)
    drifted = first <= whole
    if ended is not None:
        drifted &= ~(ended & (first == whole))
    return Stops(torch.where(drifted, first, whole), drifted)
