"""A causal language model taken apart into backbone and LM head, so that logits exist only where they are wanted.

A forward pass through `model(...)` makes logits for every position at once: 256 rows x 32 tokens x 151,936 ids are 5 GB in
float32. Splitting lets callers project the hidden states slice by slice. Families differ in what they do to the logits
after the projection (soft cap, scale); which of the known forms this model uses is found by trying them on two tokens
against the model's own logits, not by its name. Where several fit, as all do to very small logits, what the config tells of
goes before the plain form.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prune_opd_hf.errors import UnsupportedGenerationError


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
    """Device that token ids must lie on: that of the input embeddings, also when layers are spread over devices."""
    return model.get_input_embeddings().weight.device


class SplitLM:
    """Backbone and LM head of one causal language model.

    Args:
        model: a causal LM of Transformers, PEFT-wrapped or not.

    Attributes:
        splits: whether the two halves were shown to reproduce the model's own logits. Where not, `project` must not be
            used and the logits come from the model's own forward pass.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> halves = SplitLM(LlamaForCausalLM(config).eval())
        >>> halves.splits, halves.vocab_size
        (True, 64)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = base_causal_lm(model)
        self.backbone: Any = getattr(self.model, self.model.base_model_prefix, None)
        self.head = self.model.get_output_embeddings()
        self.vocab_size = int(self.head.weight.shape[0])
        self._finish = self._find_finish()
        self.splits = self._finish is not None

    def project(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Logits of hidden states, in the head's dtype, exactly as the model itself computes them."""
        assert self._finish is not None
        return self._finish(self.head(hidden))

    @torch.no_grad()
    def _find_finish(self) -> Callable[[Tensor], Tensor] | None:
        if self.backbone is None:
            return None
        modes = [(part, part.training) for part in self.model.modules()]
        self.model.eval()
        try:
            probe = torch.tensor([[0, 1]], device=input_device(self.model)).clamp(max=self.vocab_size - 1)
            expected = self.model(input_ids=probe, use_cache=False).logits.float()
            raw = self.head(self.backbone(input_ids=probe, use_cache=False).last_hidden_state)
        finally:
            for part, mode in modes:
                part.training = mode
        forms = _finishing_forms(text_config(self.model))
        finish = min(forms, key=lambda form: float((form(raw).float() - expected).abs().max()))
        # Same operations on the same values: anything but rounding means another form.
        return finish if torch.allclose(finish(raw).float(), expected, rtol=1e-3, atol=1e-5) else None


def _finishing_forms(config: Any) -> list[Callable[[Tensor], Tensor]]:
    """What the families of Transformers do to the raw projection, the plain form last."""
    forms: list[Callable[[Tensor], Tensor]] = []
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        forms.append(lambda logits: torch.tanh(logits / cap) * cap)
    divisor = getattr(config, "logits_scaling", None)
    if divisor:
        forms.append(lambda logits: logits / divisor)
    scale = getattr(config, "logit_scale", None)
    if scale:
        forms.append(lambda logits: logits * scale)
    return [*forms, lambda logits: logits]
