"""Log-probabilities of chosen ids: the forward pass keeps normalizers, the backward pass recomputes only where it must."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

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


class CandidateLogProbs(NamedTuple):
    """What one pass over the student's head yields.

    Attributes:
        log_probs: log p of the chosen ids over the full vocabulary, float32, with gradient; 0 off the mask.
        entropy: -Σ_v p_v log p_v at each position, without gradient; 0 off the mask.
    """

    log_probs: Float[Tensor, "*positions candidates"]
    entropy: Float[Tensor, "*positions"]


def candidate_log_probs(
    hidden: Float[Tensor, "*positions hidden"],
    head: HeadParameters,
    ids: Int[Tensor, "*positions candidates"],
    mask: Bool[Tensor, "*positions"],
    *,
    max_logit_elements: int = MAX_LOGIT_ELEMENTS,
) -> CandidateLogProbs:
    """Log-probabilities of chosen ids, over the full vocabulary, with gradient to hidden states, weight and bias.

    Under autocast the projection runs in the autocast dtype, as the model's own head does; the softmax is always float32 (or
    float64, for inputs in float64).

    Args:
        hidden: last hidden states, at positions that predict the tokens in question.
        head: see `BackboneAndHead.head_parameters`. A weight that needs no gradient gets none computed.
        ids: the ids wanted at each position; off the mask they are never read.
        mask: positions to project. Others cost nothing and may hold NaN.
        max_logit_elements: bound on the logits held at once.

    Raises:
        InputError: an id outside the vocabulary, or a head that does not fit the hidden states.
        ConfigError: `max_logit_elements` does not hold one position.

    Example:
        >>> import torch
        >>> hidden, weight = torch.randn(1, 3, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
        >>> ids, mask = torch.tensor([[[4, 9], [0, 49], [7, 7]]]), torch.tensor([[True, True, False]])
        >>> log_probs, entropy = candidate_log_probs(hidden, HeadParameters(weight), ids, mask)
        >>> dense = (hidden @ weight.T).log_softmax(-1)
        >>> torch.allclose(log_probs[0, :2], dense.gather(-1, ids)[0, :2], atol=1e-5), log_probs[0, 2].tolist()
        (True, [0.0, 0.0])
    """
    head = checked_head(hidden, head, "student", max_logit_elements)
    picked_ids = ids[mask]
    if picked_ids.numel() and not 0 <= int(picked_ids.min()) <= int(picked_ids.max()) < counted_rows(head):
        raise InputError(
            f"candidate ids must lie in 0 to {counted_rows(head) - 1}, the student's vocabulary; got {int(picked_ids.min())} to "
            f"{int(picked_ids.max())}"
        )
    log_probs, entropy = _CandidateLogProbs.apply(
        hidden[mask], head.weight, head.bias, picked_ids, Projection.of(head, hidden, max_logit_elements)
    )
    return CandidateLogProbs(scattered(log_probs, mask), scattered(entropy, mask))


class _CandidateLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, how: Projection
    ) -> tuple[Tensor, Tensor]:
        projector = Projector(hidden, weight, bias, how, len(hidden))
        scratch = projector.buffer(projector.dtype)
        log_probs = scratch.new_empty(ids.shape)
        normalizers, entropy = scratch.new_empty(len(ids)), scratch.new_empty(len(ids))
        for begin in range(0, len(ids), how.tokens_at_once):
            tokens = slice(begin, begin + how.tokens_at_once)
            logits = projector.project(tokens)
            log_probs[tokens] = logits.gather(-1, ids[tokens])
            peak = logits.amax(dim=-1, keepdim=True)
            below_peak = logits.sub_(peak)
            exponentials = torch.exp(below_peak, out=scratch[: len(logits)])
            mass = exponentials.sum(dim=-1)
            # -Σ p log p with log p = z - log Σ e^z
            entropy[tokens] = mass.log() - exponentials.mul_(below_peak.clamp_(min=LOG_ZERO)).sum(dim=-1) / mass
            normalizers[tokens] = peak.squeeze(-1) + mass.log()
        log_probs -= normalizers.unsqueeze(-1)
        ctx.save_for_backward(hidden, weight, bias, ids, log_probs, normalizers)
        ctx.how = how
        ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 5
        hidden, weight, bias, ids, log_probs, normalizers = ctx.saved_tensors
        how, transform = ctx.how, ctx.how.transform
        total = gradient.sum(dim=-1)  # G
        rounding = gradient.shape[-1] * torch.finfo(gradient.dtype).eps * gradient.abs().sum(dim=-1)
        through_softmax = ~(total.abs() <= rounding)  # at most so much is left of a sum of 0; NaN counts as more
        recomputed, relative = through_softmax.nonzero().squeeze(-1), (~through_softmax).nonzero().squeeze(-1)
        projector = Projector(hidden, weight, bias, how, len(recomputed))
        sums = HeadGradients(projector, hidden, weight, bias, ctx.needs_input_grad[:3])
        for tokens in relative.split(how.tokens_at_once):
            logits = log_probs[tokens] + normalizers[tokens].unsqueeze(-1)
            sums.add_rows_inplace(tokens, ids[tokens], gradient[tokens] * transform.slope(logits))
        for tokens in recomputed.split(how.tokens_at_once):
            logits = projector.project(tokens)
            kept = logits.clone() if transform.soft_cap is not None else None
            probs = logits.sub_(normalizers[tokens].unsqueeze(-1)).exp_()
            slope = probs.mul_(-total[tokens].unsqueeze(-1)).scatter_add_(-1, ids[tokens], gradient[tokens])
            sums.add_inplace(tokens, slope, kept)
        return (*sums.take(), None, None)
