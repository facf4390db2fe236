"""Losses of on-policy distillation, all weighted by reliability.

Pure functions of log-probabilities and logits; this module knows neither models nor trainers. Each returns the sum over
response tokens divided by `token_count`, so that micro-batches and processes add up to one global token mean.
Source: REFERENCE formulas of Prune-OPD (arXiv 2605.07804), section 3; PPO's clip (arXiv 1707.06347) and dual clip
(arXiv 1912.09729).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""log π_θ - log p is clamped to ± this before it is exponentiated (the reference's constant)."""


class PolicyGradientLoss(NamedTuple):
    """Value of `topk_policy_gradient_loss` and what to log beside it.

    Attributes:
        loss: scalar, with gradient.
        clip_share: share of the candidates with a nonzero reward whose gradient a clip removed; scalar, no gradient.
    """

    loss: Float[Tensor, ""]
    clip_share: Float[Tensor, ""]


def token_mean(
    values: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], token_count: Tensor | float | None = None
) -> Float[Tensor, ""]:
    """Sum over response tokens divided by `token_count`; by default by the number of response tokens in `mask`.

    Args:
        values: one value for each position; positions outside the mask are never read, so NaN there is harmless.
        mask: True on response tokens.
        token_count: the number of response tokens of the whole step, over micro-batches and processes.

    Example: a step of 4 tokens, of which this micro-batch holds 2.
        >>> import torch
        >>> token_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]), token_count=4)
        tensor(1.)
    """
    total = torch.where(mask, values, torch.zeros_like(values)).sum()
    count = mask.sum().clamp(min=1) if token_count is None else token_count
    return total / count


def topk_policy_gradient_loss(
    log_probs: Float[Tensor, "batch time k"],
    old_log_probs: Float[Tensor, "batch time k"],
    rewards: Float[Tensor, "batch time k"],
    mask: Bool[Tensor, "batch time"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    token_count: Tensor | float | None = None,
) -> PolicyGradientLoss:
    """Policy gradient on every candidate: PPO's clipped surrogate for each (t, j), summed over j, averaged over tokens.

    ratio_{t,j} = exp(clamp(log π_θ(j | x, y_<t) - log p_{t,j}, ±20)). With one update for each batch the ratio is 1 and
    the gradient is -Σ_j r_{t,j} ∇ log π_θ(j); for the literal reward that is Σ_j L_t p~_{t,j} log(p_{t,j}/q_{t,j}) ∇ log p_{t,j}.

    Args:
        log_probs: log π_θ of the candidates under the current student, with gradient, over the full vocabulary.
        old_log_probs: log p of the same candidates under the student that generated.
        rewards: weighted rewards, as `weight_rewards` returns them.
        mask: True on response tokens.
        clip_low, clip_high: PPO's clip: the ratio counts within [1 - clip_low, 1 + clip_high].
        dual_clip: for negative rewards the surrogate is at most this multiple of -r.
        token_count: response tokens of the whole step; those of `mask` by default.

    Example: ratio 1, so the loss is minus the summed reward and its gradient minus each reward, over 1 token.
        >>> import torch
        >>> log_p = torch.tensor([[[0.6, 0.2]]]).log().requires_grad_()
        >>> rewards = torch.tensor([[[-0.5, 0.25]]])
        >>> loss, _ = topk_policy_gradient_loss(log_p, log_p.detach(), rewards, torch.tensor([[True]]))
        >>> loss.backward()
        >>> loss.item(), log_p.grad
        (0.25, tensor([[[ 0.5000, -0.2500]]]))
    """
    keep = mask.unsqueeze(-1) & (rewards != 0)
    log_ratio = torch.where(keep, log_probs.float() - old_log_probs.float(), 0.0).clamp(
        -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT
    )
    ratio = log_ratio.exp()  # π_θ / p
    plain = -rewards * ratio
    clipped = -rewards * ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.maximum(plain, clipped)
    surrogate = torch.where(rewards < 0, torch.minimum(surrogate, -rewards * dual_clip), surrogate)
    with torch.no_grad():
        removed = keep & ((clipped > plain) | ((rewards < 0) & (ratio > dual_clip)))
        clip_share = removed.sum() / keep.sum().clamp(min=1)
    return PolicyGradientLoss(token_mean(surrogate.sum(dim=-1), mask, token_count), clip_share)


def reverse_kl_loss(
    student_logits: Float[Tensor, "batch time vocab"],
    teacher_logits: Float[Tensor, "batch time vocab"],
    weights: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    token_count: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """Full-vocabulary reverse KL: Σ_t L_t Σ_v p_v (log p_v - log q_v), with gradient through p.

    Its gradient is Σ_t L_t Σ_v p_v log(p_v / q_v) ∇ log p_v: that of the literal and of the centred top-k loss with the
    whole vocabulary as candidates.

    Args:
        student_logits: with gradient.
        teacher_logits: of the same vocabulary; treated as constant.
        weights: L_t, as `loss_weights` returns them.
        mask: True on response tokens.
        token_count: response tokens of the whole step; those of `mask` by default.

    Example: p = (.5, .5), q = (.25, .75): .5 log 2 + .5 log(2/3).
        >>> import torch
        >>> p, q = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.25, 0.75]]])
        >>> round(reverse_kl_loss(p.log(), q.log(), torch.ones(1, 1), torch.tensor([[True]])).item(), 4)
        0.1438
    """
    padding = ~mask.unsqueeze(
        -1
    )  # filled before anything is computed: the gradient of NaN is NaN even where it is not read
    log_p = torch.log_softmax(student_logits.float().masked_fill(padding, 0.0), dim=-1)
    log_q = torch.log_softmax(teacher_logits.detach().float().masked_fill(padding, 0.0), dim=-1)
    log_ratio = (log_p - log_q).masked_fill(torch.isneginf(log_p), 0.0)  # 0 log 0 = 0
    divergence = (log_p.exp() * log_ratio).sum(dim=-1)
    return token_mean(weights * divergence, mask, token_count)
