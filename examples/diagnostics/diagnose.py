"""Diagnostics of stored rollouts: does agreement say where the signal is, and where does it not?"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from rank_statistics import Interval, spearman
from token_gradients import token_gradients
from token_signals import disagreement, gold_log_prob, reward_variance, teacher_entropy
from torch import Tensor, nn

from prune_opd_hf.algorithm.drift import DriftConfig
from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.preflight.replay import drift_events
from prune_opd_hf.records.rollouts import Rollouts

CONTEXT_TOKENS = 8
"""Tokens shown on either side of a failure case."""

HIGH, LOW = 0.9, 0.1
"""Shared mass from which agreement counts as high, and up to which as low."""

EVENT_BANDS = ((0, 0), (1, 2), (3, 5), (6, 10), (11, None))
"""Drift events so far, as ranges."""


@dataclass(frozen=True)
class Correlation:
    """Rank correlation of one metric's agreement with one signal.

    Attributes:
        metric, signal: names.
        where: "all tokens", or a range of positions or of events so far.
        spearman: with its interval over rollouts.
    """

    metric: str
    signal: str
    where: str
    spearman: Interval


@dataclass(frozen=True)
class BandMean:
    """Mean of one signal in one range.

    Attributes:
        by: "position" or "events so far".
        first, last: the range, both included; None for no upper end.
        signal: its name.
        mean, low, high: over rollouts of their own means there, with the 95% interval of that mean (normal).
        rollouts, tokens: how many it rests on.
    """

    by: str
    first: int
    last: int | None
    signal: str
    mean: float
    low: float
    high: float
    rollouts: int
    tokens: int


@dataclass(frozen=True)
class FailureCase:
    """A token at which agreement and signal contradict each other.

    Attributes:
        kind: "high agreement, poor signal" or "low agreement, good signal".
        row, position: which token.
        mass: shared mass there.
        cosine: of its gradient with the reference.
        text_before, token, text_after: around it.
    """

    kind: str
    row: int
    position: int
    mass: float
    cosine: float
    text_before: str
    token: str
    text_after: str


@dataclass(frozen=True)
class DiagnosticsReport:
    """What was found.

    Attributes:
        correlations: of every metric with every signal.
        bands: means of every signal by position and by events so far.
        failures: the worst contradictions, as far as gradients were taken.
        event_setting: under which events were counted.
        reference: the gradient that failure cases are judged by.
        parameters: how many parameters the gradients are of; 0 without gradients.
        whole_model: whether these are all of the student's.
        rollouts, tokens: how many there are.
    """

    correlations: tuple[Correlation, ...]
    bands: tuple[BandMean, ...]
    failures: tuple[FailureCase, ...]
    event_setting: str
    reference: str | None
    parameters: int
    whole_model: bool
    rollouts: int
    tokens: int

    def to_json(self) -> str:
        """As JSON; what is not defined is null."""
        return json.dumps(_without_nan(asdict(self)), indent=1, ensure_ascii=False)


def diagnose(
    rollouts: Rollouts,
    *,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    tokenizer: Any = None,
    correct: Bool[Tensor, " batch"] | None = None,
    gold: Sequence[Sequence[int]] | None = None,
    references: Mapping[str, Tensor] | None = None,
    judged_by: str = "rollouts",
    chosen: Callable[[str], bool] | None = None,
    top_ks: Sequence[int] = (2, 16),
    events: DriftConfig | None = None,
    bands: int = 6,
    cases: int = 8,
    draws: int = 200,
    on_progress: Callable[[int, int], None] | None = None,
) -> DiagnosticsReport:
    """Correlate every metric with what makes a token worth training on, and list where the two contradict each other.

    Args:
        rollouts: unpruned, with the student's candidates.
        student: in the state that made them; gives per-token gradients. Without it there are none.
        teacher: gives its entropy. Without it there is none.
        tokenizer: for the text of failure cases; without it tokens are shown by id.
        correct: whether each rollout's answer is right.
        gold: a right response for each row, as token ids.
        references: further reference gradients by name, see `gradients.gold_gradient`.
        judged_by: the reference that failure cases are judged by: "rollouts" (the full-rollout gradient) or one of these.
        chosen: which parameters of the student count, by name; all of them by default, which is for small models.
        top_ks: candidates of the metrics, as far as they were recorded.
        events: the setting that drift events are counted under; by default the rollouts' own.
        bands: ranges of positions.
        cases: failure cases of each kind.
        draws: of the bootstrap.
        on_progress: called with rollouts done and in all while gradients are taken.

    Raises:
        ConfigError: a number below 1, or a reference to judge by that is not there.
        InputError: the record lacks what is asked for, or not every row has its answer.

    Example: see examples/diagnostics/embedded_diagnostics.py.
    """
    for setting, least in {"bands": bands, "cases": cases, "draws": draws, "top_ks": min(top_ks, default=0)}.items():
        if least < 1:
            raise ConfigError(f"{setting} must be at least 1, got {least if top_ks else 'none'}")
    judges = ("rollouts", *(references or {}))
    if student is not None and judged_by not in judges:
        raise ConfigError(f"judged_by must be one of the references {', '.join(judges)}, got {judged_by!r}")
    for name, given in {"correct": correct, "gold": gold}.items():
        if given is not None and len(given) != len(rollouts):
            raise InputError(f"{name} must hold one entry for each of the {len(rollouts)} rollouts, got {len(given)}")
    mask = rollouts.response_mask
    events = rollouts.config if events is None else events
    signals: dict[str, Tensor] = {"variance of the reward": reward_variance(rollouts)}
    parameters, whole_model, cosine = 0, False, None
    if student is not None:
        found = token_gradients(
            student, rollouts, references=dict(references or {}), chosen=chosen, on_progress=on_progress
        )
        signals |= {f"cosine with {name}": values for name, values in found.cosine.items()}
        parameters, whole_model, cosine = found.parameters, found.whole_model, found.cosine[judged_by]
    if teacher is not None:
        signals["teacher's entropy"] = teacher_entropy(teacher, rollouts)
    if gold is not None:
        signals["log q of the gold token"] = gold_log_prob(rollouts, gold)
    if correct is not None:
        signals["rollout is right"] = correct.float().unsqueeze(-1).expand(mask.shape)
    recorded = rollouts.teacher_topk_ids.shape[-1]
    ks = sorted({min(k, recorded) for k in top_ks})
    agreements = {
        f"{metric} of the top {k}": 1 - disagreement(rollouts, metric, k)
        for metric in ("overlap", "mass", "nucleus")
        for k in (ks if metric != "nucleus" else ks[-1:])
    }
    clusters = torch.arange(len(rollouts)).unsqueeze(-1).expand(mask.shape)
    so_far = drift_events(rollouts, events).long().cumsum(dim=-1)
    places = _ranges(rollouts, so_far, bands)
    correlations = []
    for metric, agreement in agreements.items():
        for signal, values in signals.items():
            for where, inside in {"all tokens": mask, **{name: chosen_ for name, chosen_, _ in places}}.items():
                correlations.append(
                    Correlation(
                        metric,
                        signal,
                        where,
                        spearman(
                            _flat(agreement, inside),
                            _flat(values, inside),
                            _flat(clusters, inside),
                            draws=draws if where == "all tokens" else draws // 4,
                        ),
                    )
                )
    means = [
        _band_mean(by, signal, values, inside)
        for _, inside, by in places
        for signal, values in {**signals, **agreements}.items()
    ]
    mass = agreements[f"mass of the top {ks[-1]}"]
    failures = [] if cosine is None else _failures(rollouts, mass, cosine, tokenizer, cases)
    return DiagnosticsReport(
        correlations=tuple(correlations),
        bands=tuple(mean for mean in means if mean is not None),
        failures=tuple(failures),
        event_setting=f"{events.metric} of the top {events.top_k} at {events.threshold:g}",
        reference=judged_by if cosine is not None else None,
        parameters=parameters,
        whole_model=whole_model,
        rollouts=len(rollouts),
        tokens=int(mask.sum()),
    )


def _ranges(rollouts: Rollouts, so_far: Tensor, bands: int) -> list[tuple[str, Tensor, tuple[str, int, int | None]]]:
    """Name, tokens and bounds of every range of positions and of events so far."""
    mask, time = rollouts.response_mask, rollouts.response_mask.shape[1]
    columns = torch.arange(time)
    width = -(-time // bands)
    ranges: list[tuple[str, Tensor, tuple[str, int, int | None]]] = []
    for first in range(0, time, width):
        last = min(first + width, time) - 1
        inside = mask & (columns >= first) & (columns <= last)
        ranges.append((f"positions {first} to {last}", inside, ("position", first, last)))
    for first, most in EVENT_BANDS:
        inside = mask & (so_far >= first) & (so_far <= (most if most is not None else time))
        name = (
            f"{first} events"
            if first == most
            else f"{first} to {most} events"
            if most is not None
            else f"from {first} events"
        )
        ranges.append((name, inside, ("events so far", first, most)))
    return ranges


def _band_mean(by: tuple[str, int, int | None], signal: str, values: Tensor, inside: Tensor) -> BandMean | None:
    known = inside & ~values.isnan()
    counts = known.sum(dim=-1)
    rows = counts > 0
    if not bool(rows.any()):
        return None
    own = torch.where(known, values, torch.zeros_like(values)).sum(dim=-1)[rows] / counts[rows]
    mean, number = float(own.mean()), int(rows.sum())
    half = 1.96 * float(own.std()) / math.sqrt(number) if number > 1 else math.nan
    return BandMean(*by, signal, mean, mean - half, mean + half, number, int(known.sum()))


def _failures(rollouts: Rollouts, mass: Tensor, cosine: Tensor, tokenizer: Any, cases: int) -> list[FailureCase]:
    known = rollouts.response_mask & ~cosine.isnan()
    found = []
    for kind, among, sign in (
        ("high agreement, poor signal", known & (mass >= HIGH), 1),
        ("low agreement, good signal", known & (mass <= LOW), -1),
    ):
        at = among.nonzero()
        order = (sign * cosine[among]).argsort()
        seen_rows: set[int] = set()
        for row, position in at[order].tolist():
            if row in seen_rows:  # one case a rollout: the list is there to be read
                continue
            seen_rows.add(row)
            ids = rollouts.response_ids[row, : int(rollouts.lengths[row])].tolist()
            found.append(
                FailureCase(
                    kind=kind,
                    row=row,
                    position=position,
                    mass=float(mass[row, position]),
                    cosine=float(cosine[row, position]),
                    text_before=_text(tokenizer, ids[max(0, position - CONTEXT_TOKENS) : position]),
                    token=_text(tokenizer, ids[position : position + 1]),
                    text_after=_text(tokenizer, ids[position + 1 : position + 1 + CONTEXT_TOKENS]),
                )
            )
            if len(seen_rows) == cases:
                break
    return found


def _text(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)


def _flat(values: Tensor, inside: Tensor) -> np.ndarray:
    return values[inside].double().cpu().numpy()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
