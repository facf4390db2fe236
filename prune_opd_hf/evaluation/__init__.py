r"""Evaluation: benchmarks, grading, scores with intervals, and the report that carries them.

report.py           the record: every number with its interval and what is needed to repeat it
benchmarks.py       the registry, local files, the embedded task
comparison.py       whether two reports differ by more than the noise
runner.py           `evaluate_model`: from a model to a report
subject.py          the model: loading it, its name, the hash of its weights
prompting.py        prompts as token ids, the tokens that end a response
refilling_loop.py   generation whose slots do not idle; the same samples in every batch
continuous_batching.py   generation by Transformers' continuous batching, on GPUs
drawing.py          tokens from logits, with random numbers of each sample's own
processes.py        the processes that `accelerate launch` or `torchrun` started
sample_log.py       samples on disk as they come
commands.py         the command line
scores.py           from verdicts to scores
statistics.py       avg@k, pass@k, maj@k and their intervals
grading.py          verdicts on responses, by a pool of processes
metric/             the `evaluate` metric module
math_grader/        finding, rewriting and comparing mathematical answers; pure functions of text
"""

from prune_opd_hf.evaluation.benchmarks import REGISTRY, Benchmark, load_benchmark
from prune_opd_hf.evaluation.comparison import Comparison, Difference, compare_reports
from prune_opd_hf.evaluation.grading import Grader, GradingPool, Verdict
from prune_opd_hf.evaluation.runner import evaluate_model
from prune_opd_hf.evaluation.scores import Scores, score_verdicts
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
    "SamplingSettings",
    "Scores",
    "Verdict",
    "compare_reports",
    "evaluate_model",
    "load_benchmark",
    "score_verdicts",
]
