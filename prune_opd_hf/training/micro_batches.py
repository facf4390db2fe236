"""What the updates of one step are made of: its rollouts in micro-batches, of so many rows, or of so many tokens.

After pruning some rows have 200 tokens and some 12,000. Micro-batches of equal numbers of rows are as wide as their longest row;
those of equal numbers of tokens cost what their tokens cost, the more so where rows are packed without padding.

It knows rollouts; it does not know models, losses or the optimizer.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from prune_opd_hf.records.rollouts import Rollouts


@dataclass(frozen=True)
class StepRollouts:
    """The rollouts of one step on one process, ready for its updates.

    Attributes:
        rollouts: all of them.
        micro_batches: as `micro_batch` makes them.
        token_count: response tokens of the step, over all processes.
        weight_sum: sum of the loss weights of all those tokens.
    """

    rollouts: Rollouts
    micro_batches: list[dict[str, Any]]
    token_count: Float[Tensor, ""]
    weight_sum: float


@dataclass
class OldLogProbs:
    """Where the first pass over a micro-batch leaves its log-probabilities for further updates. An object, since the Trainer copies
    dictionaries before each pass."""

    values: Tensor | None = None


def micro_batch(rollouts: Rollouts, old_log_probs: Tensor | None = None) -> dict[str, Any]:
    """The inputs of `compute_loss`: "rollouts", their "input_ids" (the Trainer counts them), and their "old" log-probabilities."""
    return {"input_ids": rollouts.sequences, "rollouts": rollouts, "old": OldLogProbs(old_log_probs)}


def split_by_length(rollouts: Rollouts, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Micro-batches of so many rows, rows of like length together, longest first."""
    order = rollouts.lengths.argsort(descending=True, stable=True)
    return [micro_batch(rollouts.select(rows)) for rows in order.split(list(sizes))]


def split_by_tokens(rollouts: Rollouts, limit: int, *, packed: bool, accelerator: Accelerator) -> list[dict[str, Any]]:
    """Micro-batches of at most `limit` tokens, prompts included; see `rows_by_tokens`.

    Args:
        packed: padding does not count.
        accelerator: of processes that all make as many forward passes as the one that needs most of them.
    """
    lengths = (rollouts.prompt_mask.sum(dim=-1) + rollouts.lengths).tolist()
    needed = torch.tensor([len(rows_by_tokens(lengths, limit, packed=packed))], device=rollouts.lengths.device)
    parts = rows_by_tokens(lengths, limit, packed=packed, least=int(accelerator.gather(needed).max()))
    return [micro_batch(rollouts.select(torch.tensor(rows, device=rollouts.lengths.device))) for rows in parts]


def rows_by_tokens(lengths: Sequence[int], limit: int, *, packed: bool, least: int = 1) -> list[list[int]]:
    """Which rows go together, so that no part has more than `limit` tokens unless it is a single row: as few parts as that takes,
    but at least `least`, or as many as there are rows.

    Packed, parts are of like size: each row goes, longest first, to the part that is shortest so far. Else rows of like length go
    together, and a part has as many tokens as its rows times the longest one.

    Example:
        >>> rows_by_tokens([50, 10, 20, 30], 60, packed=True)
        [[0, 1], [3, 2]]
        >>> rows_by_tokens([50, 10, 20, 30], 60, packed=False)
        [[0], [3, 2], [1]]
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    least = min(least, len(lengths))
    if packed:
        count = max(least, -(-sum(lengths) // limit))
        while True:
            parts = _balanced(order, lengths, min(count, len(order)))
            if all(len(rows) == 1 or sum(lengths[row] for row in rows) <= limit for rows in parts):
                return parts
            count += 1
    parts = []
    for row in order:
        if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= limit:
            parts[-1].append(row)
        else:
            parts.append([row])
    while len(parts) < least:
        widest = max((place for place, rows in enumerate(parts) if len(rows) > 1), key=lambda place: len(parts[place]))
        rows = parts[widest]
        parts[widest : widest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return parts


def _balanced(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    parts: list[list[int]] = [[] for _ in range(count)]
    shortest = [(0, place) for place in range(count)]
    for row in order:
        tokens, place = heapq.heappop(shortest)
        parts[place].append(row)
        heapq.heappush(shortest, (tokens + lengths[row], place))
    return parts


def as_counted(micro_batches: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The micro-batches for a Trainer that counts `count` of them in each step: all in the last one, behind empty ones."""
    nothing = {"input_ids": micro_batches[0]["input_ids"][:0], "parts": []}
    ids = torch.cat([part["input_ids"].flatten() for part in micro_batches])
    return [nothing] * (count - 1) + [{"input_ids": ids, "parts": micro_batches}]
