"""Whether agreement falls along the rollouts, or is as low everywhere: prefix drift, or steady disagreement.

Pruning pays where what lies behind a stop is worth less to training than what lies before it. A setting can stop rows of a pair
that disagrees evenly as well; a fixed length does the same there. So the share of agreed tokens behind the stops is compared with
the share before them, with an interval, and with a control: the same rollouts with the positions of each one shuffled, which keeps
how often the pair disagrees and takes away where.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_opd_hf.algorithm.drift import DriftConfig
from prune_opd_hf.preflight.replay import drift_events, find_stops, kept_tokens
from prune_opd_hf.preflight.settings_grid import LEAST_CONTRAST, LEAST_ROLLOUTS, Recommendation, agreed_tokens
from prune_opd_hf.records.rollouts import Rollouts

RESAMPLES, SHUFFLES = 2000, 8

LEAST_PROMPTS = 5
"""An interval over fewer prompts says nothing."""

MOST_MORE = 20
"""Times as many rollouts as there are that nobody is asked for."""

AS_SHUFFLED = 0.9
"""From this part of the shuffled contrast on agreement counts as not falling."""


@dataclass(frozen=True)
class Contrast:
    """Share of agreed tokens behind the stops, as a part of the share before them.

    Attributes:
        value: 1 where the stops make no difference.
        low, high: 95% interval, by a bootstrap of prompts with all of their rollouts.
        shuffled: the same with shuffled positions.
        beyond_shuffled: upper end of the 95% interval of value / shuffled.
        stopped: rollouts that are stopped.
        prompts: different prompts.
    """

    value: float
    low: float
    high: float
    shuffled: float
    beyond_shuffled: float
    stopped: int
    prompts: int


def measure_contrast(rollouts: Rollouts, config: DriftConfig, seed: int = 0) -> Contrast:
    """The contrast of a setting that stops some of these unpruned rollouts."""
    generator = torch.Generator().manual_seed(seed)
    events, agreed, mask = drift_events(rollouts, config), agreed_tokens(rollouts), rollouts.response_mask
    counts, stopped = _counts(rollouts, config, events, agreed)
    shuffled = np.zeros_like(counts)
    for _ in range(SHUFFLES):
        order = torch.rand(mask.shape, generator=generator).to(mask.device).masked_fill(~mask, 2.0).argsort(dim=-1)
        shuffled += _counts(rollouts, config, events.gather(-1, order), agreed.gather(-1, order))[0]
    (resampled, number), (control, _) = (_resampled(rollouts, each, seed) for each in (counts, shuffled))
    low, high = np.percentile(resampled, [2.5, 97.5])
    beyond = float(np.percentile(resampled / np.maximum(control, 1e-9), 97.5))
    value, control_value = (float(_contrast(each.sum(axis=0))) for each in (counts, shuffled))
    return Contrast(value, float(low), float(high), control_value, beyond, stopped, number)


def confirm_falling_agreement(advice: Recommendation, rollouts: Rollouts) -> Recommendation:
    """Keep advice to prune only where agreement surely falls at the stops; else say how many rollouts would show it. Where the
    advice is not to prune a pair that works, say how agreement goes along the rollouts."""
    if advice.row is None:
        return replace(advice, reason=(*advice.reason, describe_profile(rollouts))) if advice.works else advice
    contrast = measure_contrast(rollouts, advice.row.config)
    found = (
        f"Behind its stops the share of agreed tokens is {contrast.value:.2f} of what it was, 95% interval [{contrast.low:.2f}, "
        f"{contrast.high:.2f}]; with shuffled positions it would be {contrast.shuffled:.2f}."
    )
    if contrast.value >= AS_SHUFFLED * contrast.shuffled:
        reason = (
            f"Pruning by drift is not worth it on these rollouts: {advice.row.setting} would pass, but agreement does not fall "
            "along the rollouts. The two disagree evenly, and a fixed length would do as well. Plain distillation will do."
        )
        return Recommendation(True, None, (reason, found))
    few = contrast.stopped < LEAST_ROLLOUTS or contrast.prompts < LEAST_PROMPTS
    if contrast.beyond_shuffled >= 1 or contrast.high >= LEAST_CONTRAST or few:
        wide = (contrast.high - contrast.value) / max(LEAST_CONTRAST - contrast.value, 0.01)
        more = max(wide**2, LEAST_ROLLOUTS / max(contrast.stopped, 1), LEAST_PROMPTS / contrast.prompts, 2.0)
        needed = f"Take about {math.ceil(len(rollouts) * more)}, of as many prompts as you can."
        if more > MOST_MORE:
            needed = "More would hardly decide: take it that there is nothing to prune."
        reason = (
            f"{len(rollouts)} rollouts cannot decide whether to prune: {advice.row.setting} would pass, and stops "
            f"{contrast.stopped} of them. {needed}"
        )
        return Recommendation(True, None, (reason, found))
    return replace(advice, reason=(advice.reason[0], found, *advice.reason[1:]))


def describe_profile(rollouts: Rollouts, seed: int = 0) -> str:
    """Share of agreed tokens in the second half of the rollouts as a part of that in the first, with its interval over prompts."""
    agreed, mask = agreed_tokens(rollouts), rollouts.response_mask
    late = torch.arange(mask.shape[1], device=mask.device) >= (rollouts.lengths.unsqueeze(-1) + 1) // 2
    columns = [(agreed & ~late).sum(-1), (mask & ~late).sum(-1), (agreed & late).sum(-1), (mask & late).sum(-1)]
    counts = torch.stack(columns, dim=-1).double().cpu().numpy()
    low, high = np.percentile(_resampled(rollouts, counts, seed)[0], [2.5, 97.5])
    agreed_early, early, agreed_late, later = counts.sum(axis=0)
    if agreed_early == 0 or later == 0:
        why = (
            "no rollout has a second token" if later == 0 else "the teacher agrees with no token of their first halves"
        )
        return f"How agreement goes along these rollouts cannot be told: {why}."
    value = float(_contrast(counts.sum(axis=0)))
    return (
        f"Of the first half of each rollout the teacher agrees with {agreed_early / early:.0%} of the tokens, of the "
        f"second with {agreed_late / later:.0%}: {value:.2f} of it, 95% interval [{low:.2f}, {high:.2f}]."
    )


def _counts(
    rollouts: Rollouts, config: DriftConfig, events: Bool[Tensor, "batch time"], agreed: Bool[Tensor, "batch time"]
) -> tuple[np.ndarray, int]:
    """Of each rollout: agreed tokens before its stop, tokens before, agreed tokens behind, tokens behind; rollouts stopped."""
    stops = find_stops(rollouts, config, events)
    kept = kept_tokens(rollouts, stops)
    lost = rollouts.response_mask & ~kept
    columns: list[Float[Tensor, " batch"]] = [
        (agreed & kept).sum(-1),
        kept.sum(-1),
        (agreed & lost).sum(-1),
        lost.sum(-1),
    ]
    return torch.stack(columns, dim=-1).double().cpu().numpy(), int(stops.drifted.sum())


def _contrast(counts: np.ndarray) -> np.ndarray:
    """1 where nothing lies behind a stop."""
    agreed_before, before, agreed_behind, behind = np.moveaxis(counts, -1, 0)
    share_before, share_behind = agreed_before / np.maximum(before, 1), agreed_behind / np.maximum(behind, 1)
    comparable = (behind > 0) & (agreed_before > 0)
    return np.where(comparable, share_behind / np.maximum(share_before, 1e-9), 1.0)


def _resampled(rollouts: Rollouts, counts: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
    """The contrast of each resample of the prompts with all of their rollouts, and the number of prompts."""
    rows = zip(rollouts.prompt_ids, rollouts.prompt_mask, strict=True)
    by_prompt = pd.Series([str(ids[mask].tolist()) for ids, mask in rows])
    of_prompts = pd.DataFrame(counts).groupby(by_prompt).sum().to_numpy()
    number = len(of_prompts)
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), RESAMPLES)
    return _contrast(drawn @ of_prompts), number
