"""The context that forward passes without gradient run in: `torch.inference_mode` where the model allows it.

Inference mode spares the bookkeeping of `no_grad` (version counters, views), about a tenth of a decoding step of a small
model. Tensors made in it can never enter a graph, so only the forward pass and the cache live inside; what leaves it is
copied or computed anew outside.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

MARKS_OF_SHARDS = ("device_mesh", "ds_id")
"""Attributes of parameters that FSDP2 and DeepSpeed ZeRO-3 shard over processes."""


def forward_context(model: nn.Module) -> Callable[[], AbstractContextManager]:
    """What to enter for each forward pass of `model`, and for each change of the cache that such passes made.

    Sharded parameters are gathered by hooks that write to tensors of the training graph: their models get `no_grad`.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with forward_context(layer)():
        ...     layer(torch.ones(1, 2)).is_inference()
        True
    """
    sharded = any(hasattr(parameter, mark) for parameter in model.parameters() for mark in MARKS_OF_SHARDS)
    return torch.no_grad if sharded else torch.inference_mode
