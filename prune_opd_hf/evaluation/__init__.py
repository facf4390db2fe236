"""Evaluation: benchmarks, grading, scores with intervals, and the report that carries them."""

from prune_opd_hf.evaluation.report import BenchmarkResult, EvaluationReport, SamplingSettings
from prune_opd_hf.evaluation.statistics import Estimate

__all__ = ["BenchmarkResult", "Estimate", "EvaluationReport", "SamplingSettings"]
