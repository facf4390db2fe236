"""A KV cache for rows of different lengths: each row has a slot, and a pass reads and extends any of them.

    slot 0   a b c d e           a pass over slots 0 and 2, two and one new tokens:
    slot 1   k l                     a b c d e F G
    slot 2   x y z                   . . . x y z W      right ends aligned, so that an ordinary mask describes it

Only the rows of a pass are copied, one layer at a time. Sliding layers keep every token here, and the mask hides the old ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from prune_opd_hf.models.kv_cache import SPARE_TOKENS
from prune_opd_hf.models.lm_head import text_config

SPARE_SLOTS = 8


class SlotCache(DynamicCache):
    """Keys and values of rows of different lengths.

    Args:
        model: whose rows these are.
        device: of the token ids.

    Attributes:
        lengths: tokens that each slot holds.
        read: slot and position of every column of the pass under way, for each row.
        fresh, written: row and column of its new tokens among the input ids, and slot and position where they are kept.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(config=text_config(model))
        self.layers: list[Any] = [_SlotLayer(self) for _ in range(len(self))]
        self.lengths: Int[Tensor, " slots"] = torch.zeros(0, dtype=torch.long, device=device)
        self._free: list[int] = []
        self.past = 0

    def new_slots(self, count: int) -> list[int]:
        """Empty slots, those that were freed before others."""
        missing = count - len(self._free)
        if missing > 0:
            known = len(self.lengths)
            self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(missing + SPARE_SLOTS)])
            self._free += range(known, len(self.lengths))
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def free(self, slots: Sequence[int]) -> None:
        """Forget what these slots hold."""
        self.lengths[list(slots)] = 0
        self._free += slots

    def begin_pass(self, slots: Int[Tensor, " rows"], new: Int[Tensor, " rows"]) -> Int[Tensor, "rows columns"]:
        """What the next forward pass reads and extends.

        Args:
            slots: one for each row.
            new: tokens that each row gets, the last ones of its line of input ids.

        Returns:
            the mask over old and new columns, 1 on tokens.
        """
        totals, width = self.lengths[slots] + new, int(new.max())
        columns = int(totals.max())
        index = torch.arange(columns, device=totals.device) + (totals - columns).unsqueeze(-1)
        self.past, self.read = columns - width, (slots.unsqueeze(-1), index.clamp(min=0))
        line, column = self.fresh = (index[:, self.past :] >= self.lengths[slots].unsqueeze(-1)).nonzero(as_tuple=True)
        self.written = slots[line], index[line, self.past + column]
        self.lengths[slots] = totals
        return (index >= 0).long()


class _SlotLayer(DynamicLayer):
    """One layer; `owner` says what the pass reads."""

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self.owner = owner
        self._buffers: tuple[Tensor, ...] = ()

    def get_seq_length(self) -> int:
        return self.owner.past

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the tokens of the pass, shapes (rows, heads, new, head dim). Returns all keys and values of its rows."""
        owner, device = self.owner, key_states.device
        read, fresh, written = (
            tuple(part.to(device) for part in index) for index in (owner.read, owner.fresh, owner.written)
        )
        states = [values.transpose(1, 2) for values in (key_states, value_states)]
        self._make_room(states, read[1].shape[1])
        for buffer, values in zip(self._buffers, states, strict=True):
            buffer[written] = values[fresh]
        keys, values = (buffer[read].transpose(1, 2) for buffer in self._buffers)
        return keys, values

    def _make_room(self, states: list[Tensor], tokens: int) -> None:
        if not self._buffers:
            self._buffers = tuple(values.new_zeros(0, 0, *values.shape[2:]) for values in states)
        slots, room = self._buffers[0].shape[:2]
        if slots >= len(self.owner.lengths) and room >= tokens:
            return
        wider = room if room >= tokens else max(tokens + SPARE_TOKENS, room * 5 // 4)
        grown = []
        for buffer in self._buffers:
            more = buffer.new_zeros(len(self.owner.lengths), wider, *buffer.shape[2:])
            more[:slots, :room] = buffer
            grown.append(more)
        self._buffers = tuple(grown)


def has_slots(model: nn.Module) -> bool:
    """Whether this model's rows may be kept in slots: all its layers are attention to keys and values, their own or an earlier
    layer's (Gemma 3n)."""
    kinds = DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicLayer)  # not yet in 5.17
    layers = DynamicCache(config=text_config(model)).layers
    return bool(layers) and all(type(layer) in kinds for layer in layers)
