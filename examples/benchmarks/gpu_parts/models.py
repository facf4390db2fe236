"""Qwen3-shaped models with random weights, and the arithmetic of what a decoding step must read.

The floor of a decoding step: every weight once, and the keys and values of every token in the cache, at the bandwidth of a
large copy. Activations, logits and the cache's new entries are left out, so no program reaches it exactly.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3 model with tied embeddings, as in the config.json of its repository on the Hub."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def config(self) -> Qwen3Config:
        """The model's config, without an end token: every response is as long as it may be."""
        return Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=40_960,
            tie_word_embeddings=True,
            eos_token_id=None,
            pad_token_id=0,
            bos_token_id=None,
        )


SHAPES = {
    "Qwen3-0.6B": Shape(1024, 3072, 28, 16, 8, 128, 151_936),  # huggingface.co/Qwen/Qwen3-0.6B
    "Qwen3-1.7B": Shape(2048, 6144, 28, 16, 8, 128, 151_936),  # huggingface.co/Qwen/Qwen3-1.7B
    "Qwen3-4B": Shape(2560, 9728, 36, 32, 8, 128, 151_936),  # huggingface.co/Qwen/Qwen3-4B
}
TOY_SHAPES = {
    "Qwen3-0.6B": Shape(32, 96, 2, 2, 1, 16, 256),
    "Qwen3-1.7B": Shape(64, 192, 2, 4, 2, 16, 256),
    "Qwen3-4B": Shape(64, 192, 3, 4, 2, 16, 256),
}


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """A model with random weights, made on the device itself."""
    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(shape.config(), dtype=dtype).to(device).eval()


def parameter_count(shape: Shape) -> int:
    """Numbers that a decoding step reads: embeddings once (they are the LM head), and every layer.

    Example: the published 1.7B has 1.7 billion with its tied embeddings counted once.
        >>> round(parameter_count(SHAPES["Qwen3-1.7B"]) / 1e9, 2)
        1.72
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.hidden * (2 * queries + 2 * keys) + 2 * shape.head_dim  # q, o, k, v and the norms of q and k
    layer = attention + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
    return shape.vocabulary * shape.hidden + shape.layers * layer + shape.hidden


def kv_bytes_per_token(shape: Shape, element_bytes: int) -> int:
    """Keys and values of one token in every layer.

    Example: 112 KiB for the 1.7B in 16 bits.
        >>> kv_bytes_per_token(SHAPES["Qwen3-1.7B"], 2) / 1024
        112.0
    """
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * element_bytes


def step_bytes(shape: Shape, rows: int, context: int, element_bytes: int) -> int:
    """Bytes that one decoding step must read: weights, and the cache of `rows` sequences of `context` tokens."""
    return parameter_count(shape) * element_bytes + rows * context * kv_bytes_per_token(shape, element_bytes)


def floor_milliseconds(shape: Shape, rows: int, context: int, element_bytes: int, bandwidth: float) -> float:
    """The floor of one decoding step at `bandwidth` bytes a second."""
    return 1e3 * step_bytes(shape, rows, context, element_bytes) / bandwidth


CACHE_ROOM = 1.25
"""A growing cache keeps up to a quarter of spare room; Transformers' own holds one layer twice while it grows."""


def generation_bytes(shape: Shape, rows: int, prompt: int, total: int, element_bytes: int) -> int:
    """About what a generation takes beside the weights, to tell beforehand what cannot fit.

    The cache with its room, and the larger of two moments: reading the prompts (four tensors of the MLP's width at every prompt
    token, and four of the hidden size) and choosing tokens (logits in 16 and three times in 32 bits).
    """
    cache = CACHE_ROOM * rows * total * kv_bytes_per_token(shape, element_bytes)
    prompts = rows * prompt * 4 * (shape.intermediate + shape.hidden) * element_bytes
    choosing = rows * shape.vocabulary * (element_bytes + 3 * 4)
    return int(cache + max(prompts, choosing))
