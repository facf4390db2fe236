"""What a drift watch keeps of each scored block of tokens, and how blocks become a record of rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from prune_opd_hf.algorithm.drift import DriftConfig, reliability
from prune_opd_hf.generation.prompts import pad_left
from prune_opd_hf.records.rollouts import Rollouts


@dataclass(frozen=True)
class ScoredBlock:
    """Scores of one block.

    Attributes:
        rows: which rows of the generation were scored.
        first: response tokens that each of them had before the block.
        columns: tensors of shape (rows, time) or (rows, time, k) by the names of `Rollouts`, and "token_ids".
    """

    rows: Int[Tensor, " scored"]
    first: Int[Tensor, " scored"]
    columns: dict[str, Tensor]


def join_blocks(blocks: Sequence[ScoredBlock], mask: Bool[Tensor, "batch time"]) -> dict[str, Tensor]:
    """The columns of a record: every block's values at the response positions they belong to, 0 where the mask is False.

    Returns:
        Tensors of shape (batch, time) or (batch, time, k) by name.
    """
    batch, time = mask.shape
    joined = {name: values.new_zeros(batch, time, *values.shape[2:]) for name, values in blocks[0].columns.items()}
    for block in blocks:
        width = next(iter(block.columns.values())).shape[1]
        positions = block.first.unsqueeze(-1) + torch.arange(width, device=mask.device)
        line, column = (positions < time).nonzero(as_tuple=True)
        index = block.rows[line], positions[line, column]
        for name, values in block.columns.items():
            joined[name][index] = values[line, column]
    return {
        name: values.masked_fill_(~(mask.unsqueeze(-1) if values.ndim == 3 else mask), 0)
        for name, values in joined.items()
    }


def observed_tokens(blocks: Sequence[ScoredBlock], rows: int, time: int) -> Int[Tensor, "rows time"]:
    """The tokens of the blocks at their response positions, 0 where there are none."""
    tokens = [ScoredBlock(block.rows, block.first, {"token_ids": block.columns["token_ids"]}) for block in blocks]
    everywhere = torch.ones(rows, time, dtype=torch.bool, device=blocks[0].rows.device)
    return join_blocks(tokens, everywhere)["token_ids"]


def make_rollouts(
    blocks: Sequence[ScoredBlock],
    prompts: Sequence[tuple[Tensor, Tensor]],
    teacher_prompts: Sequence[tuple[Tensor, Tensor]],
    response_ids: Int[Tensor, "batch columns"],
    lengths: Int[Tensor, " batch"],
    stop_reason: tuple[str, ...],
    teachers: tuple[str, ...],
    config: DriftConfig,
    pad_token_id: int,
    excluded_ids: tuple[int, ...],
    sampled_by: tuple[str, str],
) -> Rollouts:
    """The record of a generation."""
    kept = int(lengths.max())
    mask = torch.arange(kept, device=lengths.device) < lengths.unsqueeze(-1)
    columns = join_blocks(blocks, mask)
    columns.pop("token_ids")
    prompt_ids, prompt_mask = pad_left(prompts, pad_token_id)
    if teacher_prompts:
        read = pad_left(teacher_prompts, pad_token_id)
        columns |= dict(zip(("teacher_prompt_ids", "teacher_prompt_mask"), read, strict=True))
    return Rollouts(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=torch.where(mask, response_ids[:, :kept], pad_token_id),
        response_mask=mask,
        reliability=reliability(columns["drift_events"], mask, config.weight_drop),
        stop_reason=stop_reason,
        teachers=teachers,
        config=config,
        pad_token_id=pad_token_id,
        excluded_ids=excluded_ids,
        engine=sampled_by[0],
        weights=sampled_by[1],
        **columns,
    )
