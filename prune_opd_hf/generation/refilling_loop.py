"""A decoding loop whose slots do not idle: a row that ends leaves the batch and the KV cache, and the next sample takes its place.

`generate` runs a batch until its longest row has ended. Here new prompts are read in a batch of their own and their cache
is set beside that of the running rows, right ends aligned; samples of one problem share the reading of their prompt. Tokens
are drawn by `draw_tokens` with each sample's own random numbers, so that the samples do not depend on the number of slots, on
the order of the requests or on a restart, up to the rounding of the logits.

Families with other caches are decoded batch by batch. With sliding-window layers rows leave, and new ones wait until all have
left; with recurrent or convolutional layers all stay until the last has ended.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from prune_opd_hf.errors import ConfigError, UnsupportedGenerationError
from prune_opd_hf.generation.draw import draw_tokens, uniform_stream
from prune_opd_hf.generation.requests import Completion, Request
from prune_opd_hf.models.kv_cache import (
    GrowingLayer,
    RowMoves,
    keep_rows_inplace,
    kept_order,
    use_growing_layers_inplace,
)

REFILL_SHARE = 0.125
"""New prompts are read when this share of the slots is free: each reading moves the running rows' cache once."""


def generate_refilling(
    model: PreTrainedModel,
    requests: Sequence[Request],
    settings: Any,
    eos_token_ids: Sequence[int],
    slots: int = 32,
) -> Iterator[Completion]:
    """Generate every request, and yield each sample when it ends.

    Args:
        model: decoder-only, in evaluation mode.
        requests: samples of one prompt should stand side by side, so that they share its reading.
        settings: temperature, top_p, top_k and max_new_tokens are read.
        eos_token_ids: the tokens that end a response.
        slots: rows decoded at a time.

    Raises:
        ConfigError: no slot.
        UnsupportedGenerationError: an encoder-decoder model.
        NonFiniteLogitsError: the model returned NaN or infinite logits.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                                      num_attention_heads=2)).eval()
        >>> from types import SimpleNamespace
        >>> settings = SimpleNamespace(temperature=1.0, top_p=0.95, top_k=0, max_new_tokens=5)
        >>> samples = generate_refilling(model, [Request((5, 6, 7), seed=1), Request((8,), seed=2)], settings, [1], slots=1)
        >>> sorted((sample.request, len(sample.token_ids) <= 5) for sample in samples)
        [(0, True), (1, True)]
    """
    if slots < 1:
        raise ConfigError(f"the loop needs at least 1 slot, got {slots}")
    if model.config.is_encoder_decoder:
        raise UnsupportedGenerationError("evaluation is for decoder-only models; this one is an encoder-decoder")
    loop = _Loop(model, requests, settings, frozenset(eos_token_ids), slots)
    while loop.has_work:
        yield from loop.refill()
        yield from loop.step()


@dataclass
class _Row:
    """A sample that is being generated."""

    request: int
    width: int  # tokens in the cache
    uniforms: Iterator[float]
    token_ids: list[int] = field(default_factory=list)
    ended: bool = False


class _Loop:
    """One generation. Physical rows 0..n-1 of cache and mask belong to `rows`; all end at the same, last column."""

    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        settings: Any,
        eos_token_ids: frozenset[int],
        slots: int,
    ) -> None:
        self.model, self.requests, self.settings = model, requests, settings
        self.eos_token_ids, self.slots = eos_token_ids, slots
        self.waiting = list(range(len(requests)))[::-1]
        self.rows: list[_Row] = []
        self.cache = self._new_cache()
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)
        parameters = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.inputs: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if "logits_to_keep" in parameters:
            self.inputs["logits_to_keep"] = 1
        layers = {type(layer) for layer in self.cache.layers}
        self.can_join = layers <= {DynamicLayer, GrowingLayer}
        self.can_drop = layers <= {DynamicLayer, GrowingLayer, DynamicSlidingWindowLayer}

    @property
    def has_work(self) -> bool:
        return bool(self.rows or self.waiting)

    @torch.no_grad()
    def refill(self) -> list[Completion]:
        """Read new prompts into free slots, if enough are free; samples may end with their first token."""
        finished: list[Completion] = []
        while self.waiting and self._may_refill():
            free = self.slots - len(self.rows)
            taken = [self.waiting.pop() for _ in range(min(free, len(self.waiting)))]
            prompts = [self.requests[request].prompt_ids for request in taken]
            shared = list(dict.fromkeys(prompts)) if self.can_join else prompts
            cache, mask, logits = self._read(shared)
            new = [
                _Row(request, len(prompt), uniform_stream(self.requests[request].seed))
                for request, prompt in zip(taken, prompts, strict=True)
            ]
            sources = [shared.index(prompt) for prompt in prompts] if self.can_join else list(range(len(new)))
            finished += self._append(new, logits[sources])
            kept = [place for place, row in enumerate(new) if not (row.ended and self.can_drop)]
            if kept:
                index = torch.tensor([sources[place] for place in kept], device=logits.device)
                self._join([new[place] for place in kept], cache, mask, index)
            self._forget_ended_batch()
        return finished

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """Decode one token for each row."""
        if not self.rows:
            return []
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)
        last = torch.tensor([[row.token_ids[-1]] for row in self.rows], device=self.model.device)
        inputs = dict(self.inputs)
        if self.takes_positions:
            inputs["position_ids"] = torch.tensor([[row.width] for row in self.rows], device=self.model.device)
        outputs = self.model(input_ids=last, attention_mask=self.mask, past_key_values=self.cache, **inputs)
        for row in self.rows:
            row.width += 1
        finished = self._append(self.rows, outputs.logits[:, -1])
        if finished and self.can_drop:
            self._drop()
        self._forget_ended_batch()
        return finished

    def _may_refill(self) -> bool:
        if not self.rows:
            return True
        return self.can_join and self.slots - len(self.rows) >= max(1, round(self.slots * REFILL_SHARE))

    def _read(self, prompts: list[tuple[int, ...]]) -> tuple[DynamicCache, Tensor, Tensor]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        cache, inputs = self._new_cache(), dict(self.inputs)
        if self.takes_positions:
            inputs["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        outputs = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, **inputs)
        return cache, mask, outputs.logits[:, -1]

    def _append(self, rows: list[_Row], logits: Float[Tensor, "rows vocab"]) -> list[Completion]:
        """Draw and note the next token of each row that has not ended. Returns the samples that end with it."""
        settings = self.settings
        uniforms = torch.tensor([next(row.uniforms) for row in rows], dtype=torch.float64)
        tokens = draw_tokens(
            logits,
            uniforms.to(logits.device),
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
        ).tolist()
        finished = []
        for row, token in zip(rows, tokens, strict=True):
            if row.ended:
                continue
            row.token_ids.append(token)
            by_itself = token in self.eos_token_ids
            row.ended = by_itself or len(row.token_ids) == settings.max_new_tokens
            if row.ended:
                finished.append(Completion(row.request, row.token_ids, by_itself))
        return finished

    def _drop(self) -> None:
        order = kept_order([row.ended for row in self.rows])
        self.rows = [self.rows[place] for place in order]
        if order:
            index = torch.tensor(order, device=self.mask.device)
            moves = RowMoves.to(index)
            keep_rows_inplace(self.cache, index, moves)
            moves.apply_inplace(self.mask)
            self.mask = self.mask[: len(order)]

    def _forget_ended_batch(self) -> None:
        if all(row.ended for row in self.rows):
            self.rows, self.cache, self.mask = [], self._new_cache(), self.mask[:0, :0]

    def _join(self, new: list[_Row], cache: DynamicCache, mask: Tensor, sources: Int[Tensor, " new"]) -> None:
        """Set the new rows below the running ones, all right-aligned, without columns that nobody needs any more."""
        if self.can_join:
            width = max(row.width for row in (*self.rows, *new))
            joined = self._new_cache()
            for layer, running, read in zip(joined.layers, self.cache.layers, cache.layers, strict=True):
                keys, values = read.keys[sources], read.values[sources]
                if self.rows:
                    keys, values = _below(running.keys, keys, width), _below(running.values, values, width)
                layer.update(keys, values)
            self.cache = joined
        else:
            if self.can_drop:
                cache.batch_select_indices(sources)
            self.cache = cache
        mask = mask[sources]
        self.mask = _below(self.mask[..., None], mask[..., None], width)[..., 0] if self.rows else mask
        self.rows += new

    def _new_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        use_growing_layers_inplace(cache)
        return cache


def _below(upper: Tensor, lower: Tensor, width: int) -> Tensor:
    """Two stacks of rows as one, right ends aligned, cut or filled with zeros on the left; shapes (rows, ..., tokens, 1 or dim)."""
    stacked = upper.new_zeros(upper.shape[0] + lower.shape[0], *upper.shape[1:-2], width, upper.shape[-1])
    for first, part in ((0, upper), (upper.shape[0], lower)):
        tokens = min(width, part.shape[-2])
        stacked[first : first + part.shape[0], ..., width - tokens :, :] = part[..., part.shape[-2] - tokens :, :]
    return stacked
