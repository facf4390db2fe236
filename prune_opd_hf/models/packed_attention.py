"""Attention over packed sequences under SDPA: each sequence by itself, instead of one mask over all of them.

Transformers masks packed sequences from one another, which is exact, but the mask has the square of all tokens, and so does the
work. Here every sequence of a packed row is a call of its own to the library's SDPA function. FlashAttention needs none of this,
since it takes packed sequences as they are.

It knows Transformers' registry of attention functions; it does not know rollouts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LENGTHS = "packed_sequence_lengths"
"""The keyword argument by which lengths reach the attention layers, also those that gradient checkpointing computes again."""


def packed_arguments(model: nn.Module, lengths: Sequence[int]) -> dict[str, Any]:
    """What to pass to the forward pass beside `position_ids`: nothing where the model does not attend by SDPA."""
    if _text_config(model)._attn_implementation != "sdpa":
        return {}
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attend  # acts where lengths are passed, and nowhere else
    return {LENGTHS: tuple(lengths)}


@contextmanager
def packed_masks(model: nn.Module) -> Iterator[None]:
    """While this lasts SDPA models make no mask, unless a window or chunks limit what a token sees of its own sequence."""
    config = _text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    limits = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if config._attn_implementation != "sdpa" or kinds != {"full_attention"} or any(limits):
        yield
        return
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _no_mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    lengths = kwargs.pop(LENGTHS, None)
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts, first = [], 0
    for length in lengths:
        inside = slice(first, first + length)
        mask = None if attention_mask is None else attention_mask[..., inside, inside]
        rows = (states[:, :, inside] for states in (query, key, value))
        parts.append(sdpa_attention_forward(module, *rows, mask, **kwargs)[0])
        first += length
    return torch.cat(parts, dim=1), None


def _text_config(model: nn.Module) -> Any:
    inner: Any = getattr(model, "module", model)
    return inner.config.get_text_config(decoder=True)
