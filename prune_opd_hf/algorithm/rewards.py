"""Token-level distillation rewards on top-k candidates, and their weighting by reliability.

Pure functions of log-probabilities over (batch, time, k). Source: REFERENCE formulas of Prune-OPD (arXiv 2605.07804),
section 3:

    p~_{t,j} = p_{t,j} / Σ_{i∈S_t} p_{t,i}
    r_{t,j}  = - L_t * p~_{t,j} * (log p_{t,j} - log q_{t,j})      for j in S_t

Departures
1. `centered=True` subtracts the weighted mean of the log-ratio, so that the rewards of one position sum to 0. The literal
   reward pushes every candidate down by the local KL while tokens outside the set get 0, and mass leaks out of the set.
   Over the full vocabulary the baseline changes nothing. This module's default is the literal reward; the trainer's is
   the centred one.
2. Weights other than the student's are normalised over the support in the same way: q~ = q / Σ q, or 1 / |support|.
3. A candidate that either model gives no probability at all (constrained decoding) is left out of the support: its
   log-ratio is infinite, and no gradient could reach it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prune_opd_hf.algorithm.drift import loss_weights
from prune_opd_hf.errors import ConfigError

WEIGHTINGS = ("student", "teacher", "uniform")
SUPPORTS = ("student", "teacher", "intersection", "union")


class Candidates(NamedTuple):
    """Candidate tokens at each position, with both models' log-probabilities as far as generation recorded them.

    Attributes:
        ids: candidate token ids; `k` columns, or `2k` for the union.
        teacher_log_probs: log q of them.
        support: which of the columns take part: duplicates in a union and tokens outside an intersection do not.
    """

    ids: Int[Tensor, "batch time candidates"]
    teacher_log_probs: Float[Tensor, "batch time candidates"]
    support: Bool[Tensor, "batch time candidates"]


def choose_candidates(
    student_ids: Int[Tensor, "batch time k"],
    teacher_log_probs: Float[Tensor, "batch time k"],
    teacher_ids: Int[Tensor, "batch time k"],
    teacher_topk_log_probs: Float[Tensor, "batch time k"],
    support: str = "student",
) -> Candidates:
    """The candidates of one of SUPPORTS, from what a rollout records.

    Args:
        student_ids, teacher_log_probs: S_t and log q on it.
        teacher_ids, teacher_topk_log_probs: T_t and log q on it.
        support: "student" S_t, "teacher" T_t, "intersection" S_t ∩ T_t, "union" S_t ∪ T_t.

    Raises:
        ConfigError: an unknown support.

    Example: S = {5, 2}, T = {2, 9}.
        >>> import torch
        >>> s, t = torch.tensor([[[5, 2]]]), torch.tensor([[[2, 9]]])
        >>> log_q = torch.zeros(1, 1, 2)
        >>> [choose_candidates(s, log_q, t, log_q, name).support.tolist()[0][0] for name in ("intersection", "union")]
        [[False, True], [True, True, False, True]]
    """
    in_student = (teacher_ids.unsqueeze(-1) == student_ids.unsqueeze(-2)).any(dim=-1)
    in_teacher = (student_ids.unsqueeze(-1) == teacher_ids.unsqueeze(-2)).any(dim=-1)
    everything = torch.ones_like(in_teacher)
    if support == "student":
        return Candidates(student_ids, teacher_log_probs, everything)
    if support == "teacher":
        return Candidates(teacher_ids, teacher_topk_log_probs, everything)
    if support == "intersection":
        return Candidates(student_ids, teacher_log_probs, in_teacher)
    if support == "union":
        return Candidates(
            torch.cat([student_ids, teacher_ids], dim=-1),
            torch.cat([teacher_log_probs, teacher_topk_log_probs], dim=-1),
            torch.cat([everything, ~in_student], dim=-1),
        )
    raise ConfigError(f"support must be one of {', '.join(SUPPORTS)}, got {support!r}")


def candidate_weights(
    student_log_probs: Float[Tensor, "batch time k"],
    teacher_log_probs: Float[Tensor, "batch time k"],
    support: Bool[Tensor, "batch time k"],
    weighting: str = "student",
) -> Float[Tensor, "batch time k"]:
    """The weight of each candidate, normalised over the support; 0 outside it and where the support is empty."""
    if weighting == "student":
        scores = student_log_probs.float()
    elif weighting == "teacher":
        scores = teacher_log_probs.float()
    elif weighting == "uniform":
        scores = torch.zeros_like(student_log_probs, dtype=torch.float32)
    else:
        raise ConfigError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    weights = torch.softmax(scores.masked_fill(~support, float("-inf")), dim=-1)
    return weights.nan_to_num(nan=0.0)


def topk_rewards(
    student_log_probs: Float[Tensor, "batch time k"],
    teacher_log_probs: Float[Tensor, "batch time k"],
    mask: Bool[Tensor, "batch time"],
    *,
    support: Bool[Tensor, "batch time k"] | None = None,
    weighting: str = "student",
    centered: bool = False,
) -> Float[Tensor, "batch time k"]:
    """Reward of each candidate before the reliability weight: -p~ (log p - log q), and centred on request.

    Args:
        student_log_probs: log p of the candidates, over the full vocabulary.
        teacher_log_probs: log q of the same candidates, over the full vocabulary.
        mask: True on response tokens; elsewhere the reward is 0.
        support: which of the k candidates take part (all by default). See `choose_candidates`.
        weighting: "student" weighs by p~, "teacher" by q~, "uniform" equally.
        centered: subtract the weighted mean log-ratio, so that the rewards of one position sum to 0.

    Returns:
        float32 rewards, without gradient.

    Raises:
        ConfigError: an unknown weighting.

    Example: p = (.6, .2), q = (.3, .4): -.75 log 2 and .25 log 2; centred, the mean .5 log 2 is taken off each log-ratio.
        >>> import torch
        >>> log_p, log_q = torch.tensor([[[0.6, 0.2]]]).log(), torch.tensor([[[0.3, 0.4]]]).log()
        >>> mask = torch.tensor([[True]])
        >>> topk_rewards(log_p, log_q, mask)
        tensor([[[-0.5199,  0.1733]]])
        >>> topk_rewards(log_p, log_q, mask, centered=True)
        tensor([[[-0.2599,  0.2599]]])
    """
    student_log_probs, teacher_log_probs = student_log_probs.detach().float(), teacher_log_probs.detach().float()
    if support is None:
        support = torch.ones_like(student_log_probs, dtype=torch.bool)
    impossible = torch.isneginf(student_log_probs) | torch.isneginf(teacher_log_probs)
    support = support & mask.unsqueeze(-1) & ~impossible
    weights = candidate_weights(student_log_probs, teacher_log_probs, support, weighting)
    log_ratio = (student_log_probs - teacher_log_probs).masked_fill(~support, 0.0)  # log p - log q
    if centered:
        log_ratio = log_ratio - (weights * log_ratio).sum(dim=-1, keepdim=True)
    return -weights * log_ratio


def weight_rewards(
    rewards: Float[Tensor, "batch time k"],
    reliability: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    weight_base: float,
) -> Float[Tensor, "batch time k"]:
    """Multiply every candidate's reward by its position's L_t = R_t + weight_base, and padding by 0.

    Example: reliable, exhausted (the base remains), padding.
        >>> import torch
        >>> mask = torch.tensor([[True, True, False]])
        >>> weight_rewards(torch.ones(1, 3, 1), torch.tensor([[1.0, 0.0, 0.0]]), mask, weight_base=0.5).squeeze(-1)
        tensor([[1.5000, 0.5000, 0.0000]])
    """
    return rewards * loss_weights(reliability, mask, weight_base).unsqueeze(-1)
