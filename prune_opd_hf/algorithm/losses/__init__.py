"""Losses of on-policy distillation, all weighted by reliability.

Pure functions of log-probabilities and logits; they know neither models nor trainers. Each returns the sum over response tokens
divided by `token_count`, so that micro-batches and processes add up to one global token mean.

    topk_policy_gradient_loss   candidates, rewards of `prune_opd_hf.algorithm.rewards` (literal or centred), clips
    sampled_token_loss          the sampled token alone; estimators k1 and k3
    topk_kl_loss                candidates, reverse or forward KL, renormalised or with a tail bucket
    generalized_jsd_loss        full vocabulary, TRL's beta and temperature; `reverse_kl_loss` is its beta = 1

What they need of the student without dense logits: `prune_opd_hf.models.chunked_head`.
"""

from prune_opd_hf.algorithm.losses.divergences import (
    DIRECTIONS,
    TAILS,
    generalized_jsd_loss,
    reverse_kl_loss,
    topk_kl_loss,
)
from prune_opd_hf.algorithm.losses.policy_gradient import (
    ESTIMATORS,
    LOG_RATIO_LIMIT,
    PolicyGradientLoss,
    sampled_token_loss,
    token_mean,
    topk_policy_gradient_loss,
)

__all__ = [
    "DIRECTIONS",
    "ESTIMATORS",
    "LOG_RATIO_LIMIT",
    "TAILS",
    "PolicyGradientLoss",
    "generalized_jsd_loss",
    "reverse_kl_loss",
    "sampled_token_loss",
    "token_mean",
    "topk_kl_loss",
    "topk_policy_gradient_loss",
]
