"""From agreement to reliability: drift events, their running count, and where a sequence is exhausted.

Pure functions of tensors over (batch, time). The monitor calls them while it generates and a replay calls them on a stored
record, so that both decide alike. Source: REFERENCE formulas of Prune-OPD (arXiv 2605.07804), section 1:

    B_t = 1 if the agreement at t is too low, on response tokens; 0 on padding
    C_t = B_1 + ... + B_t
    R_t = clip(1 - weight_drop * C_t, 0, 1)
    L_t = R_t + weight_base on response tokens; 0 on padding

Departures
1. R_t is set to exactly 0 from the C_t at which 1 - weight_drop * C_t <= 1e-8, and stays above it before; that count is
   computed once, exactly. In float32 the rounding of 1 - 49 * (1/49) is above 1e-8 and the sequence would live one event
   longer.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prune_opd_hf.algorithm.overlap import mass_overlap, nucleus_accepts, topk_overlap
from prune_opd_hf.errors import ConfigError, InputError

RELIABILITY_FLOOR = 1e-8
"""R_t at or below this counts as zero (the reference's constant)."""

METRICS = ("overlap", "nucleus", "mass")


@dataclass(frozen=True)
class DriftConfig:
    """When a token counts as drift and what that costs.

    Attributes:
        metric: "overlap" compares both models' top-k sets; "mass" the probability they share on the student's; "nucleus" asks
            whether the teacher would accept the sampled token, and needs no student logits.
        top_k: number of candidates k compared at each position.
        threshold: "overlap", "mass": O_t or M_t below it is a drift event. "nucleus": the teacher mass of the nucleus. In
            (0, 1].
        weight_drop: how much reliability one drift event takes, in [0, 1]; 0 never stops anything.
        weight_base: added to the reliability of every response token when rewards are weighted, >= 0.
        min_length: no sequence is stopped before it has this many response tokens.

    Raises:
        ConfigError: a value is outside its range.

    The defaults are those of the published scripts; the reference code's own defaults are 0.9 / 0.02 / 0.

    Example: with these settings reliability is used up by the hundredth drift event.
        >>> DriftConfig().events_to_exhaustion
        100
        >>> DriftConfig(threshold=1.5)
        Traceback (most recent call last):
            ...
        prune_opd_hf.errors.ConfigError: threshold must lie in (0, 1], got 1.5
    """

    metric: str = "overlap"
    top_k: int = 16
    threshold: float = 0.7
    weight_drop: float = 0.01
    weight_base: float = 0.5
    min_length: int = 0

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
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
    """The smallest C with 1 - weight_drop * C <= 1e-8, or None for `weight_drop` 0.

    Example:
        >>> events_to_exhaustion(0.01), events_to_exhaustion(0.3), events_to_exhaustion(0.0)
        (100, 4, None)
    """
    if weight_drop == 0:
        return None
    spendable = 1 - Fraction(str(RELIABILITY_FLOOR))
    return math.ceil(spendable / Fraction(str(weight_drop)))  # as written: 0.1 is a tenth


def agreement(
    metric: str,
    top_k: int,
    *,
    student_topk_ids: Int[Tensor, "batch time recorded"] | None,
    student_topk_log_probs: Float[Tensor, "batch time recorded"] | None,
    teacher_log_probs: Float[Tensor, "batch time recorded"] | None,
    teacher_topk_ids: Int[Tensor, "batch time recorded"],
) -> Float[Tensor, "batch time"]:
    """The value that "overlap" or "mass" compares with its threshold, over the first `top_k` recorded candidates.

    Args:
        metric: "overlap" gives O_t, "mass" gives M_t.
        top_k: how many of the recorded candidates count.
        student_topk_ids, student_topk_log_probs: S_t and log p on it, most likely first.
        teacher_log_probs: log q on S_t.
        teacher_topk_ids: T_t, most likely first.

    Raises:
        ConfigError: another metric.
        InputError: the student's columns are missing, or hold fewer than `top_k` candidates.
    """
    if metric not in ("overlap", "mass"):
        raise ConfigError(f"agreement knows overlap and mass, got {metric!r}")
    if student_topk_ids is None or student_topk_log_probs is None or teacher_log_probs is None:
        raise InputError(f"the metric {metric!r} needs the student's candidates, and this record has none")
    _check_recorded(top_k, teacher_topk_ids)
    if metric == "overlap":
        return topk_overlap(student_topk_ids[..., :top_k], teacher_topk_ids[..., :top_k])
    return mass_overlap(student_topk_log_probs[..., :top_k], teacher_log_probs[..., :top_k])


def find_drift_events(
    config: DriftConfig,
    mask: Bool[Tensor, "batch time"],
    *,
    token_ids: Int[Tensor, "batch time"],
    teacher_topk_ids: Int[Tensor, "batch time recorded"],
    teacher_topk_log_probs: Float[Tensor, "batch time recorded"],
    student_topk_ids: Int[Tensor, "batch time recorded"] | None = None,
    student_topk_log_probs: Float[Tensor, "batch time recorded"] | None = None,
    teacher_log_probs: Float[Tensor, "batch time recorded"] | None = None,
) -> Bool[Tensor, "batch time"]:
    """B_t under any metric, from what a record holds; False where `mask` is.

    Args:
        config: metric, `top_k` and threshold; at least `top_k` candidates must be recorded.
        mask: True on response tokens.
        token_ids: y_t.
        teacher_topk_ids, teacher_topk_log_probs: T_t and log q on it, most likely first.
        student_topk_ids, student_topk_log_probs, teacher_log_probs: S_t, log p and log q on it; "nucleus" needs none of them.

    Raises:
        InputError: the metric needs what is not there, or more candidates than were recorded.

    Example: the student is torn between two tokens of which the teacher knows one. Of the two candidate sets one id in two is
    shared, .5 of the probability, and the sampled token is not the teacher's.
        >>> import torch
        >>> mask = torch.tensor([[True]])
        >>> record = {"token_ids": torch.tensor([[4]]), "teacher_topk_ids": torch.tensor([[[7, 9]]]),
        ...           "teacher_topk_log_probs": torch.tensor([[[0.98, 0.01]]]).log(),
        ...           "student_topk_ids": torch.tensor([[[7, 4]]]),
        ...           "student_topk_log_probs": torch.tensor([[[0.5, 0.5]]]).log(),
        ...           "teacher_log_probs": torch.tensor([[[0.98, 0.002]]]).log()}
        >>> [bool(find_drift_events(DriftConfig(metric, 2, threshold), mask, **record))
        ...  for metric, threshold in (("overlap", 0.5), ("overlap", 0.6), ("mass", 0.5), ("mass", 0.6), ("nucleus", 0.9))]
        [False, True, False, True, True]
    """
    k = config.top_k
    if config.metric == "nucleus":
        _check_recorded(k, teacher_topk_ids)
        accepted = nucleus_accepts(
            token_ids, teacher_topk_ids[..., :k], teacher_topk_log_probs[..., :k], config.threshold
        )
        return ~accepted & mask
    values = agreement(
        config.metric,
        k,
        student_topk_ids=student_topk_ids,
        student_topk_log_probs=student_topk_log_probs,
        teacher_log_probs=teacher_log_probs,
        teacher_topk_ids=teacher_topk_ids,
    )
    return overlap_drift_events(values, mask, config.threshold)


def _check_recorded(top_k: int, recorded_ids: Tensor) -> None:
    if recorded_ids.shape[-1] < top_k:
        raise InputError(
            f"the drift settings compare {top_k} candidates, and {recorded_ids.shape[-1]} were recorded: lower top_k, or "
            f"record more with Teacher(model, top_k={top_k})"
        )


def overlap_drift_events(
    overlap: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], threshold: float
) -> Bool[Tensor, "batch time"]:
    """B_t of the metrics "overlap" and "mass": the value is below the threshold, on response tokens; False on padding.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, True, True, False]])
        >>> overlap_drift_events(torch.tensor([[0.9, 0.7, 0.6, 0.0]]), mask, threshold=0.7)
        tensor([[False, False,  True, False]])
    """
    return (overlap < threshold) & mask


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
    """R for a given number of drift events so far; exactly 0 once the events exhaust it (departure 1).

    Example:
        >>> import torch
        >>> reliability_of_counts(torch.tensor([0, 1, 99, 100, 101]), weight_drop=0.01)
        tensor([1.0000, 0.9900, 0.0100, 0.0000, 0.0000])
    """
    values = (1 - weight_drop * event_counts.float()).clamp(2 * RELIABILITY_FLOOR, 1)
    limit = events_to_exhaustion(weight_drop)
    if limit is None or limit > torch.iinfo(event_counts.dtype).max:
        return values
    return values.masked_fill(event_counts >= limit, 0.0)


def loss_weights(
    reliability: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], weight_base: float
) -> Float[Tensor, "batch time"]:
    """L_t = R_t + weight_base on response tokens, 0 on padding.

    Example:
        >>> import torch
        >>> loss_weights(torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([[True, True, False]]), weight_base=0.5)
        tensor([[1.5000, 1.0000, 0.0000]])
    """
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


def exhausted_length(
    reliability: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], min_length: int = 0
) -> Int[Tensor, " batch"]:
    """How many tokens a drifted sequence keeps: up to and with the first one at or beyond `min_length` with R <= 1e-8.

    Returns:
        The length to keep, at least 1; 0 where the sequence is not exhausted within its response tokens.

    Example: exhausted at its third token; with a minimum of 4 it keeps 4; with one of 6 it never got that far.
        >>> import torch
        >>> values, mask = torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.0]]), torch.ones(1, 5, dtype=torch.bool)
        >>> [int(exhausted_length(values, mask, minimum)) for minimum in (0, 4, 6)]
        [3, 4, 0]
    """
    time = reliability.shape[-1]
    lengths = torch.arange(1, time + 1, device=reliability.device)
    stops_here = (reliability <= RELIABILITY_FLOOR) & mask & (lengths >= min_length)
    first = torch.where(stops_here, lengths, time + 1).amin(dim=-1) if time else lengths.new_zeros(reliability.shape[0])
    return torch.where(first > time, 0, first)
