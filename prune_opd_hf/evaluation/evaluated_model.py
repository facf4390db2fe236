"""The model under evaluation: loading it, what identifies it, and how it reads the prompts of a benchmark."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.evaluation.benchmarks import Benchmark
from prune_opd_hf.evaluation.grading.math_grader.extraction import THOUGHT_TAGS
from prune_opd_hf.models.compatibility import check_context, context_length
from prune_opd_hf.models.end_tokens import find_end_tokens
from prune_opd_hf.models.lm_head import base_causal_lm
from prune_opd_hf.models.loading import (
    active_adapters,
    as_tokenizer,
    is_adapted,
    load_causal_lm,
    load_tokenizer,
    published_name,
)
from prune_opd_hf.models.prompts import PromptEncoder
from prune_opd_hf.records.weights import weights_hash


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that is ready to generate.

    Attributes:
        model: a PEFT model's inner one, whose layers hold the adapter.
        name: Hub id, or the folder's name alone.
        weights_hash: "sha256:..." of the weights as safetensors, of an adapter's own where there is one.
        adapter: the settings of the adapter, which with its weights and its base make the model.
        eos_token_ids: the tokens that end a response.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    weights_hash: str
    eos_token_ids: tuple[int, ...]
    adapter: Mapping[str, Any] = field(default_factory=dict)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Tokens as text. What opens or closes a thought is never skipped."""
        added = self.tokenizer.added_tokens_decoder.items()
        marks = {mark for pair in THOUGHT_TAGS for mark in pair}
        tags = {number: str(token) for number, token in added if token.special and str(token) in marks}
        text, first = "", 0
        for place, token_id in enumerate(token_ids if skip_special_tokens else ()):
            if token_id in tags:
                text += self.tokenizer.decode(token_ids[first:place], skip_special_tokens=True) + tags[token_id]
                first = place + 1
        return text + self.tokenizer.decode(token_ids[first:], skip_special_tokens=skip_special_tokens)

    @property
    def dtype(self) -> str:
        """Of the weights, such as "bfloat16"."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def config_hash(self) -> str:
        """Of what the configuration makes of the weights, such as the scaling of the rotary embedding."""
        neutral = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
        settings = {name: value for name, value in self.model.config.to_diff_dict().items() if name not in neutral}
        settings |= {f"adapter {name}": value for name, value in self.adapter.items()}
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load_evaluated_model(
    model: PreTrainedModel | str | os.PathLike[str],
    tokenizer: Any,
    *,
    device: torch.device,
    name: str | None = None,
    model_hash: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
) -> EvaluatedModel:
    """Load what is not loaded yet, and find out what it is.

    Args:
        model: a Hub id, a folder, of whole weights or of an adapter, or a model, which stays on its device.
        tokenizer: loaded beside the model by default.
        device: where a model that is loaded here goes.
        name, model_hash, revision, trust_remote_code, dtype: see `evaluate_model`.
    """
    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        in_folder = os.path.isdir(path)
        if in_folder and revision is not None:
            raise ConfigError(f"revision belongs to a Hub id, and {path} is a folder: leave it out")
        arguments: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": dtype}
        model = load_causal_lm(path, **arguments).to(device).eval()
        tokenizer = tokenizer or load_tokenizer(path, **arguments)
        name = name or published_name(path)
        if model_hash is None:
            files = ["*.safetensors", "*.safetensors.index.json"]
            folder = path if in_folder else snapshot_download(path, revision=revision, allow_patterns=files)
            model_hash = weights_hash(folder)
    elif tokenizer is None:
        raise ConfigError("a model in memory needs its tokenizer: pass processing_class")
    tokenizer = as_tokenizer(tokenizer, "processing_class")
    eos_token_ids = find_end_tokens(model, tokenizer).token_ids
    if model_hash is None:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model_hash = weights_hash(folder)
    name = name or published_name(model) or type(model).__name__
    adapter = _adapter_settings(model)
    return EvaluatedModel(base_causal_lm(model), tokenizer, name, model_hash, eos_token_ids, adapter)


def _adapter_settings(model: Any) -> dict[str, Any]:
    """The plain values among the settings of a model's active adapters, and the base that each is for."""
    if not is_adapted(model):
        return {}
    return {
        f"{name}.{item}": value
        for name in active_adapters(model)
        for item, value in model.peft_config[name].to_dict().items()
        if isinstance(value, str | int | float) and item != "inference_mode"
    }


def takes_template(benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the prompts of a benchmark are put into the tokenizer's chat template."""
    return benchmark.answer_type != "chain" and bool(tokenizer.chat_template)


def encode_prompts(
    benchmark: Benchmark,
    subject: EvaluatedModel,
    max_completion_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[tuple[int, ...]], str]:
    """Prompts as the user's turn in the tokenizer's chat template where it has one, else as they stand.

    The embedded task's prompts are never put into a template.

    Returns:
        the token ids of each prompt, and a description of what they were put into, for a report.
    """
    model, tokenizer = subject.model, subject.tokenizer
    prompts: Sequence[Any] = benchmark.prompts
    settings = dict(sorted((chat_template_kwargs or {}).items()))
    if not takes_template(benchmark, tokenizer):
        form = "no template"
    else:
        digest = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]
        form = f"chat template {digest}" + (f" with {json.dumps(settings, default=str)}" if settings else "")
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    encode = PromptEncoder(tokenizer, settings)
    ids = [encode(prompt, f"problem {number} of {benchmark.name}") for number, prompt in enumerate(prompts)]
    largest, known = max(map(max, ids)), getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and largest >= known:
        raise ConfigError(
            f"a prompt of {benchmark.name} has token {largest}, and the model knows {known} tokens: "
            "the tokenizer is not this model's"
        )
    check_context(context_length(model), max(map(len, ids)), max_completion_length, role="model")
    return [tuple(prompt) for prompt in ids], form


def prompt_hash(token_ids: tuple[int, ...]) -> str:
    return hashlib.sha256(repr(token_ids).encode()).hexdigest()[:16]
