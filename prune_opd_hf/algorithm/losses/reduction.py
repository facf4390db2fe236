"""How values at response tokens become one number."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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
