"""Projects a few hidden states at a time, and sums what the gradients of their logits mean for the head."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.models.lm_head import HeadParameters, LogitTransform

MAX_LOGIT_ELEMENTS = 2**25
"""Logits of one model held at once: 128 MiB in float32. Two to four buffers of this size are alive together."""

LOG_ZERO = -1e30
"""Stands in for log 0 where it is multiplied by a probability of 0, since 0 * inf is not a number."""

VOCAB_SLICE = 2**14
"""Rows of the weight's gradient that are added up at once where the head computes in less than float32."""


def checked_head(hidden: Tensor, head: HeadParameters, role: str, max_logit_elements: int) -> HeadParameters:
    """`head` with whole tensors, found to fit the hidden states."""
    head = head._replace(weight=gathered(head.weight), bias=None if head.bias is None else gathered(head.bias))
    if head.weight.shape[1] != hidden.shape[-1]:
        raise InputError(
            f"the {role}'s hidden states have {hidden.shape[-1]} features and its head takes {head.weight.shape[1]}: do they "
            "belong to one model?"
        )
    if not 1 <= counted_rows(head) <= len(head.weight):
        raise InputError(f"vocab_size must lie in 1 to {len(head.weight)}, the {role}'s rows; got {head.vocab_size}")
    if max_logit_elements < counted_rows(head):
        raise ConfigError(
            f"max_logit_elements must hold at least one position of the {role}'s {counted_rows(head)} logits, got "
            f"{max_logit_elements}"
        )
    return head


def counted_rows(head: HeadParameters) -> int:
    """How many ids count."""
    return len(head.weight) if head.vocab_size is None else head.vocab_size


def scattered(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the positions in `mask` at their places, 0 elsewhere."""
    return values.new_zeros(*mask.shape, *values.shape[1:]).masked_scatter(
        mask.reshape(*mask.shape, *[1] * (values.dim() - 1)), values
    )


class Projection(NamedTuple):
    """How one head is projected: everything that is no tensor.

    Attributes:
        transform: what the family does to the raw projection.
        rows: how many ids count.
        excluded_ids: those of them that do not.
        compute_dtype: of the matrix products: the autocast dtype where autocast is on, else the weight's.
        tokens_at_once: so many rows of logits exist at a time.
        form_gradients: whether gradient was enabled when the operation was called.
    """

    transform: LogitTransform
    rows: int
    excluded_ids: tuple[int, ...]
    compute_dtype: torch.dtype
    tokens_at_once: int
    form_gradients: bool

    @classmethod
    def of(cls, head: HeadParameters, hidden: Tensor, max_logit_elements: int) -> "Projection":
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else head.weight.dtype
        return cls(
            head.transform,
            counted_rows(head),
            head.excluded_ids,
            dtype,
            max(1, max_logit_elements // counted_rows(head)),
            torch.is_grad_enabled(),
        )


class Projector:
    """Makes the logits of a few tokens at a time, always in the same buffer, in float32 (float64 for a head in float64)."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, how: Projection, tokens: int) -> None:
        self.how, self.room = how, min(tokens, how.tokens_at_once)
        self.hidden = hidden.detach().to(how.compute_dtype)
        self.weight = weight.detach()[: how.rows].to(how.compute_dtype)
        self.bias = None if bias is None else bias.detach()[: how.rows].to(how.compute_dtype)
        self.excluded = torch.tensor(how.excluded_ids, device=hidden.device) if how.excluded_ids else None
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
        transformed = raw if self.how.transform.is_plain else self.how.transform(raw)
        if self.excluded is not None:
            transformed.index_fill_(1, self.excluded, -torch.inf)
        return transformed if transformed.dtype == self.dtype else self.logits[: len(hidden)].copy_(transformed)


class HeadGradients:
    """Sums the gradients of hidden states, weight and bias over chunks, each only where it is wanted."""

    def __init__(
        self, projector: Projector, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]
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
            logits: the transformed logits, where the slope of the transform depends on them.
        """
        how = self.projector.how
        if not how.transform.is_plain:
            gradient.mul_(how.transform.slope(gradient if logits is None else logits))
            if self.projector.excluded is not None:  # 0 times an infinite slope
                gradient.index_fill_(1, self.projector.excluded, 0.0)
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


def gathered(weight: Tensor) -> Tensor:
    """A sharded parameter (DTensor) as a whole tensor, whose gradient flows back averaged over the processes, as FSDP2's does.

    Parameters inside a module that FSDP2 has unsharded (during its forward pass, and until its backward pass where
    `reshard_after_forward` is off) are whole already; those and ordinary tensors come back as they are. All processes must
    call this together, also one without response tokens.
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
