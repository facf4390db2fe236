"""What the monitor keeps of each checked block of tokens, and how blocks become the columns of a record.

Pure: tensors in, tensors out. A block always has a line for every sequence of the batch; rows that were no longer followed
hold 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ScoredBlock:
    """Scores of one checked block; the fields are those of `Rollouts`.

    Attributes:
        token_ids: the tokens themselves.
        teacher_token_log_probs, teacher_topk_ids, teacher_topk_log_probs, drift_events: always there.
        token_log_probs, student_topk_ids, student_topk_log_probs, teacher_log_probs, overlap: None where nobody showed or
            scored the student's side.
    """

    token_ids: Int[Tensor, "batch time"]
    teacher_token_log_probs: Float[Tensor, "batch time"]
    teacher_topk_ids: Int[Tensor, "batch time k"]
    teacher_topk_log_probs: Float[Tensor, "batch time k"]
    drift_events: Bool[Tensor, "batch time"]
    token_log_probs: Float[Tensor, "batch time"] | None = None
    student_topk_ids: Int[Tensor, "batch time k"] | None = None
    student_topk_log_probs: Float[Tensor, "batch time k"] | None = None
    teacher_log_probs: Float[Tensor, "batch time k"] | None = None
    overlap: Float[Tensor, "batch time"] | None = None

    @classmethod
    def spread(cls, columns: dict[str, Tensor], rows: Int[Tensor, " followed"], batch: int) -> "ScoredBlock":
        """A block from what was scored for the followed rows alone.

        Example: row 1 of two was followed.
            >>> ids, numbers = torch.tensor([[7]]), torch.tensor([[-0.5]])
            >>> block = ScoredBlock.spread(
            ...     {"token_ids": ids, "teacher_token_log_probs": numbers, "teacher_topk_ids": ids.unsqueeze(-1),
            ...      "teacher_topk_log_probs": numbers.unsqueeze(-1), "drift_events": numbers < 0}, torch.tensor([1]), batch=2)
            >>> block.token_ids.tolist(), block.drift_events.tolist()
            ([[0], [7]], [[False], [True]])
        """
        return cls(**{name: _spread(values, rows, batch) for name, values in columns.items()})

    @classmethod
    def empty(cls, batch: int, time: int, k: int, device: torch.device, *, with_student: bool) -> "ScoredBlock":
        """A block in which nobody was followed any more, so that nothing was scored."""
        ids = torch.zeros(batch, time, dtype=torch.long, device=device)
        numbers = torch.zeros(batch, time, device=device)
        wide_ids, wide_numbers = ids.new_zeros(batch, time, k), numbers.new_zeros(batch, time, k)
        student = {
            "token_log_probs": numbers,
            "student_topk_ids": wide_ids,
            "student_topk_log_probs": wide_numbers,
            "teacher_log_probs": wide_numbers,
            "overlap": numbers,
        }
        return cls(
            token_ids=ids,
            teacher_token_log_probs=numbers,
            teacher_topk_ids=wide_ids,
            teacher_topk_log_probs=wide_numbers,
            drift_events=ids.bool(),
            **(student if with_student else {}),
        )


def join_blocks(blocks: Sequence[ScoredBlock], mask: Bool[Tensor, "batch time"]) -> dict[str, Tensor]:
    """The columns of a record: blocks one after the other, cut to the mask's width, 0 where it is False.

    Args:
        blocks: of one generation, in their order; all with the student's side or none.
        mask: True on response tokens.

    Returns:
        Tensors of shape (batch, time) or (batch, time, k) by name, without the tokens themselves.
    """
    names = [item.name for item in fields(ScoredBlock) if getattr(blocks[0], item.name) is not None]
    joined = {}
    for name in names:
        if name == "token_ids":
            continue
        values = torch.cat([getattr(block, name) for block in blocks], dim=1)[:, : mask.shape[1]]
        kept = mask.unsqueeze(-1) if values.ndim == 3 else mask
        joined[name] = torch.where(kept, values, torch.zeros_like(values))
    return joined


def _spread(values: Tensor, rows: Tensor, batch: int) -> Tensor:
    if len(rows) == batch:
        return values
    spread = values.new_zeros(batch, *values.shape[1:])
    spread[rows] = values
    return spread
