"""The student's forward pass over one new token a row, without what `model(...)` does anew at every call.

A decoding step of a small model is mostly calls of Python and torch around little arithmetic. Where it makes no difference
to the logits, the step here goes straight to the backbone and the LM head, and hands over the attention mask ready-made, as
`generate` itself does for static caches. Everything that could make a difference (hooks, a replaced or compiled `forward`,
sharded weights, padding, sliding windows, a family unknown to the probes) goes through `model(...)`.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from prune_opd_hf.errors import UnsupportedGenerationError
from prune_opd_hf.inference import forward_context
from prune_opd_hf.lm_head import SplitLM, input_device, text_config

_takes_ready_masks: dict[type[nn.Module], bool] = {}


class DecodingStep:
    """Reads tokens into a cache and returns the logits that follow.

    Args:
        model: a decoder-only causal LM.
        padded: whether the prompts have padding, so that every pass needs an attention mask.

    Example: the logits after a prompt of three tokens and one more are those of the whole sequence.
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model, cache, ids = LlamaForCausalLM(config).eval(), DynamicCache(config=config), torch.tensor([[5, 6, 7, 8]])
        >>> step = DecodingStep(model, padded=False)
        >>> first = step.read({"input_ids": ids[:, :3], "past_key_values": cache, "use_cache": True}, ids.device)
        >>> logits = step.next(ids[:, 3:], torch.tensor([3]), None, cache, ids.device)
        >>> torch.allclose(logits, model(ids).logits[:, -1], atol=1e-5)
        True
    """

    def __init__(self, model: Any, *, padded: bool) -> None:
        self.model = model
        self.context = forward_context(model)
        parameters = inspect.signature(model.forward).parameters
        self.inputs: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if "logits_to_keep" in parameters:
            self.inputs["logits_to_keep"] = 1
        self.takes_positions = "position_ids" in parameters
        self.halves = _halves(model) if self.context is torch.inference_mode else None
        if self.halves is not None:
            self.inputs = {"use_cache": True}
        self.ready_mask = None if padded or self.halves is None else _ready_mask(self.halves.backbone, model)

    def read(self, inputs: dict[str, Any], device: torch.device) -> Float[Tensor, "rows vocab"]:
        """Read prompts as `prepare_inputs_for_generation` made them; the logits after the last column, float32."""
        with self.context():
            logits = self.model(**{**inputs, "return_dict": True}).logits
        # A copy, so that the logits of a whole prompt are freed and processors may change what they get.
        return logits[:, -1].to(copy=True, dtype=torch.float32, device=device)

    def next(
        self,
        token_ids: Int[Tensor, "rows 1"],
        positions: Int[Tensor, " rows"],
        mask: Int[Tensor, "rows columns"] | None,
        cache: DynamicCache,
        device: torch.device,
    ) -> Float[Tensor, "rows vocab"]:
        """Read one more token a row; the logits that follow, float32, free to be changed."""
        inputs = dict(self.inputs)
        inputs["input_ids"], inputs["past_key_values"] = token_ids, cache
        inputs["attention_mask"] = mask if self.ready_mask is None else self.ready_mask
        if self.takes_positions:
            inputs["position_ids"] = positions.unsqueeze(-1)
        if self.halves is None:
            with self.context():
                logits = self.model(**inputs).logits[:, -1]
            return logits.to(copy=True, dtype=torch.float32, device=device)
        with self.context():
            hidden = self.halves.backbone(**inputs).last_hidden_state[:, -1]
        # Projected outside of inference mode, so the logits are an ordinary tensor without being copied.
        return self.halves.project(hidden).to(dtype=torch.float32, device=device)


def _halves(model: Any) -> SplitLM | None:
    """Backbone and head where calling them is all that calling the model does."""
    replaced = "forward" in vars(model) or "__call__" in vars(model)
    if replaced or model._forward_hooks or model._forward_pre_hooks:
        return None
    try:
        halves = SplitLM(model)
    except UnsupportedGenerationError:
        return None
    return halves if halves.splits and halves.model is model else None


def _ready_mask(backbone: nn.Module, model: Any) -> dict[str, None] | None:
    """The mask of a decoding step without padding, by kind of layer: none. None where the family makes its own."""
    kinds = set(getattr(text_config(model), "layer_types", None) or ())
    if kinds != {"full_attention"} or not getattr(model, "_can_compile_fullgraph", False):
        return None
    if type(backbone) not in _takes_ready_masks:
        _takes_ready_masks[type(backbone)] = _agree_on_ready_masks(backbone, input_device(model))
    return {"full_attention": None} if _takes_ready_masks[type(backbone)] else None


@torch.no_grad()
def _agree_on_ready_masks(backbone: Any, device: torch.device) -> bool:
    """Whether this family takes masks by kind of layer, found on one token: Transformers does not say."""
    token = torch.tensor([[0]], device=device)
    try:
        given = backbone(input_ids=token, attention_mask={"full_attention": None}, use_cache=False).last_hidden_state
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        return False
    return torch.equal(given, backbone(input_ids=token, use_cache=False).last_hidden_state)
