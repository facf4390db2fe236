"""At which lengths a teacher scores the rows of a generation.

A teacher with a KV cache scores every `check_every` tokens: that costs what one pass over the sequence costs. A teacher that reads
a sequence anew each time (a server, which has no prefix cache for scoring) is asked as seldom as the budget below says. Results
do not depend on it; the tokens sampled past a stop do. It knows lengths alone.

    C  tokens read so far, in every pass
    E  tokens of the rows that have ended, prompts included
    F  tokens of the rows that run, which will be read once more at their end
    a further pass over some of them, of n tokens, is made only where  C + n + F <= 2.2 (E + F)

so that no more than 2.2 times the sequences is read in all, unless rows of very different lengths are checked in lockstep and end
right behind a check (2.3 times was found, with prompts of 8 and of 800 tokens).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from prune_opd_hf.algorithm.drift import DriftConfig

MOST_READ = 2.2
"""Tokens read in all, as a multiple of the sequences."""

LEAST_GROWTH = 1.5
"""A sequence is not read again before it is so many times as long as it was."""

NEVER = 2**31
"""Tokens of a block that no row comes to the end of."""


class RowLengths(NamedTuple):
    """Where running rows stand.

    Attributes:
        prompt: tokens of the prompt that the teacher reads.
        scored, pending: response tokens scored so far, and those that are not yet.
        events: drift events among the scored ones.
    """

    prompt: Int[Tensor, " rows"]
    scored: Int[Tensor, " rows"]
    pending: Int[Tensor, " rows"]
    events: Int[Tensor, " rows"]

    @property
    def totals(self) -> Int[Tensor, " rows"]:
        """Tokens of the sequences."""
        return self.prompt + self.scored + self.pending


class EveryBlock:
    """For a teacher whose cost does not depend on lengths. Rows that have ended are scored in any case."""

    def __init__(self, check_every: int) -> None:
        self.check_every = check_every

    def block_width(self, rows: RowLengths) -> int:
        """Tokens of the next block of rows that advance together, none of which has tokens that are not scored."""
        return self.check_every

    def due(self, rows: RowLengths) -> Bool[Tensor, " rows"]:
        """Which of all the rows that run are scored now: those that have come to the next multiple of `check_every`, so that an
        engine that sends a first token by itself stays in step."""
        return (rows.scored + rows.pending) // self.check_every > rows.scored // self.check_every

    def note_read(self, totals: Int[Tensor, " rows"], ended: Bool[Tensor, " rows"]) -> None:
        """Rows of so many tokens each were read, and some of them have ended; nothing depends on it here."""


class GrowingLengths:
    """The same for a teacher that reads each sequence anew.

    Args:
        config: how many drift events use up a row's reliability, and from which length on it may be stopped.
        check_every: new tokens that are worth a pass at least.
        truncate: whether rows are stopped at all; otherwise nothing is scored before a row has ended.

    Example: prompts of 8 tokens. Two rows of 40 may both be read now, and once more when they have become 5 times as long.
        >>> lengths = GrowingLengths(DriftConfig(weight_drop=0.5), check_every=32, truncate=True)
        >>> prompt, none = torch.tensor([8, 8]), torch.tensor([0, 0])
        >>> lengths.due(RowLengths(prompt, none, none + 32, none)).tolist()
        [True, True]
        >>> lengths.note_read(prompt + 32, none.bool())
        >>> 40 + lengths.block_width(RowLengths(prompt, none + 32, none, none))
        200
    """

    def __init__(self, config: DriftConfig, check_every: int, *, truncate: bool) -> None:
        self.check_every, self.least = check_every, config.min_length
        self.needed = config.events_to_exhaustion if truncate else None
        self._read = self._ended = 0

    def block_width(self, rows: RowLengths) -> int:
        """As far as the first row that may be stopped, and as the budget asks where no row ends meanwhile."""
        if self.needed is None or not len(rows.prompt):
            return NEVER
        now, stop = int(rows.totals.sum()), int((self._earliest_stops(rows) - rows.scored).min())
        growth = (LEAST_GROWTH - 1) * now if self._read else 0
        budget = (self._read - MOST_READ * self._ended) / (MOST_READ - 2) - now
        return max(self.check_every, stop, math.ceil(max(growth, budget) / len(rows.prompt) - 1e-6))

    def due(self, rows: RowLengths) -> Bool[Tensor, " rows"]:
        """Those that may be stopped and have grown enough, the most grown first, as far as the budget goes."""
        totals, response = rows.totals, rows.scored + rows.pending
        if self.needed is None:
            return torch.zeros_like(totals, dtype=torch.bool)
        grown = (rows.scored == 0) | (totals >= LEAST_GROWTH * (totals - rows.pending))
        enough = grown & (rows.pending >= self.check_every) & (response >= self._earliest_stops(rows))
        running = int(totals.sum())
        allowed = MOST_READ * (self._ended + running) - running - self._read
        order = (rows.pending * enough).argsort(descending=True, stable=True)
        fits = torch.zeros_like(enough)
        fits[order] = (totals * enough)[order].cumsum(dim=0) <= allowed
        return enough & fits

    def note_read(self, totals: Int[Tensor, " rows"], ended: Bool[Tensor, " rows"]) -> None:
        """Counted as C, and as E."""
        self._read += int(totals.sum())
        self._ended += int(totals[ended].sum())

    def _earliest_stops(self, rows: RowLengths) -> Int[Tensor, " rows"]:
        """Response tokens that each row has at least when drift may stop it."""
        assert self.needed is not None
        return (rows.scored + (self.needed - rows.events).clamp(min=0)).clamp(min=self.least)
