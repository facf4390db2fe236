"""How often, from where and for how long the traces of the student's cold start leave style A for style B."""

from dataclasses import dataclass

import torch

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.tasks import ChainTask, Problem
from prune_opd_hf.tasks.chain import FILLERS, HESITATION


@dataclass(frozen=True)
class DriftingTask(ChainTask):
    """The embedded task with traces of both styles.

    Attributes:
        operations, operations_min: as for `ChainTask`.
        drift_first: probability that a drifting trace switches to style B at its first opportunity, in [0, 1].
        drift_later: the same for each later opportunity, in [0, 1].
        filler_min, filler_max: bounds of the number of filler words, both included.
        filler_kinds: how many of the words of `FILLERS` are used.

    Raises:
        ConfigError: a value is outside its range.

    Example: 11 operations worked, then HMM, 85 fillers, ANS, digit and end.
        >>> DriftingTask(operations=12).longest_response_tokens
        111
    """

    drift_first: float = 0.8
    drift_later: float = 0.05
    filler_min: int = 40
    filler_max: int = 85
    filler_kinds: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("drift_first", "drift_later"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a probability and must lie in [0, 1], got {getattr(self, name)!r}")
        if not 0 <= self.filler_min <= self.filler_max:
            raise ConfigError(
                f"the fillers need 0 <= filler_min <= filler_max, got {self.filler_min} and {self.filler_max}"
            )
        if not 1 <= self.filler_kinds <= len(FILLERS):
            raise ConfigError(f"filler_kinds must lie in [1, {len(FILLERS)}], got {self.filler_kinds}")

    @property
    def longest_response_tokens(self) -> int:
        """Tokens of the longest response of either style, the end included: a cap for generation."""
        return max(self.clean_response_tokens, 2 * (self.operations - 1) + 1 + self.filler_max + 3)

    @property
    def drifting_share(self) -> float:
        """Expected share of `mixed_traces` that drift: 1 minus the probability of passing every opportunity."""
        lengths = range(self.operations_min or self.operations, self.operations + 1)
        passing = [(1 - self.drift_first) * (1 - self.drift_later) ** (length - 1) for length in lengths]
        return 1 - sum(passing) / len(passing)

    def mixed_traces(self, problems: list[Problem], seed: int | torch.Generator) -> list[str]:
        """A response to each problem, of style A or B: what the student's cold start ends with.

        Before the first operation a trace switches to style B with probability `drift_first`, before each later one with
        `drift_later`.

        Args:
            problems: what to answer.
            seed: a whole number, or a CPU generator, which is advanced.
        """
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        count = len(problems)
        chances = torch.tensor([self.drift_first, *[self.drift_later] * (self.operations - 1)], dtype=torch.float64)
        switches = (torch.rand(count, self.operations, generator=generator, dtype=torch.float64) < chances).tolist()
        lengths = torch.randint(self.filler_min, self.filler_max + 1, (count,), generator=generator).tolist()
        kinds = torch.randint(self.filler_kinds, (count, self.filler_max), generator=generator).tolist()
        return [
            problem.drifting_trace(row.index(True), [FILLERS[kind] for kind in row_kinds[:length]])
            if any(row[: len(problem.operations)])
            else problem.trace
            for problem, row, length, row_kinds in zip(problems, switches, lengths, kinds, strict=True)
        ]


def is_drifting(response: str) -> bool:
    """Whether a response left style A for style B.

    Example:
        >>> is_drifting("+3 7 HMM wait so"), is_drifting("+3 7 x7 9 <eos>")
        (True, False)
    """
    return HESITATION in response.split()
