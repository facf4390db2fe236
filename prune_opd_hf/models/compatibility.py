"""Can this model be used, and do two models fit together: special tokens, contexts, caches, padding.

The one answer to each of these questions; training, evaluation, preflight and the monitor ask here, before any work is spent.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from jaxtyping import Int
from torch import Tensor

from prune_opd_hf.errors import ConfigError, InputError, UnsupportedGenerationError
from prune_opd_hf.models.lm_head import base_causal_lm, text_config


def special_token_ids(
    name: str, model: Any, tokenizer: Any = None, given: int | Iterable[int] | None = None
) -> tuple[int, ...]:
    """Ids of a special token, from the first that names any: `given`, the generation config, the tokenizer, the model's config.

    The generation config may name several ends of a response where a tokenizer names one. Nobody may name any.

    Args:
        name: of the setting, such as "eos_token_id".
        given: what the user chose. An empty list is a choice too ("nothing ends a response"); elsewhere it names none.
    """
    if given is not None:
        return as_ids(given)
    config = text_config(model) if hasattr(model, "config") else None
    sources = getattr(model, "generation_config", None), tokenizer, config
    return next((ids for ids in (as_ids(getattr(source, name, None)) for source in sources) if ids), ())


def as_ids(value: Any) -> tuple[int, ...]:
    """Token ids as a config, a tokenizer or a user gives them: one, several, or none. A negative one, as older configs have it,
    stands for none."""
    if value is None:
        return ()
    items = list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else [value]
    if not all(hasattr(item, "__index__") and not isinstance(item, bool) for item in items):
        raise ConfigError(
            f"special tokens, in a config or tokenizer as in a setting, must be a token id or a list of them; got {value!r:.80}"
        )
    return tuple(int(item) for item in items if item >= 0)


def ensure_pad_token(tokenizer: Any) -> int:
    """Let a tokenizer without a padding token pad with its EOS token, and return the padding token's id."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError("the tokenizer has neither a padding nor an EOS token: set tokenizer.pad_token")
    return tokenizer.pad_token_id


def context_length(model: Any) -> int | None:
    """Tokens that a model reads at most; None where its config sets no limit."""
    return getattr(text_config(base_causal_lm(model)), "max_position_embeddings", None)


def rotary_switch(model: Any) -> int | None:
    """The length behind which a model reads all of a sequence with another rotary embedding ("longrope", as in Phi-4-mini); None
    for models that do not. Keys that were cached before do not fit what comes behind it."""
    ropes = rotary_parameters(model)
    switches = [rope["original_max_position_embeddings"] for rope in ropes if rope.get("rope_type") == "longrope"]
    return min(switches, default=None)


def rotary_parameters(model: Any) -> list[dict[str, Any]]:
    """The settings of a model's rotary embeddings; of some families they differ between kinds of layers."""
    rope = getattr(text_config(base_causal_lm(model)), "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]


def describe_rotary_switch(switch: int | None, tokens: int, *, role: str) -> str | None:
    """What a `rotary_switch` means for scores where sequences may come to so many tokens; None where it means nothing."""
    if switch is None or tokens <= switch:
        return None
    return (
        f"the {role} reads sequences beyond {switch} tokens with another rotary embedding, and with keys that were cached before: "
        f"scores behind that length are not those of a pass over the whole sequence. Keep prompts and responses within {switch} "
        "tokens"
    )


def check_context(
    context: int | None,
    prompt_tokens: int,
    completion_tokens: int,
    *,
    role: str,
    setting: str = "max_completion_length",
) -> None:
    """Whether a prompt and its response fit a model's context, as `context_length` gives it.

    Args:
        prompt_tokens: of the longest prompt; 1 to ask whether any prompt leaves enough room.
        completion_tokens: cap on the response.
        role: how the message calls the model.
        setting: the name of the cap.

    Raises:
        ConfigError: they do not; names the largest cap that fits.
    """
    if context is None or prompt_tokens + completion_tokens <= context:
        return
    room = context - prompt_tokens
    remedy = "no room for a response; leave out prompts of that length"
    if room > 0:
        remedy = f"lower {setting} to {room}"
    raise ConfigError(
        f"the longest prompt and {setting} make {prompt_tokens} + {completion_tokens} tokens, above the {role}'s context of "
        f"{context}: {remedy}"
    )


def refuse_checkpointing(model: Any, role: str) -> None:
    """Refuse a model in training mode with gradient checkpointing: its layers drop the KV cache that they are given."""
    if model.training and any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        raise UnsupportedGenerationError(
            f"the {role} is in training mode with gradient checkpointing, so it keeps no KV cache: call model.eval() first"
        )


def refuse_other_caches(model: Any, role: str) -> None:
    """Refuse a recurrent model that knows no `past_key_values` (Mamba, RWKV) or keeps its state in its layers (RecurrentGemma)."""
    inputs = inspect.signature(model.forward).parameters
    if ("input_ids" in inputs and "past_key_values" not in inputs) or hasattr(model, "_setup_cache"):
        reason = "it cannot follow a generation block by block"
        if role == "student":
            reason = "none of its rows can be taken out of a batch, and pruning would save nothing"
        raise UnsupportedGenerationError(
            f"{type(model).__name__} keeps its state outside of past_key_values, so {reason}: choose a {role} with a KV cache"
        )


def check_left_padding(attention_mask: Int[Tensor, "rows prompt"]) -> None:
    """Refuse prompts that are empty or padded on the right."""
    if attention_mask.shape[1] == 0 or not bool((attention_mask.sum(dim=-1) > 0).all()):
        raise InputError("every prompt needs at least one token; got an empty one")
    falls = (attention_mask[:, 1:] < attention_mask[:, :-1]).any(dim=-1)
    if bool(falls.any()):
        row = int(falls.nonzero()[0])
        raise InputError(f'prompts must be padded on the left (tokenizer.padding_side = "left"); row {row} is not')
