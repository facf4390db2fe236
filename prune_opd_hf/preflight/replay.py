"""What other drift settings would have made of a stored record: its events, stops and lengths, without a new generation.

Pure functions of `Rollouts` over those of algorithm/drift.py that the monitor calls while it generates. A replay of greedy
rollouts therefore gives the very stops of a run with those settings, in every engine and for every `check_every`; of sampled
rollouts it gives those that the same random numbers would have made.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from prune_opd_hf.algorithm.drift import DriftConfig, Stops, agreement, drift_stops, find_drift_events, reliability
from prune_opd_hf.errors import InputError
from prune_opd_hf.generation.check_lengths import GrowingLengths, RowLengths
from prune_opd_hf.records.rollouts import PROMPT_FIELDS, Rollouts


def replay(rollouts: Rollouts, config: DriftConfig) -> Rollouts:
    """The record that a run with `config` would have left, had it sampled these tokens.

    Args:
        rollouts: generated without truncation, with at least `config.top_k` candidates recorded.
        config: the settings.

    Returns:
        The rows truncated at their exhausted tokens, with the events, reliability and overlap of `config`.

    Raises:
        InputError: too few candidates, the student's columns missing where the metric needs them, or a row that was
            stopped by drift before the replayed settings would have stopped it.
    """
    events = drift_events(rollouts, config)
    stops = find_stops(rollouts, config, events)
    width = int(stops.lengths.max())
    mask = kept_tokens(rollouts, stops)[:, :width]
    columns = {"drift_events": events, "reliability": reliability(events, rollouts.response_mask, config.weight_drop)}
    if rollouts.student_topk_ids is not None:
        columns["overlap"] = agreement("overlap", config.top_k, rollouts.positions)
    kept = {}
    for name, tensor in {**rollouts.tensors(), **columns}.items():
        if name not in PROMPT_FIELDS:
            padding = rollouts.pad_token_id if name == "response_ids" else 0
            values = tensor[:, :width]
            kept[name] = values.masked_fill(~(mask.unsqueeze(-1) if values.ndim == 3 else mask), padding)
    drifted = zip(stops.drifted.tolist(), rollouts.stop_reason, strict=True)
    reasons = tuple("drift" if drifts else reason for drifts, reason in drifted)
    return replace(rollouts, **kept, stop_reason=reasons, config=config)


def find_stops(rollouts: Rollouts, config: DriftConfig, events: Bool[Tensor, "batch time"]) -> Stops:
    """Where each row ends under other settings, whose B_t are `events`; errors are those of `replay`."""
    reasons = rollouts.stop_reason
    ended = torch.tensor([reason not in ("drift", "length") for reason in reasons], device=events.device)
    stops = drift_stops(events, rollouts.response_mask, config, ended=ended)
    for row, (reason, drifted) in enumerate(zip(reasons, stops.drifted.tolist(), strict=True)):
        if reason == "drift" and not drifted:
            raise InputError(
                f"row {row} of the record was stopped by drift after {int(rollouts.lengths[row])} tokens, and the replayed "
                "settings would have let it run on: generate the record with truncate=False"
            )
    return stops


def kept_tokens(rollouts: Rollouts, stops: Stops) -> Bool[Tensor, "batch time"]:
    """True on the response tokens that are left of each row."""
    columns = torch.arange(rollouts.response_mask.shape[1], device=rollouts.response_mask.device)
    return rollouts.response_mask & (columns < stops.lengths.unsqueeze(-1))


def drift_events(rollouts: Rollouts, config: DriftConfig) -> Bool[Tensor, "batch time"]:
    """B_t of a record under other settings, over all of its tokens."""
    return find_drift_events(config, rollouts.response_mask, rollouts.positions)


class TokenBill(NamedTuple):
    """What one generation costs in tokens.

    Attributes:
        sampled: tokens that the student samples, those past a stop inside a block included.
        kept: tokens that enter the loss.
        positions: decoding steps, as many as the longest row has tokens.
        read: tokens that the teacher reads. One that reads sequences anew reads their prompts as well, each time.
    """

    sampled: int
    kept: int
    positions: int
    read: int


def token_bills(
    stops: Stops, full_lengths: Int[Tensor, " batch"], *, batch_size: int, check_every: int
) -> list[TokenBill]:
    """What generations with row compaction would have sampled, one bill for each `batch_size` rows: a drifted row runs to the end
    of its block of `check_every` tokens, but not beyond its full length.
    """
    to_block_end = torch.minimum(-(-stops.lengths // check_every) * check_every, full_lengths)
    sampled = torch.where(stops.drifted, to_block_end, stops.lengths)
    generations = zip(sampled.split(batch_size), stops.lengths.split(batch_size), strict=True)
    return [
        TokenBill(int(tokens.sum()), int(kept.sum()), int(tokens.max()), int(tokens.sum()))
        for tokens, kept in generations
    ]


def bills_of_reading_anew(
    rollouts: Rollouts,
    config: DriftConfig,
    events: Bool[Tensor, "batch time"],
    stops: Stops,
    *,
    batch_size: int,
    check_every: int,
) -> list[TokenBill]:
    """The same with a teacher that reads each sequence anew, at the lengths at which a watch asks it (`GrowingLengths`), for rows
    that advance together: a drifted row runs on to the next of them."""
    counts, prompts = events.long().cumsum(dim=-1), rollouts.prompt_mask.sum(dim=-1)
    ends = torch.where(stops.drifted, stops.lengths, rollouts.lengths)
    sampled, bills = torch.zeros_like(ends), []
    for rows in torch.arange(len(rollouts)).split(batch_size):
        lengths = GrowingLengths(config, check_every, truncate=True)
        running, scored, read = rows, 0, 0
        while len(running):
            zeros = torch.zeros_like(running)
            so_far = counts[running, scored - 1] if scored else zeros
            scored += lengths.block_width(RowLengths(prompts[running], zeros + scored, zeros, so_far))
            sampled[running] = reached = rollouts.lengths[running].clamp(max=scored)
            totals, ended = prompts[running] + reached, ends[running] <= reached
            lengths.note_read(totals, ended)
            read += int(totals.sum())
            running = running[~ended]
        tokens, kept = sampled[rows], stops.lengths[rows]
        bills.append(TokenBill(int(tokens.sum()), int(kept.sum()), int(tokens.max()), read))
    return bills
