"""Divergences differentiated directly: on a few candidates, and over the full vocabulary.

The student's position is taken as given, so these are exact gradients of one position's divergence, not of the whole
sequence's; with on-policy rollouts that is what distillation trainers minimise.
Source: generalized Jensen-Shannon divergence of "On-Policy Distillation of Language Models" (arXiv 2306.13649); the meaning of
`beta` and `temperature` is that of TRL's DistillationTrainer.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_opd_hf.algorithm.losses.policy_gradient import token_mean
from prune_opd_hf.errors import ConfigError

DIRECTIONS = ("reverse", "forward")
TAILS = ("renormalize", "bucket")
SMALLEST_TAIL = 1e-6
"""Mass that the tail bucket holds at least: what float32 leaves of 1 - Σ p_j below it is rounding."""

SOFT_ZERO = -1e4
"""log 0 for candidates outside the support: e^-10000 is 0 in float32, and its gradient is 0 rather than NaN."""


def topk_kl_loss(
    log_probs: Float[Tensor, "batch time k"],
    teacher_log_probs: Float[Tensor, "batch time k"],
    weights: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    direction: str = "reverse",
    tail: str = "renormalize",
    support: Bool[Tensor, "batch time k"] | None = None,
    token_count: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """KL between student and teacher on the candidates, differentiated directly.

    reverse: Σ_t L_t Σ_j p~_j (log p~_j - log q~_j)        forward: Σ_t L_t Σ_j q~_j (log q~_j - log p~_j)

    "renormalize" makes both distributions ones over the support: p~ = p / Σ_S p, q~ = q / Σ_S q. It compares candidates with
    each other only, so no mass leaks out of the set, and none is drawn into it. "bucket" leaves the probabilities as they are and
    adds one further candidate that holds the rest, 1 - Σ_S p against 1 - Σ_S q: the sum is a true lower bound of the full KL,
    and the mass of the set is matched as well. Left without either, the reverse form is no divergence, and its gradient
    lets mass leak (`rewards` says how).

    The weighting is part of the divergence (the student's p~ for reverse, the teacher's q~ for forward), so there is
    none to choose as there is for rewards.

    Args:
        log_probs: log π_θ of the candidates under the current student, with gradient, over the full vocabulary.
        teacher_log_probs: log q of the same candidates, over the full vocabulary.
        weights: L_t, as `loss_weights` returns them.
        mask: True on response tokens.
        direction: "reverse" KL(p || q), or "forward" KL(q || p).
        tail: "renormalize" or "bucket".
        support: which candidates take part (all by default), see `choose_candidates`. One that either model gives no
            probability at all takes none. A position without any adds 0.
        token_count: response tokens of the whole step; those of `mask` by default.

    Raises:
        ConfigError: an unknown direction or tail.

    Example: p = (.6, .2) and q = (.3, .4); renormalised (.75, .25) against (3/7, 4/7), with their tails (.6, .2, .2) against
        (.3, .4, .3).
        >>> import torch
        >>> log_p, log_q = torch.tensor([[[0.6, 0.2]]]).log(), torch.tensor([[[0.3, 0.4]]]).log()
        >>> weights, mask = torch.ones(1, 1), torch.tensor([[True]])
        >>> [round(topk_kl_loss(log_p, log_q, weights, mask, tail=tail).item(), 4) for tail in TAILS]
        [0.213, 0.1962]
    """
    if direction not in DIRECTIONS:
        raise ConfigError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if tail not in TAILS:
        raise ConfigError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    log_p, log_q = log_probs.float(), teacher_log_probs.detach().float()
    impossible = torch.isneginf(log_p.detach()) | torch.isneginf(log_q)
    inside = mask.unsqueeze(-1) & ~impossible
    inside = inside if support is None else inside & support
    # What takes no part gets a finite value before anything is computed: the gradient of NaN is NaN even where it is not read.
    log_p, log_q = (values.masked_fill(~inside, SOFT_ZERO) for values in (log_p, log_q))
    if tail == "renormalize":
        log_p, log_q = log_p.log_softmax(dim=-1), log_q.log_softmax(dim=-1)
    else:
        log_p, log_q = (torch.cat([values, _log_rest(values)], dim=-1) for values in (log_p, log_q))
        inside = torch.cat([inside, inside.any(dim=-1, keepdim=True)], dim=-1)
    log_ratio = log_p - log_q if direction == "reverse" else log_q - log_p
    heavier = log_p if direction == "reverse" else log_q
    divergence = torch.where(inside, heavier.exp() * log_ratio, 0.0).sum(dim=-1)
    return token_mean(_constant(weights, mask) * divergence, mask, token_count)


def _log_rest(log_probs: Float[Tensor, "batch time k"]) -> Float[Tensor, "batch time 1"]:
    """log(1 - Σ_j e^{log p_j}), the mass at least SMALLEST_TAIL."""
    inside = log_probs.logsumexp(dim=-1, keepdim=True).clamp(max=math.log1p(-SMALLEST_TAIL))
    return torch.log(-torch.expm1(inside))


def _constant(weights: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
    return torch.where(mask, weights.detach().float(), 0.0)


def check_divergence(beta: float, temperature: float) -> None:
    """Refuse a beta or temperature that names no divergence.

    Raises:
        ConfigError: beta outside [0, 1], or a temperature that is not positive.
    """
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta must lie in 0 (forward KL) to 1 (reverse KL), got {beta}")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"the temperature of a divergence must be positive and finite, got {temperature}")


def generalized_jsd_loss(
    student_logits: Float[Tensor, "batch time vocab"],
    teacher_logits: Float[Tensor, "batch time vocab"],
    weights: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    token_count: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """Generalized Jensen-Shannon divergence over the full vocabulary: Σ_t L_t D_t, with gradient through p.

    beta = 0: D = KL(q || p), forward. beta = 1: D = KL(p || q), reverse. Between, with m = (1 - beta) p + beta q:
    D = beta KL(q || m) + (1 - beta) KL(p || m). p and q are the softmax of the logits divided by `temperature`; D is not scaled up
    again by its square. This is TRL's convention.

    Makes dense arrays of tokens x vocab, several of them: `divergence_from_hidden` gives the same value and gradient without.

    Args:
        student_logits: with gradient.
        teacher_logits: of the same vocabulary; treated as constant.
        weights: L_t, as `loss_weights` returns them.
        mask: True on response tokens.
        beta: in [0, 1].
        temperature: positive.
        token_count: response tokens of the whole step; those of `mask` by default.

    Raises:
        ConfigError: beta or temperature outside their range.

    Example: p = (.5, .5), q = (.25, .75): forward and reverse KL, and between them beta = .5 with m = (.375, .625).
        >>> import torch
        >>> p, q = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
        >>> weights, mask = torch.ones(1, 1), torch.tensor([[True]])
        >>> [round(generalized_jsd_loss(p, q, weights, mask, beta=beta).item(), 4) for beta in (0, 0.5, 1)]
        [0.1308, 0.0338, 0.1438]
    """
    check_divergence(beta, temperature)
    # Filled before anything is computed: the gradient of NaN is NaN even where it is not read.
    padding = ~mask.unsqueeze(-1)
    log_p = torch.log_softmax(student_logits.float().masked_fill(padding, 0.0) / temperature, dim=-1)
    log_q = torch.log_softmax(teacher_logits.detach().float().masked_fill(padding, 0.0) / temperature, dim=-1)
    if beta == 1:
        divergence = _kl(log_p, log_q)
    elif beta == 0:
        divergence = _kl(log_q, log_p)
    else:
        neither = torch.isneginf(log_p) & torch.isneginf(log_q)
        log_m = torch.logaddexp(
            log_p.masked_fill(neither, 0.0) + math.log1p(-beta), log_q.masked_fill(neither, 0.0) + math.log(beta)
        )
        divergence = beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)
    return token_mean(_constant(weights, mask) * divergence, mask, token_count)


def _kl(
    log_a: Float[Tensor, "batch time vocab"], log_b: Float[Tensor, "batch time vocab"]
) -> Float[Tensor, "batch time"]:
    """Σ_v a_v (log a_v - log b_v), where 0 log 0 = 0."""
    return (log_a.exp() * (log_a - log_b).masked_fill(torch.isneginf(log_a), 0.0)).sum(dim=-1)


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
    return generalized_jsd_loss(student_logits, teacher_logits, weights, mask, beta=1.0, token_count=token_count)
