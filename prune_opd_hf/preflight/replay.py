"""What other drift settings would have made of a stored record: its events, stops and lengths, without a new generation.

Pure functions of `Rollouts`. They call the functions of drift.py that the monitor calls while it generates, so a replay of
greedy rollouts gives the very stops that a run with those settings makes, in either loop and for every `check_every`. Of
sampled rollouts it gives one draw: those that the same random numbers would have made.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from prune_opd_hf.algorithm.drift import DriftConfig, drift_stops, find_drift_events, reliability
from prune_opd_hf.algorithm.overlap import topk_overlap
from prune_opd_hf.errors import InputError
from prune_opd_hf.records.rollouts import Rollouts

PRUNED_RECORD = (
    "row {row} of the record was stopped by drift after {length} tokens, and the replayed settings would have let it run on: "
    "generate the record with truncate=False"
)


def replay(rollouts: Rollouts, config: DriftConfig, *, longest: int | None = None) -> Rollouts:
    """The record that a run with `config` would have left, had it sampled these tokens.

    Args:
        rollouts: generated without truncation, with at least `config.top_k` candidates recorded.
        config: the settings to replay.
        longest: another, shorter cap on the response; None keeps the record's own.

    Returns:
        The rows cut at their exhausted tokens, with the events, reliability and overlap of `config`.

    Raises:
        InputError: too few candidates, the student's columns missing where the metric needs them, or a row that was
            stopped by drift before the replayed settings would have stopped it.

    Example: a record of one row that drifts at its second and third token.
        >>> import torch
        >>> ids = torch.tensor([[[5], [5], [5], [5]]])
        >>> record = Rollouts(
        ...     prompt_ids=torch.tensor([[1]]), prompt_mask=torch.tensor([[True]]),
        ...     response_ids=torch.tensor([[5, 6, 6, 5]]), response_mask=torch.ones(1, 4, dtype=torch.bool),
        ...     teacher_token_log_probs=torch.zeros(1, 4), teacher_topk_ids=ids, teacher_topk_log_probs=torch.zeros(1, 4, 1),
        ...     drift_events=torch.zeros(1, 4, dtype=torch.bool), reliability=torch.ones(1, 4), stop_reason=("length",),
        ...     config=DriftConfig("nucleus", 1, 0.9, weight_drop=0.0))
        >>> [replay(record, DriftConfig("nucleus", 1, 0.9, weight_drop=drop)).lengths.item() for drop in (1.0, 0.5, 0.3)]
        [2, 3, 4]
    """
    events = drift_events(rollouts, config)
    stops = find_stops(rollouts, config, events, longest=longest)
    cut = cut_rows(rollouts, stops.lengths, stops.stop_reason)
    kept_events = events[:, : cut.response_mask.shape[1]] & cut.response_mask
    return replace(
        cut,
        config=config,
        drift_events=kept_events,
        reliability=reliability(kept_events, cut.response_mask, config.weight_drop),
        overlap=_overlap(cut, config.top_k),
    )


@dataclass(frozen=True)
class Stops:
    """Where replayed settings end each row.

    Attributes:
        lengths: tokens kept.
        stop_reason: "eos", "drift" or "length" for each row.
    """

    lengths: Int[Tensor, " batch"]
    stop_reason: tuple[str, ...]


def find_stops(
    rollouts: Rollouts, config: DriftConfig, events: Bool[Tensor, "batch time"], *, longest: int | None = None
) -> Stops:
    """The lengths alone, without a new record: what trying many settings needs.

    Args:
        rollouts, config, longest: as for `replay`.
        events: B_t under `config`, from `drift_events`.

    Raises:
        InputError: a cap below 1, or a row that was stopped by drift before these settings would have stopped it.
    """
    mask = rollouts.response_mask
    if longest is not None:
        if longest < 1:
            raise InputError(f"the cap of a replay must be at least 1 token, got {longest}")
        mask = mask & (torch.arange(mask.shape[1], device=mask.device) < longest)
    limits = mask.sum(dim=-1)
    reasons = [
        "length" if limit < whole else recorded
        for limit, whole, recorded in zip(limits.tolist(), rollouts.lengths.tolist(), rollouts.stop_reason, strict=True)
    ]
    ended = torch.tensor([reason in ("eos", "criterion") for reason in reasons], device=mask.device)
    stops = drift_stops(events, mask, config, ended=ended)
    drifted = stops.drifted.tolist()
    for row, reason in enumerate(reasons):
        if reason == "drift" and not drifted[row]:
            raise InputError(PRUNED_RECORD.format(row=row, length=int(limits[row])))
    reasons = ["drift" if drifts else reason for drifts, reason in zip(drifted, reasons, strict=True)]
    return Stops(stops.lengths, tuple(reasons))


def drift_events(rollouts: Rollouts, config: DriftConfig) -> Bool[Tensor, "batch time"]:
    """B_t of a record under other settings, over all of its tokens.

    Raises:
        InputError: the metric needs more than the record holds.
    """
    return find_drift_events(config, rollouts.response_mask, rollouts.positions)


def cut_rows(rollouts: Rollouts, lengths: Int[Tensor, " batch"], stop_reason: tuple[str, ...]) -> Rollouts:
    """The record with each row cut after its first `lengths` tokens, and no column that is padding in all rows.

    Raises:
        InputError: no token is left of some row.
    """
    if bool((lengths < 1).any()):
        raise InputError("every row must keep at least one token")
    columns = torch.arange(rollouts.response_mask.shape[1], device=lengths.device)
    mask = rollouts.response_mask & (columns < lengths.unsqueeze(-1))
    width = int(mask.sum(dim=-1).max())
    mask = mask[:, :width]
    cut: dict[str, Tensor] = {"response_mask": mask}
    for name, tensor in rollouts.tensors().items():
        if name in ("prompt_ids", "prompt_mask", "response_mask"):
            continue
        padding = rollouts.pad_token_id if name == "response_ids" else 0
        values = tensor[:, :width]
        inside = mask.unsqueeze(-1) if values.ndim == 3 else mask
        cut[name] = torch.where(inside, values, torch.full_like(values, padding))
    return replace(rollouts, **cut, stop_reason=stop_reason)


@dataclass(frozen=True)
class TokenBill:
    """What a step of rollouts costs in tokens.

    Attributes:
        sampled: tokens that the student samples and the teacher scores, those past a stop inside a block included.
        kept: tokens that enter the loss.
        live_rows: how many rows are still generated at each response position.
    """

    sampled: int
    kept: int
    live_rows: tuple[int, ...]


def token_bill(stops: Stops, full_lengths: Int[Tensor, " batch"], check_every: int) -> TokenBill:
    """The tokens that a generation with row dropping would have sampled: a drifted row runs on to the end of its block.

    Args:
        stops: what `find_stops` returned.
        full_lengths: tokens that each row has without stops; no row runs beyond them.
        check_every: tokens between two teacher passes.

    Example: stopped at its third token of ten, in blocks of four, a row samples four.
        >>> token_bill(Stops(torch.tensor([3]), ("drift",)), torch.tensor([10]), check_every=4)
        TokenBill(sampled=4, kept=3, live_rows=(1, 1, 1, 1))
    """
    lengths = stops.lengths
    drifted = torch.tensor([reason == "drift" for reason in stops.stop_reason], device=lengths.device)
    to_block_end = torch.minimum(-(-lengths // check_every) * check_every, full_lengths)
    sampled = torch.where(drifted, to_block_end, lengths)
    positions = torch.arange(int(sampled.max()), device=sampled.device)
    live = (sampled.unsqueeze(-1) > positions).sum(dim=0)
    return TokenBill(int(sampled.sum()), int(lengths.sum()), tuple(live.tolist()))


def _overlap(rollouts: Rollouts, top_k: int) -> Tensor | None:
    """O_t over the first `top_k` candidates, 0 on padding; None where the student was not watched."""
    if rollouts.student_topk_ids is None:
        return None
    values = topk_overlap(rollouts.student_topk_ids[..., :top_k], rollouts.teacher_topk_ids[..., :top_k])
    return values * rollouts.response_mask
