"""Grading: verdicts on responses (`verdicts.py`), processes that compare mathematical answers (`pool.py`, `math_grader/`)."""

from prune_opd_hf.evaluation.grading.pool import GraderStartError, GradingPool
from prune_opd_hf.evaluation.grading.verdicts import ChainGrader, Grader, Verdict, score_verdicts

__all__ = ["ChainGrader", "Grader", "GraderStartError", "GradingPool", "Verdict", "score_verdicts"]
