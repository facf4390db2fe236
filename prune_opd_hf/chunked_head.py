"""From hidden states to log-probabilities and divergences, without ever holding tokens x vocab.

Dense logits of 4,096 tokens over 151,936 ids are 2.5 GB in float32, and a loss with its backward pass keeps several such
arrays. Here only a few rows of logits exist at a time. Two operations:

`candidate_log_probs`: log p of chosen ids. Its backward pass goes one of two ways, token by token. With g_j the gradient of
    log p_j and G = Σ_j g_j,
        d/dz_v = Σ_j g_j [j = v] - G p_v
    so where G is 0 the softmax drops out, and only the chosen rows of the head are touched: no logits are made again. That
    is every loss that looks at candidates relative to each other: the centred policy gradient before its clips bite, and KL
    renormalised over the candidates. Where G is not 0, the logits of those tokens are recomputed.

`divergence_from_hidden`: Σ_t w_t D(p_t, q_t) over the full vocabulary. The weights are known in advance, so the gradients are
    formed while the logits are at hand in the forward pass, and nothing is recomputed.

This module knows tensors only: neither models nor trainers. Sharded weights: see `gathered`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.lm_head import HeadParameters, LogitFinish

MAX_LOGIT_ELEMENTS = 2**25
"""Logits of one model held at once: 128 MiB in float32. Two to four buffers of this size are alive together."""

LOG_ZERO = -1e30
"""Stands in for log 0 where it is multiplied by a probability of 0, since 0 * inf is not a number."""

VOCAB_SLICE = 2**14
"""Rows of the weight's gradient that are added up at once where the head computes in less than float32."""


class CandidateLogProbs(NamedTuple):
    """What one pass over the student's head yields.

    Attributes:
        log_probs: log p of the chosen ids over the full vocabulary, float32, with gradient; 0 off the mask.
        entropy: -Σ_v p_v log p_v at each position, without gradient; 0 off the mask.
    """

    log_probs: Float[Tensor, "*positions candidates"]
    entropy: Float[Tensor, "*positions"]


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
        head: see `SplitLM.head_parameters`. A weight that needs no gradient gets none computed.
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
    head = _checked(hidden, head, "student", max_logit_elements)
    picked_ids = ids[mask]
    if picked_ids.numel() and not 0 <= int(picked_ids.min()) <= int(picked_ids.max()) < _rows(head):
        raise InputError(
            f"candidate ids must lie in 0 to {_rows(head) - 1}, the student's vocabulary; got {int(picked_ids.min())} to "
            f"{int(picked_ids.max())}"
        )
    log_probs, entropy = _CandidateLogProbs.apply(
        hidden[mask], head.weight, head.bias, picked_ids, _Projection.of(head, hidden, max_logit_elements)
    )
    return CandidateLogProbs(_spread(log_probs, mask), _spread(entropy, mask))


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
        temperature: divides the finished logits of both models.
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
    student_head = _checked(student_hidden, student_head, "student", max_logit_elements)
    teacher_head = _checked(teacher_hidden, teacher_head, "teacher", max_logit_elements)
    if _rows(student_head) != _rows(teacher_head):
        raise InputError(
            f"the student's head counts {_rows(student_head)} ids and the teacher's {_rows(teacher_head)}: give both the "
            "vocab_size that they share"
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
        _Projection.of(student_head, student_hidden, max_logit_elements),
        _Projection.of(teacher_head, teacher_hidden, max_logit_elements),
    )
    return HiddenDivergence(loss, _spread(divergence, mask), _spread(entropy, mask))


def check_divergence(beta: float, temperature: float) -> None:
    """Refuse a beta or temperature that names no divergence.

    Raises:
        ConfigError: beta outside [0, 1], or a temperature that is not positive.
    """
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta must lie in 0 (forward KL) to 1 (reverse KL), got {beta}")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"the temperature of a divergence must be positive and finite, got {temperature}")


def gathered(weight: Tensor) -> Tensor:
    """A sharded parameter (DTensor) as a whole tensor, whose gradient flows back averaged over the processes, as FSDP2's does.

    Parameters inside a module that FSDP2 has unsharded (during its forward pass, and until its backward pass where
    `reshard_after_forward` is off) are whole already; those and ordinary tensors come back as they are. All processes must
    call this together, also one without response tokens.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> gathered(weight) is weight
        True
    """
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial, Replicate

    mesh = weight.device_mesh
    shares = [Partial()] * mesh.ndim
    whole = weight.redistribute(placements=[Replicate()] * mesh.ndim).to_local(grad_placements=shares)
    return _ScaleGradient.apply(whole, 1 / mesh.size())


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def _rows(head: HeadParameters) -> int:
    return len(head.weight) if head.vocab_size is None else head.vocab_size


def _checked(hidden: Tensor, head: HeadParameters, role: str, max_logit_elements: int) -> HeadParameters:
    """`head` with whole tensors, found to fit the hidden states."""
    head = head._replace(weight=gathered(head.weight), bias=None if head.bias is None else gathered(head.bias))
    if head.weight.shape[1] != hidden.shape[-1]:
        raise InputError(
            f"the {role}'s hidden states have {hidden.shape[-1]} features and its head takes {head.weight.shape[1]}: do they "
            "belong to one model?"
        )
    if not 1 <= _rows(head) <= len(head.weight):
        raise InputError(f"vocab_size must lie in 1 to {len(head.weight)}, the {role}'s rows; got {head.vocab_size}")
    if max_logit_elements < _rows(head):
        raise ConfigError(
            f"max_logit_elements must hold at least one position of the {role}'s {_rows(head)} logits, got "
            f"{max_logit_elements}"
        )
    return head


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the positions in `mask` at their places, 0 elsewhere."""
    return values.new_zeros(*mask.shape, *values.shape[1:]).masked_scatter(
        mask.reshape(*mask.shape, *[1] * (values.dim() - 1)), values
    )


class _Projection(NamedTuple):
    """How one head is projected: everything that is no tensor."""

    finish: LogitFinish
    rows: int
    compute_dtype: torch.dtype
    tokens_at_once: int
    form_gradients: bool

    @classmethod
    def of(cls, head: HeadParameters, hidden: Tensor, max_logit_elements: int) -> "_Projection":
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else head.weight.dtype
        return cls(head.finish, _rows(head), dtype, max(1, max_logit_elements // _rows(head)), torch.is_grad_enabled())


class _Projector:
    """Makes the logits of a few tokens at a time, always in the same buffer, in float32 (float64 for a head in float64)."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, how: _Projection, tokens: int) -> None:
        self.how, self.room = how, min(tokens, how.tokens_at_once)
        self.hidden = hidden.detach().to(how.compute_dtype)
        self.weight = weight.detach()[: how.rows].to(how.compute_dtype)
        self.bias = None if bias is None else bias.detach()[: how.rows].to(how.compute_dtype)
        self.dtype = torch.promote_types(how.compute_dtype, torch.float32)
        self.raw = self.buffer(how.compute_dtype)
        self.logits = self.raw if how.compute_dtype == self.dtype else self.buffer(self.dtype)

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """Room for the logits of one chunk."""
        return torch.empty(self.room, self.how.rows, dtype=dtype, device=self.hidden.device)

    def project(self, tokens: slice | Tensor) -> Tensor:
        """Finished logits of some tokens; overwritten by the next call."""
        hidden = self.hidden[tokens]
        raw = self.raw[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=raw)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=raw)
        finished = raw if self.how.finish.is_plain else self.how.finish(raw)
        return finished if finished.dtype == self.dtype else self.logits[: len(hidden)].copy_(finished)


class _HeadGradients:
    """Sums the gradients of hidden states, weight and bias over chunks, each only where it is wanted."""

    def __init__(
        self, projector: _Projector, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]
    ) -> None:
        self.projector = projector
        self.targets = (hidden, weight, bias)
        self.hidden, self.weight, self.bias = (
            torch.zeros(values.shape, dtype=projector.dtype, device=values.device)
            if need and values is not None
            else None
            for values, need in zip(self.targets, wanted, strict=True)
        )

    def add_inplace(self, tokens: slice | Tensor, gradient: Tensor, logits: Tensor | None) -> None:
        """Add what d loss / d logits of some tokens means for all three. Overwrites `gradient`.

        Args:
            tokens: which ones.
            gradient: one row for each of them.
            logits: the finished logits, where the slope of the finish depends on them.
        """
        how = self.projector.how
        if not how.finish.is_plain:
            gradient.mul_(how.finish.slope(gradient if logits is None else logits))
        if self.bias is not None:
            self.bias[: how.rows] += gradient.sum(dim=0)
        gradient = gradient.to(how.compute_dtype)
        if self.hidden is not None:
            self.hidden[tokens] = (gradient @ self.projector.weight).to(self.hidden.dtype)
        if self.weight is None:
            return
        hidden = self.projector.hidden[tokens]
        if self.weight.dtype == how.compute_dtype:
            self.weight[: how.rows].addmm_(gradient.t(), hidden)
            return
        for first in range(0, how.rows, VOCAB_SLICE):  # chunks are summed in float32, whatever they are computed in
            part = gradient[:, first : first + VOCAB_SLICE]
            self.weight[first : first + part.shape[1]] += part.t() @ hidden

    def add_rows_inplace(self, tokens: Tensor, ids: Tensor, gradient: Tensor) -> None:
        """The same for a gradient that is 0 except at a few ids of each token.

        Args:
            tokens: which ones.
            ids, gradient: [tokens, candidates]; the gradient with respect to the raw projection.
        """
        if self.hidden is not None:
            rows = self.projector.weight[ids]
            by_token = torch.bmm(gradient.to(rows.dtype).unsqueeze(1), rows).squeeze(1)
            self.hidden[tokens] = by_token.to(self.hidden.dtype)
        if self.weight is not None:
            products = gradient.unsqueeze(-1) * self.projector.hidden[tokens].to(gradient.dtype).unsqueeze(1)
            self.weight.index_add_(0, ids.flatten(), products.flatten(0, 1))
        if self.bias is not None:
            self.bias.index_add_(0, ids.flatten(), gradient.flatten())

    def take(self) -> list[Tensor | None]:
        """The three gradients, each in the dtype of its tensor."""
        sums = (self.hidden, self.weight, self.bias)
        return [
            None if total is None or of is None else total.to(of.dtype)
            for total, of in zip(sums, self.targets, strict=True)
        ]


class _CandidateLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, how: _Projection
    ) -> tuple[Tensor, Tensor]:
        projector = _Projector(hidden, weight, bias, how, len(hidden))
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
        how, finish = ctx.how, ctx.how.finish
        total = gradient.sum(dim=-1)  # G
        rounding = gradient.shape[-1] * torch.finfo(gradient.dtype).eps * gradient.abs().sum(dim=-1)
        through_softmax = ~(total.abs() <= rounding)  # at most so much is left of a sum of 0; NaN counts as more
        recomputed, relative = through_softmax.nonzero().squeeze(-1), (~through_softmax).nonzero().squeeze(-1)
        projector = _Projector(hidden, weight, bias, how, len(recomputed))
        sums = _HeadGradients(projector, hidden, weight, bias, ctx.needs_input_grad[:3])
        for tokens in relative.split(how.tokens_at_once):
            logits = log_probs[tokens] + normalizers[tokens].unsqueeze(-1)
            sums.add_rows_inplace(tokens, ids[tokens], gradient[tokens] * finish.slope(logits))
        for tokens in recomputed.split(how.tokens_at_once):
            logits = projector.project(tokens)
            kept = logits.clone() if finish.soft_cap is not None else None
            probs = logits.sub_(normalizers[tokens].unsqueeze(-1)).exp_()
            slope = probs.mul_(-total[tokens].unsqueeze(-1)).scatter_add_(-1, ids[tokens], gradient[tokens])
            sums.add_inplace(tokens, slope, kept)
        return (*sums.take(), None, None)


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
        how: _Projection,
        teacher_how: _Projection,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens_at_once = min(how.tokens_at_once, teacher_how.tokens_at_once)
        student = _Projector(hidden, weight, bias, how, len(hidden))
        teacher = _Projector(teacher_hidden, teacher_weight, teacher_bias, teacher_how, len(hidden))
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        scratch = [student.buffer(dtype) for _ in range(1 if beta in (0, 1) else 2)]
        wanted = [need and how.form_gradients for need in ctx.needs_input_grad[:3]]
        sums = _HeadGradients(student, hidden, weight, bias, wanted)
        divergence, entropy = scratch[0].new_empty(len(hidden)), scratch[0].new_empty(len(hidden))
        token_weights = token_weights.to(dtype)
        for begin in range(0, len(hidden), tokens_at_once):
            tokens = slice(begin, begin + tokens_at_once)
            logits = student.project(tokens)
            room = [buffer[: len(logits)] for buffer in scratch]
            kept = logits.clone() if how.finish.soft_cap is not None and any(wanted) else None
            log_p = _log_softmax_inplace(logits.to(dtype), temperature, room[0])
            log_q = _log_softmax_inplace(teacher.project(tokens).to(dtype), temperature, room[0])
            divergence[tokens], entropy[tokens], slope = _divergence_inplace(log_p, log_q, beta, room)
            if any(wanted):
                slope.mul_((token_weights[tokens] / temperature).unsqueeze(-1))
                sums.add_inplace(tokens, slope, kept)
        ctx.gradients = sums.take()
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
        return (*(None if values is None else values.mul_(gradient) for values in gradients), *(None,) * 8)


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
