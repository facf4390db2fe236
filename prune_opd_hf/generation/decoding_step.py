"""The student's forward pass over one new token a row, without what `model(...)` does anew at every call.

A decoding step of a small model is mostly calls of Python and torch around little arithmetic. For models whose code is
Transformers' own and which two probes show to be backbone and LM head and nothing else, the step calls these two, and where
all attention is full it hands over the attention mask ready-made, as `generate` itself does for static caches. Hooks anywhere in
the model, a replaced, patched or compiled `forward`, sharded weights and models that fail a probe are called as a whole. Accelerate
replaces `forward` as well, to add autocast: the step adds that itself.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules import module as modules
from transformers import DynamicCache

from prune_opd_hf.errors import UnsupportedGenerationError
from prune_opd_hf.models.kv_cache import (
    JoinedRows,
    RowMoves,
    can_join,
    join_caches,
    keep_rows_inplace,
    use_growing_layers_inplace,
)
from prune_opd_hf.models.lm_head import BackboneAndHead, LogitTransform, evaluating, forward_context, text_config


class DecodingStep:
    """Reads tokens into a cache and returns the logits that follow.

    Args:
        model: a decoder-only causal LM.

    Attributes:
        mask: of whole sequences, in the form that this model takes best: rows first, columns last. None without padding. Rows
            of it that have ended are left behind the others.
        copies_prompts: whether every prompt that was read has to go through `add_rows`.
    """

    copies_prompts = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.context, self.autocast = forward_context(model), autocast_around(model) or nullcontext()
        parameters = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.whole: dict[str, Any] = {"return_dict": True}  # what the model as a whole takes beside its inputs
        if "logits_to_keep" in parameters:
            self.whole["logits_to_keep"] = 1
        with self.autocast:
            self.parts = _parts(model) if self.context is torch.inference_mode else None
        self.cache = new_cache(model)
        self.mask: Tensor | None = None
        takes_ready = can_join(self.cache) and self.takes_positions  # all attention is full
        self.form = ready_form(self.parts.backbone) if self.parts is not None and takes_ready else None
        self.copies = self.parts is not None and type(self.parts.lm_head) is not nn.Linear
        self.no_mask = {"full_attention": None} if self.form == "by kind of layer" else None

    def use(self, cache: DynamicCache, mask: Int[Tensor, "rows columns"] | None, *, max_length: int) -> None:
        """Go on with these rows.

        Args:
            cache: of their sequences.
            mask: over what it holds, 1 on tokens; None where nothing is padded.
            max_length: columns that their sequences may come to.
        """
        self.cache, self.mask = cache, None
        if mask is not None:
            rows, columns = mask.shape
            self.mask = torch.cat([mask, mask.new_ones(rows, max_length - columns)], dim=1)
            if self.form is not None:
                self.mask = self.mask.bool()[:, None, None]

    def add_rows(
        self,
        running: Int[Tensor, "rows columns"],
        cache: DynamicCache,
        mask: Int[Tensor, "prompts prompt"],
        lines: Int[Tensor, " new"],
        *,
        least_columns: int = 0,
    ) -> JoinedRows:
        """Set prompts that were read below the running rows, right ends aligned.

        Args:
            running: mask over what the cache of the running rows holds; of no rows where none are running.
            cache, mask: of the prompts.
            lines: which prompt each new row has.
            least_columns: so many are kept, needed or not.

        Returns:
            The cache to go on with, see `use`, and its mask.
        """
        with self.context():
            upper = self.cache if len(running) else new_cache(self.model), running
            return join_caches(new_cache(self.model), upper, (cache, mask), lines, least_columns=least_columns)

    def keep_rows_inplace(self, order: Int[Tensor, " kept"], moves: RowMoves) -> None:
        """Keep these rows, in this order; `moves` is `RowMoves.to(order)`."""
        if self.mask is not None:
            moves.apply_inplace(self.mask)
        if len(order):
            with self.context():
                keep_rows_inplace(self.cache, order, moves)

    @torch.no_grad()
    def read(self, inputs: dict[str, Any], device: torch.device) -> Float[Tensor, "rows vocab"]:
        """Read prompts as `prepare_inputs_for_generation` made them; the logits after the last column, float32.

        Raises:
            UnsupportedGenerationError: the model ignores the cache.
        """
        with self.context():
            outputs = self.model(**{**inputs, **self.whole})
        if getattr(outputs, "past_key_values", None) is not inputs["past_key_values"]:
            raise UnsupportedGenerationError(
                f"{type(self.model).__name__} does not use the KV cache that it is given, so it cannot be compacted: use plain "
                "generate with the monitor's processor and criterion"
            )
        # A copy, so that the logits of a whole prompt are freed and processors may change what they get.
        return outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=device)

    @torch.no_grad()
    def next(
        self, token_ids: Int[Tensor, "rows 1"], positions: Int[Tensor, "rows 1"], length: int, device: torch.device
    ) -> Float[Tensor, "rows vocab"]:
        """Read one more token of each row that is left; the logits that follow, float32, free to be changed.

        Args:
            token_ids, positions: the tokens and their positions.
            length: columns of the sequences, this one included.
            device: of the logits.
        """
        inputs: dict[str, Any] = {"input_ids": token_ids, "past_key_values": self.cache, "use_cache": True}
        inputs["attention_mask"] = self.no_mask if self.mask is None else self.mask[: len(token_ids), ..., :length]
        if self.takes_positions:
            inputs["position_ids"] = positions
        if self.parts is None:
            with self.context():
                logits = self.model(**inputs, **self.whole).logits[:, -1]
            return logits.to(copy=True, dtype=torch.float32, device=device)
        with self.autocast:
            with self.context():
                hidden = self.parts.backbone(**inputs).last_hidden_state[:, -1]
            # Projected outside of inference mode, so the logits are an ordinary tensor; another head may answer into a buffer.
            logits = self.parts.project(hidden)
        return logits.to(copy=self.copies, dtype=torch.float32, device=device)


def new_cache(model: Any) -> DynamicCache:
    """An empty cache, for prompts that are about to be read."""
    cache = DynamicCache(config=text_config(model))
    use_growing_layers_inplace(cache)
    return cache


def _parts(model: Any) -> BackboneAndHead | None:
    """Backbone and head where calling them is all that calling the model does."""
    if not (is_of_transformers(model) and is_bare(model)):
        return None
    try:
        now = _circumstances(model)
        before = _found.get(model)
        parts = BackboneAndHead(model, None if before is None or before[0] != now else before[1])
    except Exception:  # whatever a model that is put together in another way raises at the probe
        return None
    if not (parts.separable and parts.model is model and is_of_transformers(parts.backbone)):
        return None
    _found[model] = now, parts.transform
    return parts


_found: WeakKeyDictionary[nn.Module, tuple[list[Any], LogitTransform]] = WeakKeyDictionary()
"""What the probe found of a model, and when that holds; each generation asks again."""


def _circumstances(model: Any) -> list[Any]:
    """All that what a family of Transformers does behind its backbone can depend on: its class, its head, and the numbers that
    model, backbone and config hold."""
    backbone = getattr(model, model.base_model_prefix)
    holders = (model, backbone, text_config(model))
    numbers = [
        (name, value) for part in holders for name, value in vars(part).items() if isinstance(value, int | float)
    ]
    return [type(model), type(backbone), ref(model.get_output_embeddings()), *numbers]


def is_of_transformers(part: nn.Module) -> bool:
    """Whether its forward pass is code that Transformers ships, not a subclass's, a patch or code from the Hub: those may do
    more than a probe sees."""
    return inspect.unwrap(type(part).forward).__module__.startswith("transformers.models.")


def is_bare(model: nn.Module) -> bool:
    """Whether nothing but Accelerate's autocast is wrapped around the model's call, nor anything hooked to any of its parts."""
    replaced = "forward" in vars(model) and autocast_around(model) is None
    return not (replaced or getattr(model, "_compiled_call_impl", None) is not None or has_hooks(model))


def autocast_around(model: nn.Module) -> AbstractContextManager | None:
    """The autocast that Accelerate has replaced a model's `forward` by, around its own; None where it has not."""
    in_float32 = getattr(vars(model).get("forward"), "__wrapped__", None)
    cast: Any = getattr(in_float32, "__wrapped__", None)
    is_own = type(in_float32) is ConvertOutputsToFp32 and getattr(cast, "__wrapped__", None) is type(model).forward
    # A copy, since one that is entered twice does not end.
    return copy(inspect.getclosurevars(cast).nonlocals.get("autocast_instance")) if is_own else None


def has_hooks(model: nn.Module) -> bool:
    """Whether something is called with a part of the model, or with any module. What gradient checkpointing of adapters hooks to
    the embeddings does nothing without gradient."""
    found = [*modules._global_forward_hooks.values(), *modules._global_forward_pre_hooks.values()]
    for part in model.modules():
        found += [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    return any(not getattr(hook, "__name__", "").startswith("make_inputs_require_grad") for hook in found)


_ready_forms: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def ready_form(backbone: Any) -> str | None:
    """How this model takes masks made beforehand, where all its attention is full; None where it wants to make them itself."""
    config = backbone.config
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = any(getattr(config, name, None) is not None for name in ("sliding_window", "attention_chunk_size"))
    if config._attn_implementation != "sdpa" or (kinds - {"full_attention"} if kinds else windowed):
        return None
    if backbone not in _ready_forms:
        if kinds and _agrees(backbone, by_kind=True):
            _ready_forms[backbone] = "by kind of layer"
        else:
            _ready_forms[backbone] = "four axes" if _agrees(backbone, by_kind=False) else None
    return _ready_forms[backbone]


@torch.no_grad()
def _agrees(backbone: Any, *, by_kind: bool) -> bool:
    """Whether a ready mask does what the ordinary one does, found on two tokens, the first of which is padding."""
    device = backbone.get_input_embeddings().weight.device
    tokens = ordinary = torch.tensor([[0, 1]], device=device)  # two different ones
    ready: Any = torch.eye(2, dtype=torch.bool, device=device)[None, None]
    hidden = []
    with evaluating(backbone):
        for mask in (ordinary, {"full_attention": ready} if by_kind else ready):
            try:
                outputs = backbone(
                    input_ids=tokens,
                    position_ids=torch.arange(2, device=device)[None],
                    attention_mask=mask,
                    use_cache=False,
                )
            except Exception:  # whatever a family raises at a mask that it does not know
                return False
            hidden.append(outputs.last_hidden_state[:, -1])
    return torch.equal(*hidden)
