"""Divergences over the full vocabulary: value and gradients from one pass over both heads."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from prune_opd_hf.algorithm.losses.divergences import check_divergence
from prune_opd_hf.errors import InputError
from prune_opd_hf.models.chunked_head.projection import (
    LOG_ZERO,
    MAX_LOGIT_ELEMENTS,
    HeadGradients,
    Projection,
    Projector,
    checked_head,
    counted_rows,
    scattered,
)
from prune_opd_hf.models.lm_head import HeadParameters


class HiddenDivergence(NamedTuple):
    """A divergence over the full vocabulary, and what to log beside it.

    Attributes:
        loss: Σ_t w_t D_t / token_count, scalar, with gradient to the student's hidden states and head.
        divergence: D_t without weight and gradient; 0 off the mask.
        entropy: of the student, at the temperature of the loss, without gradient; 0 off the mask.
    """

    loss: Float[Tensor, ""]
    divergence: Float[Tensor, "*positions"]
    entropy: Float[Tensor, "*positions"]


def divergence_from_hidden(
    student_hidden: Float[Tensor, "*positions hidden"],
    student_head: HeadParameters,
    teacher_hidden: Float[Tensor, "*positions teacher_hidden"],
    teacher_head: HeadParameters,
    weights: Float[Tensor, "*positions"],
    mask: Bool[Tensor, "*positions"],
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    token_count: Tensor | float | None = None,
    max_logit_elements: int = MAX_LOGIT_ELEMENTS,
) -> HiddenDivergence:
    """`generalized_jsd_loss` from hidden states and heads: the same value and gradient, without dense logits.

    The gradients are formed in the forward pass (where gradient is enabled at all), so the backward pass only scales them,
    once.

    Args:
        student_hidden, student_head: with gradient.
        teacher_hidden, teacher_head: treated as constant; may be of another width, on the same device.
        weights: L_t, as `loss_weights` returns them; treated as constant.
        mask: response tokens; only they are projected.
        beta: 0 forward KL(q || p), 1 reverse KL(p || q), between them the generalized Jensen-Shannon divergence.
        temperature: divides the transformed logits of both models.
        token_count: response tokens of the whole step; those of `mask` by default.
        max_logit_elements: bound on the logits of one model held at once.

    Raises:
        ConfigError: beta outside [0, 1], a temperature that is not positive, or too small a `max_logit_elements`.
        InputError: the two heads count different vocabularies, or one does not fit its hidden states.

    Example: a teacher that is the student itself.
        >>> import torch
        >>> hidden, head = torch.randn(1, 2, 8, requires_grad=True), HeadParameters(torch.randn(50, 8))
        >>> mask = torch.tensor([[True, True]])
        >>> divergence_from_hidden(hidden, head, hidden, head, torch.ones(1, 2), mask).loss.item()
        0.0
    """
    check_divergence(beta, temperature)
    student_head = checked_head(student_hidden, student_head, "student", max_logit_elements)
    teacher_head = checked_head(teacher_hidden, teacher_head, "teacher", max_logit_elements)
    ids, teacher_ids = counted_rows(student_head), counted_rows(teacher_head)
    if ids != teacher_ids:
        raise InputError(
            f"the student's head counts {ids} ids and the teacher's {teacher_ids}: give both the vocab_size that they share"
        )
    count = mask.sum().clamp(min=1) if token_count is None else token_count
    loss, divergence, entropy = _Divergence.apply(
        student_hidden[mask],
        student_head.weight,
        student_head.bias,
        teacher_hidden.detach()[mask],
        teacher_head.weight.detach(),
        None if teacher_head.bias is None else teacher_head.bias.detach(),
        (weights[mask] / count).detach(),
        beta,
        temperature,
        Projection.of(student_head, student_hidden, max_logit_elements),
        Projection.of(teacher_head, teacher_hidden, max_logit_elements),
    )
    return HiddenDivergence(loss, scattered(divergence, mask), scattered(entropy, mask))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        token_weights: Tensor,
        beta: float,
        temperature: float,
        how: Projection,
        teacher_how: Projection,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens_at_once = min(how.tokens_at_once, teacher_how.tokens_at_once)
        student = Projector(hidden, weight, bias, how, len(hidden))
        teacher = Projector(teacher_hidden, teacher_weight, teacher_bias, teacher_how, len(hidden))
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        scratch = [student.buffer(dtype) for _ in range(1 if beta in (0, 1) else 2)]
        wanted = [need and how.form_gradients for need in ctx.needs_input_grad[:3]]
        sums = HeadGradients(student, hidden, weight, bias, wanted)
        divergence, entropy = scratch[0].new_empty(len(hidden)), scratch[0].new_empty(len(hidden))
        token_weights, lift = token_weights.to(dtype), _lift(token_weights, how.compute_dtype)
        for begin in range(0, len(hidden), tokens_at_once):
            tokens = slice(begin, begin + tokens_at_once)
            logits = student.project(tokens)
            room = [buffer[: len(logits)] for buffer in scratch]
            kept = logits.clone() if how.transform.soft_cap is not None and any(wanted) else None
            log_p = _log_softmax_inplace(logits.to(dtype), temperature, room[0])
            log_q = _log_softmax_inplace(teacher.project(tokens).to(dtype), temperature, room[0])
            divergence[tokens], entropy[tokens], slope = _divergence_inplace(log_p, log_q, beta, room)
            if any(wanted):
                slope.mul_((lift * token_weights[tokens] / temperature).unsqueeze(-1))
                sums.add_inplace(tokens, slope, kept)
        ctx.gradients, ctx.lift = sums.take(), lift
        ctx.mark_non_differentiable(divergence, entropy)
        ctx.set_materialize_grads(False)
        return (token_weights * divergence).sum(), divergence, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 11
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradient of a divergence from hidden states can be taken once: compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if values is None else values.mul_(gradient / ctx.lift) for values in gradients), *(None,) * 8)


def _lift(token_weights: Tensor, dtype: torch.dtype) -> float:
    """A power of two that brings weights to about 1, so that gradients formed in float16 neither vanish (a loss scaler comes too
    late for them) nor overflow; 1 for every other dtype."""
    if dtype != torch.float16 or not token_weights.numel():
        return 1.0
    largest = float(token_weights.abs().max())
    return 2.0 ** -math.frexp(largest)[1] if 0 < largest < math.inf else 1.0


def _log_softmax_inplace(logits: Tensor, temperature: float, room: Tensor) -> Tensor:
    if temperature != 1:
        logits.div_(temperature)
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    return logits.sub_(torch.exp(logits, out=room).sum(dim=-1, keepdim=True).log_())


def _divergence_inplace(log_p: Tensor, log_q: Tensor, beta: float, room: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """D, the student's entropy, and d D / d logits of the student at temperature 1. Overwrites all of its arguments.

    Forward KL: Σ q (log q - log p), slope p - q. Reverse KL: D = Σ p (log p - log q), slope p (log p - log q - D).
    Between, with m = (1-β) p + β q: D = β KL(q || m) + (1-β) KL(p || m), slope (1-β) p (log p - log m - KL(p || m)).
    """
    if beta == 0:
        q = torch.exp(log_q, out=room[0])
        terms = log_q.sub_(log_p).masked_fill_(q == 0, 0.0).mul_(q)
        divergence = terms.sum(dim=-1)
        p = torch.exp(log_p, out=terms)
        entropy = -log_p.clamp_(min=LOG_ZERO).mul_(p).sum(dim=-1)
        return divergence, entropy, p.sub_(q)
    if beta == 1:
        p = torch.exp(log_p, out=room[0])
        log_ratio = log_q.neg_().add_(log_p).masked_fill_(p == 0, 0.0)
        entropy = -log_p.clamp_(min=LOG_ZERO).mul_(p).sum(dim=-1)
        divergence = torch.mul(p, log_ratio, out=log_p).sum(dim=-1)
        return divergence, entropy, log_ratio.sub_(divergence.unsqueeze(-1)).mul_(p)
    log_p.clamp_(min=LOG_ZERO)
    q = torch.exp(log_q.clamp_(min=LOG_ZERO), out=room[1])
    mixture = torch.exp(log_p, out=room[0]).lerp_(q, beta)
    log_m = mixture.clamp_(min=torch.finfo(mixture.dtype).tiny).log_()
    from_teacher = log_q.sub_(log_m).mul_(q).sum(dim=-1)  # KL(q || m)
    p = torch.exp(log_p, out=room[1])
    entropy = -torch.mul(log_p, p, out=log_q).sum(dim=-1)
    log_ratio = log_p.sub_(log_m)
    from_student = torch.mul(log_ratio, p, out=log_q).sum(dim=-1)  # KL(p || m)
    divergence = beta * from_teacher + (1 - beta) * from_student
    return divergence, entropy, log_ratio.sub_(from_student.unsqueeze(-1)).mul_(p).mul_(1 - beta)
