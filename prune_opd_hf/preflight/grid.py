"""Other drift settings on the same rollouts, by replay, and which of them to take.

Without gold answers a token's worth has to be read off the teacher. Two kinds of tokens are set apart by the teacher's
probability of what the student wrote: *agreed*, q(y_t) >= 0.9, which a drift metric should leave alone, and *surprising*,
q(y_t) < 0.01, which it should notice. They are a stand-in, good enough to see a metric that flags everything or nothing; the
nucleus is defined by q(y_t) itself and therefore looks better by them than it is.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from prune_opd_hf.algorithm.drift import DriftConfig
from prune_opd_hf.errors import InputError
from prune_opd_hf.preflight.cost import StepCost
from prune_opd_hf.preflight.replay import Stops, drift_events, find_stops, token_bill
from prune_opd_hf.records.rollouts import Rollouts

AGREED, SURPRISING = 0.9, 0.01
"""Teacher's probability of the sampled token from which it counts as agreed, and below which as surprising."""

MOST_FALSE_ALARMS = 0.05
"""Settings that flag a larger share of the agreed tokens are not recommended."""

LEAST_DETECTION = 0.3
"""Nor are those that flag a smaller share of the surprising ones."""

LEAST_CONTRAST = 0.8
"""Nor those that cut off tokens about as agreed as they keep: after the cut the share of agreed tokens must have fallen to this
part of what it is before, or a cut anywhere else would do as well."""

LEAST_TAKEN_AWAY = 0.02
"""Where the teacher takes away less than this of the student's probability the two are one model for all that training can tell.
What the metrics flag is then only where both are unsure."""

LEAST_ROLLOUTS = 10
"""Fewer rollouts rule no pair out: the embedded pair learns although most of its rollouts drift at once."""

LEAST_SAVING = 0.05
"""Nor those that save less than this share of the sampled tokens."""

ABOUT_AS_CHEAP = 1.1
"""Settings whose projected step takes up to this multiple of the cheapest one's are told apart by what they cut off."""

THRESHOLDS: Mapping[str, Sequence[float]] = {
    "overlap": (0.5, 0.6, 0.7, 0.8, 0.9),
    "mass": (0.2, 0.4, 0.5, 0.6, 0.7, 0.8),
    "nucleus": (0.8, 0.9, 0.95, 0.99),
}
TOP_KS: Mapping[str, Sequence[int]] = {"overlap": (1, 2, 4, 8, 16), "mass": (2, 4, 16), "nucleus": (16,)}
WEIGHT_DROPS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5)


@dataclass(frozen=True)
class GridRow:
    """What one setting makes of the rollouts.

    Attributes:
        metric, top_k, threshold, weight_drop: the setting.
        event_share: share of all tokens that are drift events.
        false_alarms: share of the agreed tokens that are; None where there are none.
        detection: share of the surprising tokens that are; None where there are none.
        kept_share: kept tokens, as a share of the unpruned ones.
        sampled_share: sampled tokens, those past a stop inside a block included, likewise.
        stopped_share: rollouts stopped by drift.
        mean_length: kept tokens of a rollout.
        agreed_before, agreed_after: share of agreed tokens among those kept and those cut off; None where there are none.
        agreed_lost: share of all agreed tokens that are cut off; None where there are none.
        step_seconds: projected for the rollouts of one step.
        step_share: the same as a share of the unpruned step.
    """

    metric: str
    top_k: int
    threshold: float
    weight_drop: float
    event_share: float
    false_alarms: float | None
    detection: float | None
    kept_share: float
    sampled_share: float
    stopped_share: float
    mean_length: float
    agreed_before: float | None
    agreed_after: float | None
    agreed_lost: float | None
    step_seconds: float
    step_share: float

    @property
    def contrast(self) -> float | None:
        """How agreed the tokens after the cuts are, relative to those before."""
        if self.agreed_after is None or not self.agreed_before:
            return None
        return self.agreed_after / self.agreed_before

    @property
    def setting(self) -> str:
        """In words."""
        return f"{self.metric} of the top {self.top_k} at {self.threshold:g}, drop {self.weight_drop:g}"


@dataclass(frozen=True)
class Recommendation:
    """What to do with this pair.

    Attributes:
        works: False where this pair will not work.
        pruning: "drift", or "none" where pruning is not worth it.
        row: the setting; None without pruning.
        reason: why, one sentence a line.
    """

    works: bool
    pruning: str
    row: GridRow | None
    reason: tuple[str, ...]


def settings_grid(recorded: int, weight_drops: Sequence[float] = WEIGHT_DROPS) -> list[DriftConfig]:
    """Every setting that a record with so many candidates can answer; overlap thresholds that no set of k ids can tell apart
    are tried once.

    Example: one shared id out of two or both of them: two thresholds are left of five.
        >>> [(c.top_k, c.threshold) for c in settings_grid(2, weight_drops=(0.1,)) if c.metric == "overlap"]
        [(1, 0.5), (2, 0.5), (2, 0.6)]
    """
    grid: list[DriftConfig] = []
    for metric, thresholds in THRESHOLDS.items():
        for k in sorted({min(k, recorded) for k in TOP_KS[metric]}):
            seen: set[float] = set()
            for threshold in thresholds:
                distinct = math.ceil(round(threshold * k, 9)) if metric == "overlap" else threshold
                if distinct not in seen:
                    seen.add(distinct)
                    grid += [DriftConfig(metric, k, threshold, drop) for drop in weight_drops]
    return grid


def try_settings(
    parts: Sequence[Rollouts], configs: Sequence[DriftConfig], cost: StepCost, *, check_every: int, min_length: int = 0
) -> Iterator[GridRow]:
    """Replay every setting on the rollouts of one or more generations.

    Args:
        parts: unpruned, one record for each generation, since live rows are counted in each.
        configs: settings; their `min_length` is replaced.
        cost: fitted to these generations.
        check_every: tokens between two teacher passes in training.
        min_length: no sequence is stopped before it has so many tokens.

    Raises:
        InputError: no rollouts.
    """
    if not parts:
        raise InputError("there are no rollouts to replay")
    agreed = [agreed_tokens(part) for part in parts]
    surprising = [surprising_tokens(part) for part in parts]
    total = sum(int(part.lengths.sum()) for part in parts)
    rows = sum(len(part) for part in parts)
    unpruned = unpruned_seconds(parts, cost, check_every)
    flagged: dict[tuple[str, int, float], list[Tensor]] = {}
    for config in configs:
        config = replace(config, min_length=min_length)
        key = (config.metric, config.top_k, config.threshold)
        if key not in flagged:
            flagged[key] = [drift_events(part, config) for part in parts]
        events = flagged[key]
        cut = [find_stops(part, config, flags) for part, flags in zip(parts, events, strict=True)]
        bills = [token_bill(stops, part.lengths, check_every) for stops, part in zip(cut, parts, strict=True)]
        kept = [_kept(part, stops) for part, stops in zip(parts, cut, strict=True)]
        lost = [part.response_mask & ~mask for part, mask in zip(parts, kept, strict=True)]
        seconds = sum(cost.seconds(bill, check_every) for bill in bills)
        yield GridRow(
            metric=config.metric,
            top_k=config.top_k,
            threshold=config.threshold,
            weight_drop=config.weight_drop,
            event_share=sum(int(part.sum()) for part in events) / total,
            false_alarms=_share(events, agreed),
            detection=_share(events, surprising),
            kept_share=sum(bill.kept for bill in bills) / total,
            sampled_share=sum(bill.sampled for bill in bills) / total,
            stopped_share=sum(stops.stop_reason.count("drift") for stops in cut) / rows,
            mean_length=sum(bill.kept for bill in bills) / rows,
            agreed_before=_share(agreed, kept),
            agreed_after=_share(agreed, lost),
            agreed_lost=_share(lost, agreed),
            step_seconds=seconds,
            step_share=seconds / unpruned if unpruned > 0 else math.nan,
        )


def unpruned_seconds(parts: Sequence[Rollouts], cost: StepCost, check_every: int) -> float:
    """Projected seconds of the same rollouts without pruning."""
    bills = [token_bill(Stops(part.lengths, part.stop_reason), part.lengths, check_every) for part in parts]
    return sum(cost.seconds(bill, check_every) for bill in bills)


def agreed_tokens(rollouts: Rollouts) -> Bool[Tensor, "batch time"]:
    """Response tokens to which the teacher gives at least `AGREED`."""
    return (rollouts.teacher_token_log_probs >= math.log(AGREED)) & rollouts.response_mask


def surprising_tokens(rollouts: Rollouts) -> Bool[Tensor, "batch time"]:
    """Response tokens to which the teacher gives less than `SURPRISING`."""
    return (rollouts.teacher_token_log_probs < math.log(SURPRISING)) & rollouts.response_mask


def recommend(
    rows: Sequence[GridRow], *, obstacles: Sequence[str], rollouts: int, early_agreement: float, taken_away: float
) -> Recommendation:
    """Of the settings that leave agreed tokens alone, notice surprising ones, and cut where agreement has fallen: the cheapest,
    and among those about as cheap the one that cuts off the fewest agreed tokens. The nucleus only where no other one passes.

    Args:
        rows: what every setting makes of the rollouts.
        obstacles: findings that rule the pair out.
        rollouts: how many the rows rest on.
        early_agreement: mass that both share on the first tenth of the positions, in the rollout at the 90th percentile.
        taken_away: probability of the student's candidates that the teacher does not share, on average over tokens.
    """
    if obstacles:
        return Recommendation(
            False, "none", None, tuple(f"This pair will not work: {obstacle}" for obstacle in obstacles)
        )
    if early_agreement < LEAST_EARLY_AGREEMENT and rollouts < LEAST_ROLLOUTS:
        return Recommendation(
            True,
            "none",
            None,
            (
                f"Not to be told from {rollouts} rollout{'' if rollouts == 1 else 's'}: they share no more than "
                f"{early_agreement:.2f} of the teacher's probability at their beginning, which would rule the pair out if more of "
                f"them did. Take at least {LEAST_ROLLOUTS}, better a few hundred.",
            ),
        )
    if early_agreement < LEAST_EARLY_AGREEMENT:
        return Recommendation(
            False,
            "none",
            None,
            (
                "This pair will not work: already on the first tenth of the positions nine rollouts in ten share no more than "
                f"{early_agreement:.2f} of the teacher's probability (at least {LEAST_EARLY_AGREEMENT} is needed). Look at the "
                "chat template and the prompts, fine-tune the student on the teacher's traces first, or take a nearer teacher.",
            ),
        )
    if taken_away < LEAST_TAKEN_AWAY:
        return Recommendation(
            True,
            "none",
            None,
            (
                f"There is nothing to prune, and little to distil: the teacher takes away {taken_away:.1%} of the student's "
                "probability on average. Where a metric flags tokens, both models are unsure in the same way.",
            ),
        )
    alive = [row for row in rows if (row.false_alarms or 0.0) <= MOST_FALSE_ALARMS]
    noticing = [row for row in alive if row.detection is None or row.detection >= LEAST_DETECTION]
    falling = [row for row in noticing if row.contrast is not None and row.contrast <= LEAST_CONTRAST]
    saving = [row for row in falling if row.sampled_share <= 1 - LEAST_SAVING]
    if saving:
        pool = [row for row in saving if row.metric != "nucleus"] or saving
        limit = ABOUT_AS_CHEAP * min(row.step_seconds for row in pool)
        about_as_cheap = [row for row in pool if row.step_seconds <= limit]
        best = min(about_as_cheap, key=lambda row: (row.agreed_lost or 0.0, row.step_seconds, row.top_k))
        assert best.agreed_before is not None
        assert best.agreed_after is not None
        return Recommendation(
            True,
            "drift",
            best,
            (
                f"Take {best.setting}: it flags {best.false_alarms or 0.0:.1%} of the tokens that the teacher agrees with "
                f"and {'none were' if best.detection is None else format(best.detection, '.0%')} of those that surprise it.",
                f"It keeps {best.kept_share:.0%} of the tokens; {best.agreed_before:.0%} of them are agreed, of those it "
                f"cuts off {best.agreed_after:.0%}. {best.agreed_lost or 0.0:.1%} of the agreed tokens are lost.",
                f"A step of rollouts is projected at {best.step_share:.0%} of its unpruned time.",
                f"Of the settings within {ABOUT_AS_CHEAP - 1:.0%} of the cheapest one that passes, it loses the fewest agreed "
                "tokens. Early in training the student drifts more than it will later: a minimum length keeps the ends in "
                "training.",
            ),
        )
    if not alive:
        reason = f"every setting flags more than {MOST_FALSE_ALARMS:.0%} of the tokens that the teacher agrees with"
    elif not noticing:
        reason = (
            f"no setting with few false alarms notices {LEAST_DETECTION:.0%} of the tokens that surprise the teacher"
        )
    elif not falling:
        reason = (
            "no setting cuts where agreement has fallen: what lies behind the cuts is about as agreed as what lies before, "
            "or nothing is cut"
        )
    else:
        reason = f"no setting that passes the other tests saves {LEAST_SAVING:.0%} of the sampled tokens"
    return Recommendation(
        True,
        "none",
        None,
        (f"Pruning by drift is not worth it on these rollouts: {reason}. Plain distillation will do.",),
    )


LEAST_EARLY_AGREEMENT = 0.2
"""Shared mass on the first tenth of the positions below which the teacher cannot lead the student anywhere: what the best tenth
of the rollouts must have, since the embedded pair learns although four in five of its rollouts drift at once."""


def _share(flags: Sequence[Tensor], among: Sequence[Tensor]) -> float | None:
    total = sum(int(mask.sum()) for mask in among)
    return sum(int((flag & mask).sum()) for flag, mask in zip(flags, among, strict=True)) / total if total else None


def _kept(part: Rollouts, stops: Stops) -> Tensor:
    columns = torch.arange(part.response_mask.shape[1], device=part.response_mask.device)
    return part.response_mask & (columns < stops.lengths.unsqueeze(-1))
