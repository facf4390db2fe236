"""Seconds of a step of rollouts as a function of its tokens, fitted to the blocks of one generation.

    student's seconds = prompt + a * positions + b * sampled tokens       a: what a decoding step costs whatever its rows
    teacher's seconds = prompt + c * blocks    + d * sampled tokens
    update's seconds  = e * kept tokens

Non-negative least squares over the blocks. Where every block has the same number of rows, a and b cannot be told apart; the
fit then gives all to one of them, and projections for fewer rows are too good or too bad. Estimates, not promises.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from prune_opd_hf.errors import InputError
from prune_opd_hf.preflight.replay import TokenBill


@dataclass(frozen=True)
class BlockTime:
    """How long one block of `check_every` positions took.

    Attributes:
        first: whether it is the first of its generation, which also reads the prompts.
        positions: decoding steps.
        tokens: tokens sampled by all rows.
        student_seconds, teacher_seconds: apart.
    """

    first: bool
    positions: int
    tokens: int
    student_seconds: float
    teacher_seconds: float


@dataclass(frozen=True)
class StepCost:
    """The fitted costs in seconds.

    Attributes:
        prompt_student, prompt_teacher: of reading the prompts of one generation.
        per_position, per_token: of the student.
        per_block, per_scored_token: of the teacher.
        per_kept_token: of the update; None where it was not measured.
        fit_error: mean absolute error of the fit over the blocks, as a share of their mean.
    """

    prompt_student: float
    prompt_teacher: float
    per_position: float
    per_token: float
    per_block: float
    per_scored_token: float
    per_kept_token: float | None
    fit_error: float

    @classmethod
    def fit(cls, blocks: Sequence[BlockTime], per_kept_token: float | None = None) -> "StepCost":
        """Fit the costs to the blocks of one or more generations.

        Raises:
            InputError: no blocks.

        Example: 1 ms a position and 10 µs a token for the student, 2 ms a block and 5 µs a token for the teacher.
            >>> blocks = [BlockTime(False, 8, 8 * rows, 8e-3 + 8e-5 * rows, 2e-3 + 4e-5 * rows) for rows in (1, 5, 9, 16)]
            >>> cost = StepCost.fit(blocks)
            >>> round(cost.per_position, 6), round(cost.per_token, 8), round(cost.per_block, 6), round(cost.per_scored_token, 8)
            (0.001, 1e-05, 0.002, 5e-06)
        """
        if not blocks:
            raise InputError("the cost of a step needs at least one timed block")
        later = [block for block in blocks if not block.first] or list(blocks)
        positions = np.array([block.positions for block in later], dtype=float)
        tokens = np.array([block.tokens for block in later], dtype=float)
        student = np.array([block.student_seconds for block in later])
        teacher = np.array([block.teacher_seconds for block in later])
        (per_position, per_token), _ = nnls(np.stack([positions, tokens], axis=1), student)
        (per_block, per_scored_token), _ = nnls(np.stack([np.ones_like(tokens), tokens], axis=1), teacher)
        fitted = per_position * positions + per_token * tokens + per_block + per_scored_token * tokens
        measured = student + teacher
        error = float(np.abs(fitted - measured).mean() / max(measured.mean(), 1e-12))
        first = [block for block in blocks if block.first]
        beyond_student = [
            block.student_seconds - per_position * block.positions - per_token * block.tokens for block in first
        ]
        beyond_teacher = [block.teacher_seconds - per_block - per_scored_token * block.tokens for block in first]
        return cls(
            prompt_student=max(0.0, float(np.mean(beyond_student))) if first else 0.0,
            prompt_teacher=max(0.0, float(np.mean(beyond_teacher))) if first else 0.0,
            per_position=float(per_position),
            per_token=float(per_token),
            per_block=float(per_block),
            per_scored_token=float(per_scored_token),
            per_kept_token=per_kept_token,
            fit_error=error,
        )

    def seconds(self, bill: TokenBill, check_every: int) -> float:
        """Projected seconds of one generation with this bill and its share of the update, where that was measured.

        Example: 2 decoding steps of 3 rows, in one block: 2 x .1 + 6 x .01 + .5 + 6 x .02, and 4 kept tokens at .25.
            >>> cost = StepCost(0.0, 0.0, 0.1, 0.01, 0.5, 0.02, 0.25, 0.0)
            >>> round(cost.seconds(TokenBill(sampled=6, kept=4, live_rows=(3, 3)), check_every=2), 6)
            1.88
        """
        positions = len(bill.live_rows)
        student = self.prompt_student + self.per_position * positions + self.per_token * bill.sampled
        blocks = math.ceil(positions / check_every)
        teacher = self.prompt_teacher + self.per_block * blocks + self.per_scored_token * bill.sampled
        return student + teacher + (self.per_kept_token or 0.0) * bill.kept
