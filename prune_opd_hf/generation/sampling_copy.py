"""A copy of the student in a shorter dtype, to sample with, kept in step with the weights that are trained.

Weights that are trained are float32, and each decoded token reads all of them: half as many bytes sample faster, where decoding
waits for memory (examples/results/packing).
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.models.lm_head import is_sharded


class SamplingCopy:
    """Makes the copy when it is first asked for, and renews what is trained of it from then on.

    What is shorter already, or no floating-point number, such as quantized weights, is shared. Buffers, such as rotary
    frequencies, and weights that the family keeps in float32 are copied as they are.

    Args:
        dtype: of the copy's weights.

    Example:
        >>> sampling_copy = SamplingCopy(torch.bfloat16)
        >>> model = nn.Linear(4, 2)
        >>> sampling_copy.of(model).weight.dtype, model.weight.dtype, sampling_copy.of(model) is sampling_copy.of(model)
        (torch.bfloat16, torch.float32, True)
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._source: nn.Module | None = None
        self._copy: nn.Module | None = None
        self._copied: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._trained: set[int] = set()
        """Which of them were trainable whenever the copy was asked for: others may be trained later, and these frozen."""

    @torch.no_grad()
    def of(self, model: nn.Module) -> nn.Module:
        """The copy of this model, with the weights that it has now.

        Raises:
            ConfigError: the model is sharded.
        """
        if self._copy is None or self._source is not model:
            self._source, self._copy = model, self._new_copy(model)
        self._trained |= {number for number, (_, weight) in enumerate(self._copied) if weight.requires_grad}
        for number in self._trained:
            own, weight = self._copied[number]
            own.copy_(weight)
        return self._copy

    def _new_copy(self, model: nn.Module) -> nn.Module:
        if is_sharded(model):
            raise ConfigError("rollout_dtype makes a copy of a whole student, and this one is sharded: leave it out")
        made: dict[int, nn.Parameter] = {}
        self._copied, self._trained = [], set()
        for weight, is_kept in _weights(model):
            if not _is_longer(weight, self.dtype):
                made[id(weight)] = weight
                continue
            dtype = weight.dtype if is_kept else self.dtype
            # As if it were trained: with frozen weights torch projects states that are no contiguous block row by row, which took
            # the LM head 140 times as long in bfloat16 on a CPU.
            made[id(weight)] = own = nn.Parameter(weight.detach().to(dtype, copy=True))
            self._copied.append((own, weight))
        return copy.deepcopy(model, made)


def copied_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the copy's own weights."""
    own = [(weight, is_kept) for weight, is_kept in _weights(model) if _is_longer(weight, dtype)]
    return sum(weight.numel() * (weight.element_size() if is_kept else dtype.itemsize) for weight, is_kept in own)


def _is_longer(weight: nn.Parameter, dtype: torch.dtype) -> bool:
    """Whether the copy has this weight in fewer bytes; others are shared."""
    return weight.is_floating_point() and weight.element_size() > dtype.itemsize


def _weights(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Every weight once, and whether the family keeps it in float32."""
    kept = {name for part in model.modules() for name in getattr(part, "_keep_in_fp32_modules_strict", None) or ()}
    for name, weight in model.named_parameters():
        yield weight, bool(kept.intersection(name.split(".")))
