"""A causal language model as backbone and LM head, so that logits exist only where they are wanted.

A forward pass through `model(...)` makes logits for every position at once: 256 rows x 32 tokens x 151,936 ids are 5 GB in
float32. Splitting lets callers project the hidden states slice by slice. Families differ in what they do to the logits
after the projection (soft cap, scale); which of the known forms this model uses is found by trying them on two tokens
against the model's own logits, not by its name. Where several fit, as all do to very small logits, what the config tells of
goes before the plain form.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prune_opd_hf.errors import UnsupportedGenerationError


@dataclass(frozen=True)
class LogitTransform:
    """What a family does to the raw projection: cap tanh(z / cap), z / divisor, z * scale. The default does nothing."""

    soft_cap: float | None = None
    divisor: float = 1.0
    scale: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether the raw projection already is the logits."""
        return self == LogitTransform()

    def __call__(self, raw: Tensor) -> Tensor:
        """Logits of raw projections, by the same operations as the families of Transformers, so bit for bit theirs."""
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.divisor != 1.0:
            raw = raw / self.divisor
        return raw if self.soft_cap is None else torch.tanh(raw / self.soft_cap) * self.soft_cap

    def slope(self, transformed: Tensor) -> Tensor | float:
        """d logit / d raw at transformed logits."""
        linear = self.scale / self.divisor
        if self.soft_cap is None:
            return linear
        return (1 - (transformed / self.soft_cap).square()) * linear


class HeadParameters(NamedTuple):
    """All that turns hidden states into logits, as plain tensors: logits = transform(hidden weight^T + bias)[:vocab_size], and
    -inf at `excluded_ids`.

    Attributes:
        weight: one row for each token id; a parameter, or a tensor made from parameters (with gradient where they have one).
        bias: or None.
        transform: what the family does after the projection.
        vocab_size: only so many ids count; None for every row of the weight.
        excluded_ids: ids below it that do not count either.
    """

    weight: Float[Tensor, "rows hidden"]
    bias: Float[Tensor, " rows"] | None = None
    transform: LogitTransform = LogitTransform()
    vocab_size: int | None = None
    excluded_ids: tuple[int, ...] = ()


def text_config(model: nn.Module) -> Any:
    """The config of the language model proper, also where it sits inside a multimodal config."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def base_causal_lm(model: nn.Module) -> nn.Module:
    """The Transformers model itself: unwraps a PEFT model (its adapters stay active inside the layers).

    Raises:
        UnsupportedGenerationError: an encoder-decoder model, one without an LM head, or one whose adapter is a learnt prompt,
            which only the wrapper adds.
    """
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        for adapter in model.peft_config.values():
            if getattr(adapter, "is_prompt_learning", False):
                raise UnsupportedGenerationError(
                    f"adapters that learn a prompt ({adapter.peft_type.value}) cannot be followed; use LoRA or another kind "
                    "whose adapters lie inside the layers"
                )
        model = model.get_base_model()
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedGenerationError(
            f"{type(model).__name__} is an encoder-decoder model; on-policy distillation here needs decoder-only models"
        )
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise UnsupportedGenerationError(
            f"{type(model).__name__} has no LM head; load it with AutoModelForCausalLM.from_pretrained"
        )
    return model


def input_device(model: nn.Module) -> torch.device:
    """Device that token ids must lie on: that of the input embeddings, also when layers are spread over devices; of weights that
    are offloaded (Accelerate), where they are brought to."""
    embeddings = model.get_input_embeddings()
    brought_to = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return embeddings.weight.device if brought_to is None else torch.device(brought_to)


class BackboneAndHead:
    """Backbone and LM head of one causal language model.

    Args:
        model: a causal LM of Transformers, PEFT-wrapped or not.
        transform: what the family does to the raw projection, where it has been found before; else the model is asked.

    Attributes:
        separable: whether backbone and LM head were shown to reproduce the model's own logits. Where not, `project` must not be
            used and the logits come from the model's own forward pass.
    """

    def __init__(self, model: nn.Module, transform: LogitTransform | None = None) -> None:
        self.model = base_causal_lm(model)
        self.backbone: Any = getattr(self.model, self.model.base_model_prefix, None)
        self.lm_head = self.model.get_output_embeddings()
        self.vocab_size = int(self.lm_head.weight.shape[0])
        self._transform = self._find_transform() if transform is None else transform
        self.separable = self._transform is not None

    @property
    def transform(self) -> LogitTransform:
        assert self._transform is not None
        return self._transform

    def head_parameters(
        self, vocab_size: int | None = None, excluded_ids: tuple[int, ...] = ()
    ) -> HeadParameters | None:
        """The head as plain tensors for `prune_opd_hf.models.chunked_head`, or None where it is more than a linear map.

        A head that PEFT adapts comes as the sum of its weight and its adapters' products, with gradient to the adapters. Call
        it anew for every forward pass: the tensors of a sharded or adapted head live no longer than that.

        Args:
            vocab_size, excluded_ids: which ids count, as in `Teacher.restrict_vocabulary`.
        """
        parameters = linear_parameters(self.lm_head) if self.separable else None
        if parameters is None:
            return None
        weight, bias = parameters
        counted = None if vocab_size is None else min(vocab_size, len(weight))
        return HeadParameters(weight, bias, self.transform, counted, excluded_ids)

    def project(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Logits of hidden states, in the head's dtype, exactly as the model itself computes them."""
        assert self._transform is not None
        return self._transform(self.lm_head(hidden))

    @torch.no_grad()
    def _find_transform(self) -> LogitTransform | None:
        if self.backbone is None:
            return None
        forms = _known_transforms(text_config(self.model))
        with evaluating(self.model):
            probe = torch.tensor([[0, 1]], device=input_device(self.model)).clamp(max=self.vocab_size - 1)
            expected = self.model(input_ids=probe, use_cache=False).logits.float()
            raw = self.lm_head(self.backbone(input_ids=probe, use_cache=False).last_hidden_state)
        transform = min(forms, key=lambda form: float((form(raw).float() - expected).abs().max()))
        # Same operations on the same values: anything but rounding means another form.
        return transform if torch.allclose(transform(raw).float(), expected, rtol=1e-3, atol=1e-5) else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for a while; every part has its own mode back afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _known_transforms(config: Any) -> list[LogitTransform]:
    """What the families of Transformers do to the raw projection, the plain form last."""
    names = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
    cap, divisor, scale, multiplier = (getattr(config, name, None) for name in names)
    forms = [
        LogitTransform(soft_cap=float(cap)) if cap else None,
        LogitTransform(divisor=float(divisor)) if divisor else None,
        LogitTransform(scale=float(scale)) if scale else None,
        LogitTransform(scale=float(multiplier)) if multiplier else None,
        LogitTransform(),
    ]
    return [form for form in forms if form is not None]


def linear_parameters(head: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of an LM head that is a linear map, through PEFT's wrappers; None for any other kind of module.

    Args:
        head: `torch.nn.Linear`, sharded by FSDP2 or not; one with LoRA layers; or one that PEFT trains a copy of. Quantized and
            offloaded layers are none of these.
    """
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and not head.weight.is_meta:
        return head.weight, head.bias
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        if head.disable_adapters or not head.active_adapters:
            return linear_parameters(head.original_module)
        return linear_parameters(head.modules_to_save[head.active_adapters[0]])
    if hasattr(head, "base_layer") and hasattr(head, "lora_A"):
        return _lora_parameters(head)
    return None


def _lora_parameters(head: Any) -> tuple[Tensor, Tensor | None] | None:
    """W + Σ scaling B A, where every active adapter is a plain LoRA pair without dropout at work."""
    base = linear_parameters(head.base_layer)
    if base is None or head.disable_adapters or head.merged:
        return base
    weight, bias = base
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        dropout = head.lora_dropout[name]
        variant = getattr(head, "lora_variant", {})
        drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
        if drops or name in variant or head.lora_B[name].bias is not None:
            return None
        weight = weight + (head.scaling[name] * (head.lora_B[name].weight @ head.lora_A[name].weight)).to(weight.dtype)
    return weight, bias


MARKS_OF_SHARDS = ("device_mesh", "ds_id")
"""Attributes of parameters that FSDP2 and DeepSpeed ZeRO-3 shard over processes."""


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only its part of some weights."""
    return any(hasattr(parameter, mark) for parameter in model.parameters() for mark in MARKS_OF_SHARDS)


def forward_context(model: nn.Module) -> Callable[[], AbstractContextManager]:
    """The context of forward passes without gradient, and of every change of the cache that such passes made.

    `torch.inference_mode` saves about a tenth of a decoding step of a small model. Its tensors can never enter a graph: what is
    kept is copied or computed anew outside. Sharded parameters are gathered by hooks that write to tensors of the training graph,
    so their models get `no_grad`.
    """
    return torch.no_grad if is_sharded(model) else torch.inference_mode
