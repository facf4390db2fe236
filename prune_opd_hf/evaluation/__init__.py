"""Evaluation: benchmarks, samples, grading, scores with intervals, and the report that carries them."""

from prune_opd_hf.evaluation.benchmarks import REGISTRY, Benchmark, load_benchmark
from prune_opd_hf.evaluation.comparison import compare_reports
from prune_opd_hf.evaluation.evaluate import evaluate_model
from prune_opd_hf.evaluation.grading import Grader, GradingPool, Verdict, score_verdicts
from prune_opd_hf.evaluation.sample_log import read_samples
from prune_opd_hf.records.evaluation_report import BenchmarkResult, EvaluationReport, SamplingSettings
from prune_opd_hf.records.statistics import Estimate

__all__ = [
    "REGISTRY",
    "Benchmark",
    "BenchmarkResult",
    "Estimate",
    "EvaluationReport",
    "Grader",
    "GradingPool",
    "SamplingSettings",
    "Verdict",
    "compare_reports",
    "evaluate_model",
    "load_benchmark",
    "read_samples",
    "score_verdicts",
]
