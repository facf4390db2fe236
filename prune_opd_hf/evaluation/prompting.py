"""From a benchmark's prompts to token ids, and the tokens that end a response."""

import hashlib
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.evaluation.benchmarks import Benchmark


def encode_prompts(
    benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[tuple[int, ...]]:
    """Token ids of each prompt: as the user's turn in the tokenizer's chat template where it has one, else as it stands.

    The embedded task's prompts are never put into a template.

    Raises:
        ConfigError: the template refuses its settings.
        InputError: a prompt without tokens.
    """
    if not _takes_template(benchmark, tokenizer):
        encoded = [tuple(tokenizer(prompt).input_ids) for prompt in benchmark.prompts]
    else:
        try:
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    tokenize=False,
                    add_generation_prompt=True,
                    **(chat_template_kwargs or {}),
                )
                for prompt in benchmark.prompts
            ]
        except (TemplateError, TypeError, ValueError) as error:
            raise ConfigError(f"the chat template cannot take the prompts of {benchmark.name}: {error}") from error
        encoded = [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    for number, prompt in enumerate(encoded):
        if not prompt:
            raise InputError(
                f"problem {number} of {benchmark.name} becomes a prompt without tokens: does the tokenizer belong to the model?"
            )
    return encoded


def describe_prompts(
    benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
) -> str:
    """What `encode_prompts` puts each prompt into, in words for a report."""
    if not _takes_template(benchmark, tokenizer):
        return "no template"
    digest = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]
    return ", ".join(
        [
            f"chat template {digest}",
            *[f"{name}={value!r}" for name, value in sorted((chat_template_kwargs or {}).items())],
        ]
    )


def _takes_template(benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase) -> bool:
    return benchmark.answer_type != "chain" and bool(tokenizer.chat_template)


def prompt_hash(token_ids: tuple[int, ...]) -> str:
    """A short name of a prompt's tokens.

    Example:
        >>> prompt_hash((1, 2)) == prompt_hash((1, 2)) != prompt_hash((12,))
        True
    """
    return hashlib.sha256(repr(token_ids).encode()).hexdigest()[:16]


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a response: the generation config's, else the tokenizer's.

    Raises:
        ConfigError: neither names one, so that every response would be cut.
    """
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = tokenizer.eos_token_id if ids in (None, [], ()) else ids
    if ids is None:
        raise ConfigError(
            "neither the generation config nor the tokenizer names a token that ends a response: set "
            "model.generation_config.eos_token_id"
        )
    return tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)


def check_room(model: PreTrainedModel, prompts: list[tuple[int, ...]], max_new_tokens: int, benchmark: str) -> None:
    """Refuse prompts that the model cannot read, or that leave less room in its context than the responses may take.

    Raises:
        ConfigError: names the largest `max_new_tokens` that fits, or the token that the model does not know.
    """
    largest, known = max(map(max, prompts)), getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and largest >= known:
        raise ConfigError(
            f"a prompt of {benchmark} has token {largest}, and the model knows {known} tokens: the tokenizer is not this model's"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if context is None or longest + max_new_tokens <= context:
        return
    if longest >= context:
        raise ConfigError(
            f"the longest prompt of {benchmark} has {longest} tokens and the model's context {context}: no room for a response"
        )
    raise ConfigError(
        f"the longest prompt of {benchmark} has {longest} tokens, which leaves {context - longest} of the model's context of "
        f"{context}, less than max_new_tokens {max_new_tokens}: set max_new_tokens to {context - longest} or less"
    )
