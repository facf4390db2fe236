"""What a training step holds in memory, from the shapes of the two models. Estimates, and meant to be: activations of the
update depend on checkpointing and kernels and are not counted.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prune_opd_hf.models.lm_head import text_config
from prune_opd_hf.teachers.local import MAX_LOGIT_ELEMENTS

MASTER_BYTES = 4
"""The trainer's weights are float32: bfloat16 ones round updates of a learning rate of 1e-6 to nothing."""

ADAM_STATES = 2
LOGIT_BYTES = 4


def memory_bytes(
    student: nn.Module, teacher: nn.Module, *, rows: int, tokens: int, trained: bool = True
) -> dict[str, int]:
    """Bytes by part.

    Args:
        student, teacher: the models.
        rows: sequences generated at once.
        tokens: prompt and response of the longest one.
        trained: count gradients and AdamW's states.
    """
    own, theirs = _parameters(student), _parameters(teacher)
    parts = {
        "student, float32 weights": own * MASTER_BYTES,
        "gradients": own * MASTER_BYTES if trained else 0,
        "AdamW": own * MASTER_BYTES * ADAM_STATES if trained else 0,
        "teacher, weights": sum(value.numel() * value.element_size() for value in teacher.parameters()),
        "student's KV cache": cache_bytes_per_token(student) * rows * tokens,
        "teacher's KV cache": cache_bytes_per_token(teacher) * rows * tokens,
        "logits held at once": MAX_LOGIT_ELEMENTS * LOGIT_BYTES,
    }
    if teacher is student:
        parts["teacher, weights"] = 0
    assert theirs >= 0
    return parts


def cache_bytes_per_token(model: nn.Module) -> int:
    """Keys and values of one token in all layers: 2 x layers x heads x head size x bytes of a number.

    Example: 2 layers, 4 heads of 8 numbers, float32.
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4)
        >>> cache_bytes_per_token(LlamaForCausalLM(config))
        512
    """
    config: Any = text_config(model)
    layers = getattr(config, "num_hidden_layers", 0)
    heads = getattr(config, "num_attention_heads", 0)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // max(heads, 1))
    number = next(iter(model.parameters())).element_size()
    return 2 * layers * key_heads * size * number


def available_bytes() -> tuple[str, int] | None:
    """The memory of the first accelerator, else of the machine, with its name; None where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0), int(torch.cuda.get_device_properties(0).total_memory)
    import os

    try:
        return "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def total_gib(parts: Mapping[str, int]) -> float:
    """All parts together, in GiB."""
    return sum(parts.values()) / 2**30


def _parameters(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())
