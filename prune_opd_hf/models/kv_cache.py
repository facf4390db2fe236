"""A KV cache that grows without copying itself at every token, and whose rows can be removed at the price of one row.

Transformers' dynamic layer concatenates keys and values at each step: at batch 32 and 256 tokens that moves the whole cache
once a token. Here the buffers have spare room at their end, and a row that is removed is replaced by the last one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

SPARE_TOKENS = 128


class GrowingLayer(DynamicLayer):
    """Keys and values of one full-attention layer, in buffers with spare room; `keys` and `values` are views of them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append tokens; shapes (rows, heads, new tokens, head dim). Returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = tuple(
                states.new_empty(*states.shape[:2], 0, states.shape[-1]) for states in (key_states, value_states)
            )
            self._length = 0
        (rows, _, new), expected = key_states.shape[:3], self._buffers[0].shape[0]
        if rows != expected:
            raise ValueError(f"the cache holds {expected} rows, and got keys and values of {rows}")
        needed = self._length + new
        if needed > self._buffers[0].shape[-2]:
            room = max(needed + SPARE_TOKENS, needed * 5 // 4)
            self._buffers = tuple(_with_room(buffer[:, :, : self._length], room) for buffer in self._buffers)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer.narrow(2, self._length, new).copy_(states)
        self._length = needed
        self._show()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Int[Tensor, " kept"]) -> None:
        """Keep these rows, in this order; a row that stays where it is costs nothing."""
        self.move_rows_inplace(RowMoves.to(beam_idx))

    def move_rows_inplace(self, moves: "RowMoves") -> None:
        """The same, where it is known which rows move."""
        if not self.is_initialized or self._length == 0:  # as in Transformers, an empty layer has no rows
            return
        for buffer in self._buffers:
            moves.apply_inplace(buffer.narrow(2, 0, self._length))
        self._buffers = tuple(buffer[: moves.kept] for buffer in self._buffers)
        self._show()

    def batch_select_indices(self, indices: Int[Tensor, " kept"]) -> None:
        """The same under its other name."""
        self.reorder_cache(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; as in Transformers the number is negative."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number, the tokens to remove; got {tokens_to_remove}")
        if self.is_initialized:
            self._length = max(self._length + tokens_to_remove, 0)
            self._show()

    def _show(self) -> None:
        self.keys, self.values = (buffer.narrow(2, 0, self._length) for buffer in self._buffers)


def _with_room(states: Tensor, room: int) -> Tensor:
    grown = states.new_empty(*states.shape[:2], room, states.shape[-1])
    grown[:, :, : states.shape[-2]] = states
    return grown


def use_growing_layers_inplace(cache: DynamicCache) -> None:
    """Replace the plain dynamic layers of a cache that holds nothing yet; one that is moved off the device stays as it is."""
    if getattr(cache, "offloading", False):
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = GrowingLayer()


def kept_order(leaving: list[bool]) -> list[int]:
    """Which row stands where once the leaving ones are gone: freed places are taken by the last rows."""
    staying = len(leaving) - sum(leaving)
    late = [row for row in range(len(leaving) - 1, staying - 1, -1) if not leaving[row]]
    return [late.pop(0) if leaving[row] else row for row in range(staying)]


@dataclass(frozen=True)
class RowMoves:
    """What happens to the rows of several tensors at once: row `sources[i]` goes to `places[i]`, and the first `kept` stay."""

    kept: int
    places: Int[Tensor, " moved"]
    sources: Int[Tensor, " moved"]

    @classmethod
    def to(cls, order: Int[Tensor, " kept"]) -> "RowMoves":
        """The moves after which row i holds what row `order[i]` held."""
        places = (order != torch.arange(len(order), device=order.device)).nonzero().squeeze(-1)
        return cls(len(order), places, order[places])

    def apply_inplace(self, values: Tensor) -> None:
        """Move the rows of a tensor; a row that stays where it is costs nothing."""
        if len(self.places):
            places, sources = self.places.to(values.device), self.sources.to(values.device)
            values.index_copy_(0, places, values.index_select(0, sources))


def keep_rows_inplace(cache: DynamicCache, order: Int[Tensor, " kept"], moves: RowMoves) -> None:
    """Keep these rows of every layer, in this order; `moves` is `RowMoves.to(order)`."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.move_rows_inplace(moves)
        else:
            layer.reorder_cache(order)


def can_join(cache: DynamicCache) -> bool:
    """Whether rows of this kind of cache may join those of another: all its layers keep every token."""
    return bool(cache.layers) and all(type(layer) in (DynamicLayer, GrowingLayer) for layer in cache.layers)


class JoinedRows(NamedTuple):
    """Rows of two caches as one, and their mask."""

    cache: DynamicCache
    mask: Int[Tensor, "rows columns"]


def join_caches(
    empty: DynamicCache,
    upper: tuple[DynamicCache, Tensor],
    lower: tuple[DynamicCache, Tensor],
    lower_rows: Int[Tensor, " new"] | None = None,
    *,
    least_columns: int = 0,
) -> JoinedRows:
    """Set the rows of one cache below those of another, right ends aligned, without columns that no row needs any more.

        upper  . a b c d        a b c d
        lower      . x y   ->   . . x y        (. is masked)

    Args:
        empty: a fresh cache of the same model, which takes the rows.
        upper, lower: each a cache that `can_join`, and its mask over the tokens that it holds, shape (rows, columns).
        lower_rows: which rows of the lower cache join, some perhaps several times (one prompt, several responses); all by default.
        least_columns: so many are kept, needed or not.

    Returns:
        The cache and the mask over what it holds, 1 on tokens.
    """
    picked = lower[1] if lower_rows is None else lower[1][lower_rows]
    masks = [mask[:, int((~mask.bool().any(dim=0)).long().cumprod(dim=0).sum()) :] for mask in (upper[1], picked)]
    width = max(least_columns, *(mask.shape[1] for mask in masks))
    for layer, above, below in zip(empty.layers, upper[0].layers, lower[0].layers, strict=True):
        if above.is_initialized or below.is_initialized:
            rows = len(masks[0]), len(masks[1])
            joined = [
                _stack(getattr(above, name, None), getattr(below, name, None), lower_rows, rows, width)
                for name in ("keys", "values")
            ]
            layer.update(*joined)
    aligned = [pad(mask, (width - mask.shape[1], 0)) for mask in masks]
    return JoinedRows(empty, torch.cat(aligned))


def _stack(
    above: Tensor | None, below: Tensor | None, below_rows: Tensor | None, rows: tuple[int, int], width: int
) -> Tensor:
    """States of shape (rows, heads, tokens, dim) as one, right ends aligned; a part that holds nothing yet is all padding."""
    if below is not None and below_rows is not None:
        below = below[below_rows]
    some = above if above is not None else below
    assert some is not None
    stacked = some.new_zeros(sum(rows), some.shape[1], width, some.shape[-1])
    for part, lines in ((above, slice(rows[0])), (below, slice(rows[0], None))):
        if part is not None:
            tokens = min(width, part.shape[-2])
            stacked[lines, :, width - tokens :] = part[:, :, part.shape[-2] - tokens :]
    return stacked
