"""The decoding step compiled by `torch.compile`, over a KV cache of fixed shape.

A decoding step of a small model is mostly calls of Python and torch. Compiled it is a few kernels, on CUDA one graph. That asks
for a cache that stays where it is: each row has a slot, and its tokens lie in the columns of their positions.

    slot 0   p p p r r r . .      p prompt, r response, . hidden by the mask
    slot 1   p r r . . . . .      a row that joins moves no other

A step computes as many slots as the next power of two, and as many columns as the next multiple of 32, 256 on an accelerator:
shapes that are new are not compiled again, but a CUDA graph holds for one of them.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._dynamo import mark_static_address, maybe_mark_dynamic
from torch._dynamo.exc import TorchDynamoException
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from prune_opd_hf.errors import ConfigError, UnsupportedGenerationError
from prune_opd_hf.generation.decoding_step import (
    DecodingStep,
    has_hooks,
    is_bare,
    is_of_transformers,
    new_cache,
    ready_form,
)
from prune_opd_hf.models.kv_cache import JoinedRows, RowMoves, can_join, join_caches
from prune_opd_hf.models.lm_head import base_causal_lm, input_device, text_config
from prune_opd_hf.records.files import first_line

WITHOUT = "leave out compile_decoding"


class StepCompiler:
    """Compiles the decoding step of a model when it is first asked for, and keeps it with its cache.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                                      num_attention_heads=2))
        >>> compiler = StepCompiler()
        >>> compiler.of(model) is compiler.of(model)
        True
    """

    def __init__(self) -> None:
        self._step: CompiledDecodingStep | None = None
        self._made_for: Any = None

    def of(self, model: nn.Module) -> "CompiledDecodingStep":
        """The compiled step of this model.

        Raises:
            ConfigError: no compiler works here.
            UnsupportedGenerationError: a model whose step cannot be compiled.
        """
        # Accelerate replaces `forward` when training begins; the cache has the weights' dtype and device.
        now = vars(model).get("forward"), model.get_input_embeddings().weight.dtype, input_device(model)
        if self._step is None or self._step.model is not model or self._made_for != now:
            self._step, self._made_for = CompiledDecodingStep(model), now
        return self._step

    def close(self) -> None:
        """Let go of the step and its cache."""
        self._step = self._made_for = None

    @contextmanager
    def lent(self, model: nn.Module, slots: int, columns: int) -> Iterator["CompiledDecodingStep"]:
        """The step for one generation of so many rows at a time and so many tokens a sequence; its cache serves one at a time."""
        step = self.of(model)
        if step.is_busy:
            raise UnsupportedGenerationError(
                f"another generation with the same compiled step is under way: read it to its end first, or {WITHOUT}"
            )
        step.is_busy = True
        try:
            step.begin(slots, columns)
            yield step
        finally:
            step.is_busy = False


class CompiledDecodingStep(DecodingStep):
    """A `DecodingStep` that is kept from one generation to the next; each calls `begin` first.

    Args:
        model: a causal LM whose layers are all full attention, in "sdpa", on one device, PEFT-wrapped or not.

    Raises:
        ConfigError: no compiler works here.
        UnsupportedGenerationError: another kind of model.
    """

    copies_prompts = True

    def __init__(self, model: nn.Module) -> None:
        self._look_at(model)
        _check_compiler(input_device(model))
        self.is_busy = False
        self.slots = self.columns = 0
        self.fixed = _FixedCache(model)
        self._compiled: Callable[..., Tensor] = torch.compile(self._logits, mode=_mode(input_device(model)))

    def begin(self, slots: int, columns: int) -> None:
        """A new generation.

        Args:
            slots: rows at a time.
            columns: tokens of a sequence at most.

        Raises:
            UnsupportedGenerationError: the model cannot be compiled any more.
        """
        self._look_at(self.model)
        device = input_device(self.model)
        self.step_columns = 32 if device.type == "cpu" else 256
        columns = -(-columns // self.step_columns) * self.step_columns
        if slots > self.slots or columns > self.columns:
            # Two rows at least: a single one would be compiled for itself.
            self.slots, self.columns = max(slots, self.slots, 2), max(columns, self.columns)
            self.fixed.make_room(self.slots, self.columns)
        self.fixed.clear()  # what failed before may have left NaN, which no mask hides
        self.ids, self.places = (torch.zeros(self.slots, 1, dtype=torch.long, device=device) for _ in range(2))

    def _look_at(self, model: nn.Module) -> None:
        """What may change between generations: hooks, adapters, a head that was replaced."""
        super().__init__(model)
        self.form, self.no_mask = _form(model, self), None
        if "forward" in vars(model):  # Accelerate's, whose autocast is compiled with it
            self.parts = None

    def add_rows(
        self, running: Tensor, cache: DynamicCache, mask: Tensor, lines: Tensor, *, least_columns: int = 0
    ) -> JoinedRows:
        """The rows' keys and values go to slots of their own; the cache that is returned holds nothing."""
        self.fixed.write(cache, mask, lines, first=len(running))
        empty, above, below = (new_cache(self.model) for _ in range(3))
        with self.context():
            return join_caches(empty, (above, running), (below, mask), lines, least_columns=least_columns)

    def keep_rows_inplace(self, order: Tensor, moves: RowMoves) -> None:
        """Keep these rows, in this order."""
        for buffer in self.fixed.buffers():
            moves.apply_inplace(buffer)

    def use(self, cache: DynamicCache, mask: Tensor | None, *, max_length: int) -> None:
        """Go on; which columns count follows from the positions."""
        self.cache, self.mask = cache, None

    @torch.no_grad()
    def next(
        self, token_ids: Int[Tensor, "rows 1"], positions: Int[Tensor, "rows 1"], length: int, device: torch.device
    ) -> Float[Tensor, "rows vocab"]:
        """Read one more token of each row; the logits that follow."""
        rows = len(token_ids)
        self.ids[:rows], self.places[:rows] = token_ids, positions
        computed = min(self.slots, max(2, 1 << (rows - 1).bit_length()))
        columns = min(self.columns, -(-length // self.step_columns) * self.step_columns)
        window = torch.arange(columns, device=self.ids.device)
        given = self.ids[:computed], self.places[:computed]
        for part in (*given, window):
            maybe_mark_dynamic(part, 0)
        if self.ids.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        try:
            # Not in inference mode: a CUDA graph recorded there can keep others from being recorded (pytorch/pytorch#135892).
            logits = self._compiled(*given, window)
        except TorchDynamoException as error:
            raise UnsupportedGenerationError(
                f"the decoding step of {type(self.model).__name__} cannot be compiled: {first_line(error)}; {WITHOUT}"
            ) from error
        except RuntimeError as error:
            if "index out of bounds" not in str(error):
                raise
            raise IndexError(first_line(error)) from error  # what an embedding raises that is not compiled
        return logits[:rows].to(copy=True, dtype=torch.float32, device=device)

    def _logits(self, ids: Tensor, positions: Tensor, window: Tensor) -> Tensor:
        self.fixed.positions, self.fixed.width = positions, len(window)
        mask: Any = (window <= positions)[:, None, None]
        if self.form == "by kind of layer":
            mask = {"full_attention": mask}
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "past_key_values": self.fixed}
        if self.parts is not None:
            hidden = self.parts.backbone(**inputs, use_cache=True).last_hidden_state[:, -1]
            return self.parts.transform(self.parts.lm_head(hidden))
        return self.model(**inputs, **self.whole, use_cache=True).logits[:, -1]


class _FixedCache(DynamicCache):
    """Keys and values by slot and position; a pass writes one token a row at `positions` and reads the first `width` columns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(config=text_config(model))
        self.layers: list[Any] = [_FixedLayer(self) for _ in self.layers]
        self.positions, self.width = torch.zeros(0, 1, dtype=torch.long), 0

    def buffers(self) -> list[Tensor]:
        """Of all layers that hold any."""
        return [buffer for layer in self.layers for buffer in layer.fixed]

    def make_room(self, slots: int, columns: int) -> None:
        """Forget everything; the buffers are made when it is known what they hold."""
        self.slots, self.columns = slots, columns
        for layer in self.layers:
            layer.fixed = ()

    def clear(self) -> None:
        """Zero all that is held."""
        for buffer in self.buffers():
            buffer.zero_()

    def write(self, cache: DynamicCache, mask: Int[Tensor, "prompts prompt"], lines: Tensor, *, first: int) -> None:
        """Keys and values of prompts, padded on the left, to the slots from `first` on."""
        width = mask.shape[1]
        index = (torch.arange(width, device=mask.device) + width - mask.sum(dim=-1, keepdim=True)).clamp(max=width - 1)
        for read, layer in zip(cache.layers, self.layers, strict=True):
            if not layer.fixed:
                with torch.inference_mode(False):  # one generation may be asked for in that mode, and the next outside
                    # A column more than any window, which is then no whole buffer: that would be compiled for itself.
                    layer.fixed = tuple(
                        states.new_zeros(self.slots, states.shape[1], self.columns + 1, states.shape[3])
                        for states in (read.keys, read.values)
                    )
                for buffer in layer.fixed:
                    mark_static_address(buffer, guard=False)
                    maybe_mark_dynamic(buffer, (0, 2))
            for states, buffer in zip((read.keys, read.values), layer.fixed, strict=True):
                aligned = states.gather(2, index[:, None, :, None].expand(states.shape))
                buffer[first : first + len(lines), :, :width] = aligned[lines]


class _FixedLayer(DynamicLayer):
    """One layer of it."""

    def __init__(self, owner: _FixedCache) -> None:
        super().__init__()
        self.owner = owner
        self.fixed: tuple[Tensor, ...] = ()

    def get_seq_length(self) -> int:
        return 0  # positions are given

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write one token a row, shapes (rows, heads, 1, head dim). Returns the columns of the pass."""
        rows = torch.arange(len(key_states), device=key_states.device)
        for buffer, states in zip(self.fixed, (key_states, value_states), strict=True):
            buffer[rows, :, self.owner.positions[:, 0]] = states[:, :, 0]
        keys, values = (buffer[: len(key_states), :, : self.owner.width] for buffer in self.fixed)
        return keys, values


def _form(model: Any, step: DecodingStep) -> str:
    """How the model takes a ready mask."""
    base = base_causal_lm(model)
    if step.context is not torch.inference_mode:
        obstacle = "its weights are sharded"
    elif len({parameter.device for parameter in model.parameters()}) > 1:
        obstacle = "its weights lie on several devices"
    elif not is_of_transformers(base):
        obstacle = "its code is not Transformers' own"
    elif has_hooks(model):
        obstacle = "hooks are attached to it"
    elif not (is_bare(model) or hasattr(model, "_original_forward")):  # Accelerate's, which adds autocast
        obstacle = "its forward is replaced or compiled"
    elif not (can_join(new_cache(model)) and "position_ids" in inspect.signature(base.forward).parameters):
        obstacle = "its layers are not all full attention"
    else:
        form = ready_form(getattr(base, base.base_model_prefix))
        if form is not None:
            return form
        attention = text_config(base)._attn_implementation
        obstacle = f"its attention, {attention!r}, takes no ready mask (load it with attn_implementation='sdpa')"
    raise UnsupportedGenerationError(
        f"the decoding step of {type(base).__name__} cannot be compiled: {obstacle}; {WITHOUT}"
    )


def _mode(device: torch.device) -> str:
    """Of `torch.compile`: CUDA graphs where there are any."""
    return "reduce-overhead" if device.type == "cuda" else "default"


def _check_compiler(device: torch.device) -> None:
    """Compile something small, so that a missing C++ compiler or Triton shows before work is spent."""
    try:
        torch.compile(torch.neg, mode=_mode(device))(torch.zeros(2, device=device))
    except (TorchDynamoException, RuntimeError) as error:
        raise ConfigError(
            f"torch.compile does not work here: {first_line(error)}. Install a C++ compiler, on a GPU Triton, or {WITHOUT}"
        ) from error
