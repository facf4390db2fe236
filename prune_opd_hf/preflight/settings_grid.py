"""Other drift settings on the same rollouts, by replay, and which of them to take.

Without gold answers a token's worth has to be read off the two models. Two kinds of tokens are set apart by how the teacher's
probability of the sampled token compares with the student's: *agreed*, q(y_t) >= p(y_t) / 2, which a drift metric should leave
alone, and *surprising*, q(y_t) < p(y_t) / 10, which it should notice. Compared with the student's, and not by itself, since on
open text neither model is sure of many tokens, and that is no disagreement. The labels are a stand-in, good enough to see a
metric that flags everything or nothing; "nucleus" and "tail" are defined by q(y_t) and look better by them than they are.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_opd_hf.algorithm.drift import METRICS, DriftConfig, Stops
from prune_opd_hf.preflight.replay import drift_events, find_stops, kept_tokens
from prune_opd_hf.preflight.step_cost import StepCost
from prune_opd_hf.records.rollouts import Rollouts

AGREED, SURPRISING = 0.5, 0.1
"""Teacher's probability of the sampled token, as a share of the student's, from which it counts as agreed, and below which as
surprising."""

MOST_FALSE_ALARMS = 0.05
"""A recommended setting flags no larger share of the agreed tokens,"""

LEAST_DETECTION = 0.3
"""no smaller share of the surprising ones,"""

LEAST_CONTRAST = 0.8
"""stops where the share of agreed tokens falls to this part of what it was (or stops anywhere else would do as well),"""

MOST_LOST = 0.1
"""loses at most this share of the agreed tokens,"""

LEAST_SAVING = 0.05
"""and saves at least this share of the sampled tokens."""

ABOUT_AS_CHEAP = 1.1
"""Among settings whose projected step takes up to this multiple of the cheapest one's, the agreed tokens lost decide."""

LEAST_TAKEN_AWAY = 0.02
"""Where the teacher takes away less than this of the student's probability the two are one model as far as training can see, and
the metrics flag only tokens where both are unsure."""

LEAST_EARLY_AGREEMENT = 0.2
"""Shared mass on the first tenth of the positions below which the teacher cannot lead the student anywhere: what the best tenth
of the rollouts must have, since the embedded pair learns although four in five of its rollouts drift at once."""

LEAST_ROLLOUTS = 10
"""Fewer rollouts rule no pair out: the embedded pair learns although most of its rollouts drift at once."""

THRESHOLDS: Mapping[str, Sequence[float]] = {
    "overlap": (0.5, 0.6, 0.7, 0.8, 0.9),
    "weighted_overlap": (0.3, 0.5, 0.7, 0.9),
    "mass": (0.2, 0.4, 0.5, 0.6, 0.7, 0.8),
    "nucleus": (0.8, 0.9, 0.95, 0.99),
    "tail": (0.95, 0.99, 0.999),
}
TOP_KS: Mapping[str, Sequence[int]] = {
    "overlap": (1, 2, 4, 8, 16),
    "weighted_overlap": (16,),
    "mass": (2, 4, 16),
    "nucleus": (16,),
    "tail": (16,),
}
WEIGHT_DROPS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5)


@dataclass(frozen=True)
class GridRow:
    """What one setting makes of the rollouts. A share of tokens of which there are none is None.

    Attributes:
        config: the setting.
        false_alarms: share of the agreed tokens that are drift events.
        detection: share of the surprising tokens that are drift events.
        kept_share: kept tokens, as a share of the unpruned ones.
        sampled_share: sampled tokens, those past a stop inside a block included, likewise.
        stopped_share: rollouts stopped by drift.
        agreed_before, agreed_after: share of agreed tokens among those kept and those lost.
        agreed_lost: share of all agreed tokens that are lost.
        step_seconds: projected for the rollouts of one step.
        step_share: the same as a share of the unpruned step.
    """

    config: DriftConfig
    false_alarms: float | None
    detection: float | None
    kept_share: float
    sampled_share: float
    stopped_share: float
    agreed_before: float | None
    agreed_after: float | None
    agreed_lost: float | None
    step_seconds: float
    step_share: float

    @property
    def setting(self) -> str:
        """One phrase that names the setting."""
        return f"{metric_name(self.config)}, drop {self.config.weight_drop:g}"


def metric_name(config: DriftConfig) -> str:
    """Metric, top k and threshold in one phrase."""
    return f"{config.metric} of the top {config.top_k} at {config.threshold:g}"


@dataclass(frozen=True)
class Recommendation:
    """What to do with this pair.

    Attributes:
        works: False where this pair will not work.
        row: the setting to prune with; None where pruning is not worth it.
        reason: why, one sentence a line.
    """

    works: bool
    row: GridRow | None
    reason: tuple[str, ...]


def settings_grid(
    recorded: int, min_length: int = 0, weight_drops: Sequence[float] = WEIGHT_DROPS
) -> list[DriftConfig]:
    """Every setting that a record with so many candidates can answer; overlap thresholds between which no set of k ids
    can lie are tried once.
    """
    grid: dict[tuple[Any, ...], DriftConfig] = {}
    for metric, thresholds in THRESHOLDS.items():
        for k, threshold, drop in product(sorted({min(k, recorded) for k in TOP_KS[metric]}), thresholds, weight_drops):
            distinct = math.ceil(round(threshold * k, 9)) if metric == "overlap" else threshold
            grid.setdefault((metric, k, distinct, drop), DriftConfig(metric, k, threshold, drop, min_length=min_length))
    return list(grid.values())


def try_settings(
    rollouts: Rollouts, configs: Sequence[DriftConfig], cost: StepCost, *, batch_size: int, check_every: int
) -> Iterator[GridRow]:
    """Replay every setting on one set of unpruned rollouts, to whose generation `cost` was fitted.

    Args:
        batch_size, check_every: rollouts generated together, and tokens between two teacher passes, in training.
    """
    agreed = agreed_tokens(rollouts)
    surprising = (likelihood_ratio(rollouts) < math.log(SURPRISING)) & rollouts.response_mask
    tokens = int(rollouts.lengths.sum())
    unpruned = unpruned_seconds(rollouts, cost, batch_size=batch_size, check_every=check_every)
    flagged: dict[tuple[str, int, float], Tensor] = {}
    for config in configs:
        key = (config.metric, config.top_k, config.threshold)
        if key not in flagged:
            flagged[key] = drift_events(rollouts, config)
        events = flagged[key]
        stops = find_stops(rollouts, config, events)
        bills = cost.bills(rollouts, config, events, stops, batch_size=batch_size, check_every=check_every)
        kept = kept_tokens(rollouts, stops)
        lost = rollouts.response_mask & ~kept
        seconds = sum(cost.seconds(bill, check_every) for bill in bills)
        yield GridRow(
            config=config,
            false_alarms=_share(events, agreed),
            detection=_share(events, surprising),
            kept_share=int(kept.sum()) / tokens,
            sampled_share=sum(bill.sampled for bill in bills) / tokens,
            stopped_share=int(stops.drifted.sum()) / len(rollouts),
            agreed_before=_share(agreed, kept),
            agreed_after=_share(agreed, lost),
            agreed_lost=_share(lost, agreed),
            step_seconds=seconds,
            step_share=seconds / unpruned if unpruned > 0 else 1.0,
        )


def unpruned_seconds(rollouts: Rollouts, cost: StepCost, *, batch_size: int, check_every: int) -> float:
    """Projected seconds of the same rollouts without pruning."""
    never, none = Stops(rollouts.lengths, rollouts.lengths < 0), torch.zeros_like(rollouts.response_mask)
    unpruned = DriftConfig(weight_drop=0.0)
    bills = cost.bills(rollouts, unpruned, none, never, batch_size=batch_size, check_every=check_every)
    return sum(cost.seconds(bill, check_every) for bill in bills)


def agreed_tokens(rollouts: Rollouts) -> Bool[Tensor, "batch time"]:
    """Response tokens that the teacher finds at least `AGREED` times as likely as the student."""
    return (likelihood_ratio(rollouts) >= math.log(AGREED)) & rollouts.response_mask


def likelihood_ratio(rollouts: Rollouts) -> Float[Tensor, "batch time"]:
    """log q - log p of the sampled tokens."""
    assert rollouts.token_log_probs is not None  # a preflight observes the student
    return rollouts.teacher_token_log_probs - rollouts.token_log_probs


def recommend(rows: Sequence[GridRow], *, rollouts: int, early_agreement: float, taken_away: float) -> Recommendation:
    """Of the settings that leave agreed tokens alone, notice surprising ones, and stop where agreement has fallen: the
    cheapest, and among those about as cheap the one that loses the fewest agreed tokens. What judges the sampled token alone
    only where no other one passes.

    Args:
        rows: what every setting makes of the rollouts.
        rollouts: how many the rows rest on.
        early_agreement: mass that both share on the first tenth of the positions, in the rollout at the 90th percentile.
        taken_away: probability of the student's candidates that the teacher does not share, on average over tokens.
    """
    if early_agreement < LEAST_EARLY_AGREEMENT and rollouts < LEAST_ROLLOUTS:
        reason = (
            f"{rollouts} rollout{'' if rollouts == 1 else 's'} cannot decide: they share no more than {early_agreement:.2f} of the "
            "teacher's probability at their beginning, which would rule the pair out if more of them did. Take at least "
            f"{LEAST_ROLLOUTS}, better a few hundred."
        )
        return Recommendation(True, None, (reason,))
    if early_agreement < LEAST_EARLY_AGREEMENT:
        reason = (
            "This pair will not work: already on the first tenth of the positions nine rollouts in ten share no more than "
            f"{early_agreement:.2f} of the teacher's probability (at least {LEAST_EARLY_AGREEMENT} is needed). Look at the "
            "chat template and the prompts, fine-tune the student on the teacher's traces first, or take a nearer teacher."
        )
        return Recommendation(False, None, (reason,))
    if taken_away < LEAST_TAKEN_AWAY:
        reason = (
            f"There is nothing to prune, and little to distil: the teacher takes away {taken_away:.1%} of the student's "
            "probability on average. Where a metric flags tokens, both models are unsure in the same way."
        )
        return Recommendation(True, None, (reason,))
    passing = list(rows)
    for passes, failure in _TESTS:
        passing = [row for row in passing if passes(row)]
        if not passing:
            reason = f"Pruning by drift is not worth it on these rollouts: {failure}. Plain distillation will do."
            return Recommendation(True, None, (reason,))
    pool = [row for row in passing if METRICS[row.config.metric].needs_student] or passing
    limit = ABOUT_AS_CHEAP * min(row.step_seconds for row in pool)
    about_as_cheap = [row for row in pool if row.step_seconds <= limit]
    best = min(about_as_cheap, key=lambda row: (row.agreed_lost or 0.0, row.step_seconds, row.config.top_k))
    reasons = (
        f"Take {best.setting}: it flags {best.false_alarms or 0.0:.1%} of the tokens that the teacher agrees with "
        f"and {'none were' if best.detection is None else format(best.detection, '.0%')} of those that surprise it.",
        f"It keeps {best.kept_share:.0%} of the tokens; {best.agreed_before:.0%} of them are agreed, of those "
        f"behind its stops {best.agreed_after:.0%}. {best.agreed_lost or 0.0:.1%} of the agreed tokens are lost.",
        f"A step of rollouts is projected at {best.step_share:.0%} of its unpruned time.",
        f"Of the settings within {ABOUT_AS_CHEAP - 1:.0%} of the cheapest one that passes, it loses the fewest agreed "
        "tokens. Early in training the student drifts more than it will later: a minimum length keeps the ends in training.",
    )
    return Recommendation(True, best, reasons)


_TESTS: Sequence[tuple[Callable[[GridRow], bool], str]] = (
    (
        lambda row: (row.false_alarms or 0.0) <= MOST_FALSE_ALARMS,
        f"every setting flags more than {MOST_FALSE_ALARMS:.0%} of the tokens that the teacher agrees with",
    ),
    (
        lambda row: row.detection is None or row.detection >= LEAST_DETECTION,
        f"no setting with few false alarms notices {LEAST_DETECTION:.0%} of the tokens that surprise the teacher",
    ),
    (
        lambda row: row.agreed_after is not None and row.agreed_after < LEAST_CONTRAST * (row.agreed_before or 0.0),
        "no setting stops where agreement has fallen: what lies behind the stops is about as agreed as what lies before, or "
        "nothing is stopped",
    ),
    (
        lambda row: (row.agreed_lost or 0.0) <= MOST_LOST,
        f"every setting that passes the other tests loses more than {MOST_LOST:.0%} of the agreed tokens",
    ),
    (
        lambda row: row.sampled_share <= 1 - LEAST_SAVING,
        f"no setting that passes the other tests saves {LEAST_SAVING:.0%} of the sampled tokens",
    ),
)
"""What a setting must pass to be recommended, in order, and what is reported where none is left."""


def _share(flags: Tensor, among: Tensor) -> float | None:
    total = int(among.sum())
    return int((flags & among).sum()) / total if total else None
