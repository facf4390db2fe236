"""One number for each token: disagreement by every drift metric, variance of the reward, the teacher's entropy, log q of the gold
token."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from token_gradients import response_log_probs
from torch import Tensor, nn
from torch.nn.functional import pad

from prune_opd_hf.algorithm.drift import METRICS, DriftConfig, agreement
from prune_opd_hf.algorithm.overlap import LARGEST_VOCABULARY
from prune_opd_hf.errors import InputError
from prune_opd_hf.records.rollouts import Rollouts


def settings_by_name(top_k: int) -> dict[str, DriftConfig]:
    """Each metric at its default; "nucleus", which has none, at 0.95."""
    return {
        name if metric.threshold else f"{name} at 0.95": DriftConfig(name, top_k, metric.threshold or 0.95)
        for name, metric in METRICS.items()
    }


def disagreement(rollouts: Rollouts, metric: str, top_k: int) -> Float[Tensor, "batch time"]:
    """1 minus the agreement, or the teacher's mass before the sampled token.

    A drift event is a score above 1 - threshold; one of "nucleus" and "tail" a score of at least the threshold, where a token
    outside the candidates has the score 1 by "nucleus", and by "tail" what the tokens that are surely likelier hold.

    Args:
        rollouts: with at least `top_k` candidates recorded.
        metric: of `METRICS`.
        top_k: how many of them count.

    Raises:
        InputError: too few candidates, or the student's columns are missing.

    Example: see examples/diagnostics/drift_metrics.py.
    """
    if metric in ("nucleus", "tail"):
        if rollouts.teacher_topk_ids.shape[-1] < top_k:
            raise InputError(
                f"the record holds {rollouts.teacher_topk_ids.shape[-1]} candidates, {top_k} were asked for: lower top_k"
            )
        ids, probs = rollouts.teacher_topk_ids[..., :top_k], rollouts.teacher_topk_log_probs[..., :top_k].exp()
        mass_before = pad(probs.cumsum(dim=-1)[..., :-1], (1, 0))
        is_token = ids == rollouts.response_ids.unsqueeze(-1)
        outside = torch.ones(())
        if metric == "tail":
            likelier = 1 - LARGEST_VOCABULARY * rollouts.teacher_token_log_probs.exp()
            outside = torch.maximum(probs.sum(dim=-1), likelier)
        return torch.where(is_token.any(dim=-1), (mass_before * is_token).sum(dim=-1), outside)
    return 1 - agreement(metric, top_k, rollouts.positions)


def reward_variance(rollouts: Rollouts) -> Float[Tensor, "batch time"]:
    """Variance of the top-k reward at each position: Σ_j p~_j (d_j - Σ_i p~_i d_i)² with d = log q - log p.

    Where it is 0 the centred reward is 0 for every candidate and the position teaches nothing.

    Raises:
        InputError: the record lacks the student's candidates.

    Example: two candidates of .5 each, one of which the teacher gives e times more than the other: 1/4.
        >>> from prune_opd_hf.algorithm.drift import DriftConfig
        >>> half = torch.tensor([[[0.5, 0.5]]]).log()
        >>> record = Rollouts(
        ...     prompt_ids=torch.tensor([[1]]), prompt_mask=torch.tensor([[True]]), response_ids=torch.tensor([[5]]),
        ...     response_mask=torch.tensor([[True]]), teacher_token_log_probs=torch.zeros(1, 1),
        ...     teacher_topk_ids=torch.tensor([[[5, 6]]]), teacher_topk_log_probs=half, stop_reason=("length",),
        ...     drift_events=torch.zeros(1, 1, dtype=torch.bool), reliability=torch.ones(1, 1), config=DriftConfig(top_k=2),
        ...     student_topk_ids=torch.tensor([[[5, 6]]]), student_topk_log_probs=half,
        ...     teacher_log_probs=half + torch.tensor([0.0, -1.0]), token_log_probs=torch.zeros(1, 1))
        >>> round(float(reward_variance(record)), 4)
        0.25
    """
    if rollouts.student_topk_log_probs is None or rollouts.teacher_log_probs is None:
        raise InputError("the spread of the reward needs the student's candidates, and this record has none")
    weights = rollouts.student_topk_log_probs.softmax(dim=-1)
    log_ratio = rollouts.teacher_log_probs - rollouts.student_topk_log_probs  # log q - log p
    mean = (weights * log_ratio).sum(dim=-1, keepdim=True)
    return (weights * (log_ratio - mean) ** 2).sum(dim=-1) * rollouts.response_mask


@torch.no_grad()
def teacher_entropy(teacher: nn.Module, rollouts: Rollouts, rows_at_once: int = 16) -> Float[Tensor, "batch time"]:
    """-Σ_v q_v log q_v at each position, in nats, over the whole vocabulary; 0 on padding.

    Args:
        teacher: the model.
        rollouts: the student's own prompts are read.
        rows_at_once: of one forward pass.
    """
    found = torch.zeros(rollouts.response_mask.shape)
    for first in range(0, len(rollouts), rows_at_once):
        rows = list(range(first, min(first + rows_at_once, len(rollouts))))
        part = rollouts.select(rows)
        log_q = response_log_probs(teacher, part)
        entropy = -(log_q.exp() * log_q).sum(dim=-1) * part.response_mask
        found[rows, : entropy.shape[1]] = entropy.cpu()
    return found


def gold_log_prob(teacher_topk: Rollouts, gold: Sequence[Sequence[int]]) -> Float[Tensor, "batch time"]:
    """log q of the gold continuation while a response still follows the gold one; NaN afterwards.

    At the first token that differs the gold token is the one not taken; from the next on the gold text says nothing. A gold
    token outside the teacher's recorded candidates counts as its last candidate's probability, an upper bound.

    Args:
        teacher_topk: the record.
        gold: one response for each row, as token ids.
    """
    found = torch.full(teacher_topk.response_mask.shape, float("nan"))
    for row, expected in enumerate(gold):
        length = int(teacher_topk.lengths[row])
        for position in range(min(length, len(expected))):
            ids = teacher_topk.teacher_topk_ids[row, position]
            at = (ids == expected[position]).nonzero()
            place = int(at[0]) if len(at) else -1
            found[row, position] = teacher_topk.teacher_topk_log_probs[row, position, place]
            if int(teacher_topk.response_ids[row, position]) != expected[position]:
                break
    return found
