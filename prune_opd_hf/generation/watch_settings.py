"""The settings of a watch over a generation, and its progress."""

from collections.abc import Callable
from dataclasses import dataclass

from prune_opd_hf.algorithm.drift import DriftConfig
from prune_opd_hf.generation.check_lengths import EveryBlock, GrowingLengths
from prune_opd_hf.teachers.base import Teacher
from prune_opd_hf.teachers.local import LocalTeacher


@dataclass(frozen=True)
class DriftProgress:
    """Where a generation stands after a check, for progress bars.

    Attributes:
        tokens: response tokens of the longest running row so far.
        rows: sequences that were started.
        running_rows, drifted_rows, ended_rows: still generating; stopped by drift; ended otherwise.
        kept_tokens: response tokens kept so far, over all rows.
        discarded_tokens: tokens generated past the end of a drifted row inside a block, over all rows.
    """

    tokens: int
    rows: int
    running_rows: int
    drifted_rows: int
    ended_rows: int
    kept_tokens: int
    discarded_tokens: int


@dataclass(frozen=True)
class WatchSettings:
    """What does not change during a generation.

    Attributes:
        teacher, config, check_every, truncate, on_check: as for `DriftMonitor`.
        eos_token_ids: tokens that end a response.
        pad_token_id: fills the record behind a row's end; None where no padding token is known.
        student: scores the student's side of each block, where it is not observed while sampling.
    """

    teacher: Teacher
    config: DriftConfig
    check_every: int
    truncate: bool
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    student: LocalTeacher | None = None
    on_check: Callable[[DriftProgress], None] | None = None

    def check_lengths(self) -> EveryBlock | GrowingLengths:
        """At which lengths the teacher scores the rows of a new generation."""
        if self.teacher.capabilities.is_incremental:
            return EveryBlock(self.check_every)
        return GrowingLengths(self.config, self.check_every, truncate=self.truncate)
