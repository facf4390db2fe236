"""Head weights that FSDP2 has spread over processes."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
