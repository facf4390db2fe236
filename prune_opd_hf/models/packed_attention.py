"""Attention over packed sequences under SDPA: each sequence by itself, instead of one mask over all of them.

Transformers masks packed sequences from one another, which is exact, but the mask has the square of all tokens, and so does the
work. Here every sequence of a packed row is a call of its own to the library's SDPA function. FlashAttention needs none of this,
since it takes packed sequences as they are.

It knows Transformers' registry of attention functions; it does not know rollouts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prune_opd_hf.models.compatibility import rotary_parameters
from prune_opd_hf.models.lm_head import base_causal_lm, text_config

LENGTHS = "packed_sequence_lengths"
"""The keyword argument by which lengths reach the attention layers, also those that gradient checkpointing computes again."""


def may_pack(model: nn.Module) -> bool:
    """Whether it can pay and be right to pack for this model, as far as its config says.

    Eager attention would make scores of the square of all tokens. Chunked attention counts its chunks from the beginning of the
    row, and rotary embeddings that depend on the length would be chosen by the longest sequence of the row.
    """
    config = _text_config(model)
    implementation = config._attn_implementation or ""
    is_by_length = any(rope.get("rope_type") in ("longrope", "dynamic") for rope in rotary_parameters(model))
    is_chunked = bool(getattr(config, "attention_chunk_size", None))
    return (implementation == "sdpa" or implementation.startswith("flash")) and not (is_by_length or is_chunked)


def packed_arguments(model: nn.Module, lengths: Sequence[int]) -> dict[str, Any]:
    """What to pass to the forward pass beside `position_ids`: nothing where the model does not attend by SDPA."""
    if _text_config(model)._attn_implementation != "sdpa":
        return {}
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not isinstance(attend, _BySequence):
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _BySequence(attend)
    return {LENGTHS: tuple(lengths)}


@contextmanager
def packed_masks(model: nn.Module) -> Iterator[None]:
    """While this lasts SDPA models make no mask, unless a window limits what a token sees of its own sequence."""
    config = _text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != "sdpa" or kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        yield
        return
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = make_mask


@dataclass(frozen=True)
class _BySequence:
    """Calls `attend` for each sequence where lengths are passed, and changes nothing elsewhere."""

    attend: Callable[..., tuple[Tensor, None]]

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        lengths = kwargs.pop(LENGTHS, None)
        if lengths is None:
            return self.attend(module, query, key, value, attention_mask, **kwargs)
        parts, first = [], 0
        for length in lengths:
            inside = slice(first, first + length)
            mask = None if attention_mask is None else attention_mask[..., inside, inside]
            rows = (states[:, :, inside] for states in (query, key, value))
            parts.append(self.attend(module, *rows, mask, **kwargs)[0])
            first += length
        return torch.cat(parts, dim=1), None


def _text_config(model: nn.Module) -> Any:
    return text_config(base_causal_lm(getattr(model, "module", model)))  # as DDP wraps it
