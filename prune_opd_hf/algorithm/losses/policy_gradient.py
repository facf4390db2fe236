"""Policy-gradient losses: on every candidate, and on the sampled token alone.

A reward is a constant here, and the gradient goes through log π_θ. Both take the log-probabilities of the student that
generated, so that one batch may serve several updates: the ratio π_θ / p corrects for the student's having moved since, within
PPO's clip.
Source: REFERENCE formulas of Prune-OPD (arXiv 2605.07804), section 3; PPO's clip (arXiv 1707.06347), dual clip
(arXiv 1912.09729); the estimators k1 and k3 of J. Schulman, "Approximating KL Divergence" (2020).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_opd_hf.errors import ConfigError

ESTIMATORS = ("k1", "k3")
"""Of the reverse KL from one sampled token. See `sampled_token_loss`."""

LOG_RATIO_LIMIT = 20.0
"""log π_θ - log p is clamped to ± this before it is exponentiated (the reference's constant)."""


class PolicyGradientLoss(NamedTuple):
    """Value of a policy-gradient loss and what to log beside it.

    Attributes:
        loss: scalar, with gradient.
        clip_share: share of the candidates with a nonzero reward whose gradient a clip removed; scalar, no gradient.
    """

    loss: Float[Tensor, ""]
    clip_share: Float[Tensor, ""]


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
    surrogate, removed = _clipped_surrogate(log_probs, old_log_probs, rewards, keep, clip_low, clip_high, dual_clip)
    return PolicyGradientLoss(token_mean(surrogate.sum(dim=-1), mask, token_count), _share(removed, keep))


def sampled_token_loss(
    log_probs: Float[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    teacher_log_probs: Float[Tensor, "batch time"],
    weights: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    estimator: str = "k1",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    token_count: Tensor | float | None = None,
) -> PolicyGradientLoss:
    """Reverse KL estimated from the sampled token alone: the cheapest signal, and the noisiest.

    With y ~ p and the log-ratio d = log p(y) - log q(y), k1 = d and k3 = e^(-d) - 1 + d both have the mean KL(p || q). Neither
    may be differentiated as it stands, the sample taken for a constant: ∇k1 = ∇ log p(y) has the mean 0, so nothing is
    learnt, and ∇k3 = (1 - q/p) ∇ log p(y) has that of the gradient of the *forward* KL. The gradient of the expectation is

        E[k ∇ log p(y) + ∇k]  =  E[d ∇ log p(y)]

    for both: for k1 the second term has mean 0 and is left out, for k3 the sum is d ∇ log p(y) exactly, at every sample. So both
    estimators have one gradient here, that of the policy gradient with reward -L_t d, and differ in the value: k1 is
    the surrogate itself, k3 is never negative and steadier to look at. In later updates of one batch the reward of
    "k1" stays that of the student that generated, as in PPO; "k3" takes the current student's d (its expectation is
    differentiated anew, with the ratio as weight). PPO's clips hold for both.

    Args:
        log_probs: log π_θ of the sampled tokens under the current student, with gradient, over the full vocabulary.
        old_log_probs: log p of them under the student that generated.
        teacher_log_probs: log q of them. d is clamped to ±20, so a token that the teacher rules out gets a finite push.
        weights: L_t, as `loss_weights` returns them.
        mask: True on response tokens.
        estimator: "k1" or "k3".
        clip_low, clip_high, dual_clip, token_count: as in `topk_policy_gradient_loss`.

    Raises:
        ConfigError: an unknown estimator.

    Example: p = .5, q = .25: d = log 2 and k3 = .5 - 1 + log 2; one gradient.
        >>> import torch
        >>> log_p = torch.tensor([[0.5]]).log().requires_grad_()
        >>> log_q, ones, mask = torch.tensor([[0.25]]).log(), torch.ones(1, 1), torch.tensor([[True]])
        >>> for estimator in ESTIMATORS:
        ...     loss, _ = sampled_token_loss(log_p, log_p.detach(), log_q, ones, mask, estimator=estimator)
        ...     print(round(loss.item(), 4), torch.autograd.grad(loss, log_p)[0])
        0.6931 tensor([[0.6931]])
        0.1931 tensor([[0.6931]])
    """
    if estimator not in ESTIMATORS:
        raise ConfigError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    judged = old_log_probs if estimator == "k1" else log_probs
    log_ratio = judged.detach().float() - teacher_log_probs.detach().float()  # log p - log q
    log_ratio = torch.where(mask, log_ratio, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    weights = torch.where(mask, weights.detach().float(), 0.0)
    rewards = -weights * log_ratio
    keep = mask & (rewards != 0)
    surrogate, removed = _clipped_surrogate(log_probs, old_log_probs, rewards, keep, clip_low, clip_high, dual_clip)
    if estimator == "k3":
        moved = torch.where(mask, log_probs.detach().float() - old_log_probs.detach().float(), 0.0)
        ratio = moved.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()  # π_θ / p
        value = weights * ratio * (torch.expm1(-log_ratio) + log_ratio)
        surrogate = value + (surrogate - surrogate.detach())
    return PolicyGradientLoss(token_mean(surrogate, mask, token_count), _share(removed, keep))


def _clipped_surrogate(
    log_probs: Float[Tensor, "*places"],
    old_log_probs: Float[Tensor, "*places"],
    rewards: Float[Tensor, "*places"],
    keep: Bool[Tensor, "*places"],
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Float[Tensor, "*places"], Bool[Tensor, "*places"]]:
    """PPO's -min(ratio r, clip(ratio) r), for r < 0 at most -dual_clip r; and where a clip removed the gradient."""
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
    return surrogate, removed


def _share(removed: Bool[Tensor, "*places"], keep: Bool[Tensor, "*places"]) -> Float[Tensor, ""]:
    return removed.sum() / keep.sum().clamp(min=1)


def token_mean(
    values: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], token_count: Tensor | float | None = None
) -> Float[Tensor, ""]:
    """Sum over response tokens divided by `token_count`; by default by the number of response tokens in `mask`.

    Args:
        values: one value for each position; positions outside the mask are never read, so NaN there is harmless.
        mask: True on response tokens.
        token_count: the number of response tokens of the whole step, over micro-batches and processes.
    """
    total = torch.where(mask, values, torch.zeros_like(values)).sum()
    count = mask.sum().clamp(min=1) if token_count is None else token_count
    return total / count
