"""What stands before a run: loading both models, comparing vocabularies and contexts, and what bfloat16 weights would cost.

Every check here is made before any work is spent; each says what it found and what to do.
"""

import logging
import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.lm_head import base_causal_lm, text_config

logger = logging.getLogger(__name__)

SMALL_LEARNING_RATE = 1e-5


def load_model(role: str, model: Any, arguments: dict[str, Any]) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """A model given by Hub id or folder, with its tokenizer; one given as an object as it is, without.

    Raises:
        InputError: it cannot be loaded.
    """
    if not isinstance(model, str):
        return model, None
    try:
        return AutoModelForCausalLM.from_pretrained(model, **arguments), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the {role} {model!r}: {str(error).strip().splitlines()[0]}") from error


def name_of(model: Any) -> str | None:
    """Hub id or folder of a model, where it has one."""
    if isinstance(model, str):
        return model
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def check_context(student: nn.Module, teacher: nn.Module, longest_prompt: int, max_completion_length: int) -> None:
    """Whether the longest responses fit both models' contexts.

    Raises:
        ConfigError: they cannot, whatever the prompt. Where only the longest prompts would go beyond, a line in the log.
    """
    longest = longest_prompt + max_completion_length
    for role, config in (("student", text_config(base_causal_lm(student))), ("teacher", text_config(teacher))):
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and max_completion_length >= context:
            raise ConfigError(
                f"max_completion_length {max_completion_length} does not fit the {role}'s context of {context} tokens: lower it"
            )
        if context is not None and longest > context:
            logger.warning(
                "the longest prompt and max_completion_length make %d tokens, above the %s's context of %d: a long "
                "response to it will stop the run",
                longest,
                role,
                context,
            )


def end_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase, shared: int) -> list[int]:
    """The tokens that end a response: the student's, as far as the teacher knows them.

    Raises:
        ConfigError: there is none, or the teacher knows none of them.
    """
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    ids = tokenizer.eos_token_id if ids is None else ids
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    known = [token for token in ids if token < shared]
    if ids and not known:
        raise ConfigError(
            f"the student ends its responses with token {ids[0]}, which lies outside the {shared} ids that it shares with the "
            "teacher: choose a teacher with the student's tokenizer"
        )
    return known


def warn_of_rounding(model: nn.Module, learning_rate: float) -> None:
    """Warn where the trained weights are kept in 16 bits and the learning rate is too small for them.

    bfloat16 keeps 8 bits of a number: a weight w cannot move by less than about |w| / 256. AdamW moves a weight by about the
    learning rate, so at 1e-6 every weight above about 2.6e-4 stays exactly where it is.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if learning_rate <= SMALL_LEARNING_RATE and dtypes & {torch.bfloat16, torch.float16}:
        warnings.warn(
            f"the student's weights are kept in {' and '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}, "
            f"where an update of the learning rate {learning_rate:g} is rounded away: a bfloat16 weight w cannot move by less "
            "than about |w| / 256. Load the student in float32 (the default; model_init_kwargs dtype) and set bf16=True to "
            "compute in bfloat16",
            UserWarning,
            stacklevel=3,
        )
