"""Evaluation: benchmarks, samples, grading, scores with intervals, and the report that carries them.

evaluate.py         `evaluate_model`: from a model to a report
benchmarks.py       the registry, local files, the embedded task
evaluated_model.py  loading the model, what identifies it, a benchmark's prompts as its token ids
sample_log.py       samples on disk as they come
grading/            verdicts on responses, by a pool of processes, and the scores that follow
comparison.py       whether two reports differ by more than the noise
metric/             the `evaluate` metric module
"""

from prune_opd_hf.evaluation.benchmarks import REGISTRY, Benchmark, load_benchmark
from prune_opd_hf.evaluation.comparison import Comparison, Difference, compare_reports
from prune_opd_hf.evaluation.evaluate import evaluate_model
from prune_opd_hf.evaluation.grading import Grader, GradingPool, Scores, Verdict, score_verdicts
from prune_opd_hf.evaluation.sample_log import Sample, read_samples
from prune_opd_hf.records.evaluation_report import BenchmarkResult, EvaluationReport, SamplingSettings
from prune_opd_hf.records.statistics import Estimate

__all__ = [
    "REGISTRY",
    "Benchmark",
    "BenchmarkResult",
    "Comparison",
    "Difference",
    "Estimate",
    "EvaluationReport",
    "Grader",
    "GradingPool",
    "Sample",
    "SamplingSettings",
    "Scores",
    "Verdict",
    "compare_reports",
    "evaluate_model",
    "load_benchmark",
    "read_samples",
    "score_verdicts",
]
