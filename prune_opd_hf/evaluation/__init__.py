r"""Evaluation: benchmarks, grading, scores with intervals, and the report that carries them.

report.py           the record: every number with its interval and what is needed to repeat it
comparison.py       whether two reports differ by more than the noise
statistics.py       avg@k, pass@k, maj@k and their intervals
grading.py          verdicts on responses, by a pool of processes
math_grader/        finding, rewriting and comparing mathematical answers; pure functions of text
"""

from prune_opd_hf.evaluation.comparison import Comparison, Difference, compare_reports
from prune_opd_hf.evaluation.grading import Grader, GradingPool, Verdict
from prune_opd_hf.evaluation.report import BenchmarkResult, EvaluationReport, SamplingSettings
from prune_opd_hf.evaluation.statistics import Estimate

__all__ = [
    "BenchmarkResult",
    "Comparison",
    "Difference",
    "Estimate",
    "EvaluationReport",
    "Grader",
    "GradingPool",
    "SamplingSettings",
    "Verdict",
    "compare_reports",
]
