"""What the running `generate` was asked for, where it does not tell those that it calls: read from its frame.

`generate` hands neither its streamer to a custom loop nor its mode, model and special tokens to processors and criteria. Its
local variables are the only place where these are. Without such a frame (another decoding loop) nothing is known.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import EosTokenCriteria, GenerationConfig, GenerationMode, StoppingCriteriaList

from prune_opd_hf.errors import UnsupportedGenerationError


def generate_call() -> Mapping[str, Any]:
    """The local variables of the innermost `generate` that is running in this thread; empty where none is.

    Example:
        >>> dict(generate_call())
        {}
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is code:
            return frame.f_locals
        frame = frame.f_back
    return {}


def refuse_other_modes(model: Any, generation_config: GenerationConfig, assistant_model: Any = None) -> None:
    """Let greedy decoding and sampling of decoder-only models pass.

    Raises:
        UnsupportedGenerationError: beam search, assisted or contrastive decoding, an encoder-decoder model.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedGenerationError(
            f"{type(model).__name__} is an encoder-decoder model; drift can be watched in decoder-only models"
        )
    mode = generation_config.get_generation_mode(assistant_model)
    if getattr(generation_config, "is_assistant", False):
        mode = GenerationMode.ASSISTED_GENERATION
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UnsupportedGenerationError(
            f"the drift monitor and its loop follow greedy decoding and sampling, not {mode.value.replace('_', ' ')}: "
            "set num_beams=1 and leave out assistant models, penalty_alpha and constraints"
        )


def eos_token_ids(stopping_criteria: StoppingCriteriaList) -> Int[Tensor, " ends"]:
    """The tokens that end a row in this generation; none where it has no EOS criterion."""
    ids = [item.eos_token_id.reshape(-1) for item in stopping_criteria if isinstance(item, EosTokenCriteria)]
    return torch.cat(ids).cpu() if ids else torch.empty(0, dtype=torch.long)


def pad_token_id(generation_config: GenerationConfig) -> int | None:
    """What `generate` pads finished rows with, if it knows a padding token."""
    pad = getattr(generation_config, "_pad_token_tensor", None)
    return generation_config.pad_token_id if pad is None else int(pad)
