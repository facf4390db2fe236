"""Drawing tokens by inverse transform: one random number a row, where `torch.multinomial` makes one for every token.

With V ids the cost falls from V random numbers to a sum over V. And because a row needs exactly one number at each step, every
row has a stream of its own (`UniformStreams`): what it draws depends neither on the other rows of its batch nor on which of
them are still there, nor on when it joined them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

DIRECT_IDS = 2048
"""Up to so many ids the cumulative sum runs over all of them; beyond, over groups and then inside the group that was hit."""

GROUP_IDS = 256

STREAM_STEPS = 64
"""Random numbers of a row are made for so many steps at once."""


def sum_dtype(device: torch.device) -> torch.dtype:
    """What sums and random numbers are held in: float64, which Apple's GPUs do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def inverse_transform(
    probabilities: Float[Tensor, "rows vocab"], uniforms: Float[Tensor, " rows"]
) -> Int[Tensor, " rows"]:
    """The first id of each row at which the cumulative probability exceeds the row's random number.

    The tail of a large vocabulary keeps its mass: cumulative sums run in float64 where the device has it, over groups of
    ids whose own sums are in the dtype of the probabilities. An id of probability 0 is never returned.

    Args:
        probabilities: not negative; their sum may be anything above 0.
        uniforms: in [0, 1), in `sum_dtype(device)`: for every t, (1 - eps / 2) t rounds to less than t.

    Returns:
        Ids; for a row with NaN, in place of an error that would have to wait for the device, the size of the vocabulary.
    """
    vocabulary = probabilities.shape[-1]
    dtype = sum_dtype(probabilities.device)
    if vocabulary <= DIRECT_IDS:
        cumulative = probabilities.cumsum(dim=-1, dtype=dtype)
        targets = uniforms * cumulative[:, -1]
        return torch.searchsorted(cumulative, targets.unsqueeze(-1), right=True).squeeze(-1)
    whole = vocabulary // GROUP_IDS * GROUP_IDS
    sums = [probabilities[:, :whole].unflatten(-1, (-1, GROUP_IDS)).sum(dim=-1)]
    if whole < vocabulary:
        sums.append(probabilities[:, whole:].sum(dim=-1, keepdim=True))
    cumulative = torch.cat(sums, dim=-1).cumsum(dim=-1, dtype=dtype)
    targets = (uniforms * cumulative[:, -1]).unsqueeze(-1)
    group = torch.searchsorted(cumulative, targets, right=True).clamp(max=cumulative.shape[-1] - 1)
    before = torch.where(group > 0, cumulative.gather(-1, (group - 1).clamp(min=0)), 0.0)
    ids = group * GROUP_IDS + torch.arange(GROUP_IDS, device=probabilities.device)
    inside = torch.where(ids < vocabulary, probabilities.gather(-1, ids.clamp(max=vocabulary - 1)), 0.0)
    inner = inside.cumsum(dim=-1, dtype=dtype)
    # Group sums are rounded to float32: where the rest lies above the inner sum, its last step upwards is meant.
    last = (inner < inner[:, -1:]).sum(dim=-1, keepdim=True)
    place = torch.minimum(torch.searchsorted(inner, targets - before, right=True), last)
    drawn = torch.where(targets.isnan(), vocabulary, group * GROUP_IDS + place)
    return drawn.squeeze(-1)


class UniformStreams:
    """Random numbers in [0, 1), one for each row and step, each row's from a seed of its own.

    Args:
        device: of the numbers. They are made on the host, the same on every machine, for `STREAM_STEPS` steps at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._dtype = device, sum_dtype(device)
        self._generators: list[torch.Generator] = []
        self._numbers = torch.zeros(STREAM_STEPS, 0, dtype=self._dtype, device=device)
        self._step = 0

    def add(self, seeds: Sequence[int]) -> None:
        """Further rows, behind those that are there."""
        new = [torch.Generator().manual_seed(seed) for seed in seeds]
        left = STREAM_STEPS - self._step
        numbers = pad(self._draw(new, left), (0, 0, self._step, 0))
        self._numbers = torch.cat([self._numbers, self._to_device(numbers)], dim=1)
        self._generators += new

    def keep_rows(self, order: Int[Tensor, " kept"]) -> None:
        """Only these rows, in this order."""
        self._numbers = self._numbers[:, order]
        self._generators = [self._generators[row] for row in order.tolist()]

    def next(self) -> Float[Tensor, " rows"]:
        """The next number of each row."""
        if self._step == STREAM_STEPS:
            self._numbers, self._step = self._to_device(self._draw(self._generators, STREAM_STEPS)), 0
        self._step += 1
        return self._numbers[self._step - 1]

    @staticmethod
    def _draw(generators: Sequence[torch.Generator], steps: int) -> Tensor:
        drawn = [torch.rand(steps, generator=generator, dtype=torch.float64, device="cpu") for generator in generators]
        return torch.stack(drawn, dim=1) if drawn else torch.zeros(steps, 0, dtype=torch.float64, device="cpu")

    def _to_device(self, numbers: Tensor) -> Tensor:
        largest = 1 - torch.finfo(self._dtype).eps  # a shorter dtype may round to 1
        return numbers.to(self._device, self._dtype).clamp(max=largest)
