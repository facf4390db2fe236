"""Evaluation reports in the two forms that the Hub reads: the card's `model-index` and `.eval_results/*.yaml`.

Scores are in percent there. `verified` and its token are never written: they are the Hub's to give.
"""

from collections.abc import Iterator, Sequence

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from prune_opd_hf.hub.markdown import clean_line
from prune_opd_hf.records.evaluation_report import BenchmarkResult, EvaluationReport

REGISTERED_BENCHMARKS = {
    "MathArena/aime_2026": "MathArena/aime_2026",
    "MathArena/hmmt_feb_2026": "MathArena/hmmt_feb_2026",
}
"""Datasets with an `eval.yaml` that the Hub lists as benchmarks, and the id of their task there."""


def each_result(reports: Sequence[EvaluationReport]) -> Iterator[tuple[EvaluationReport, BenchmarkResult]]:
    """Every benchmark of every report, with the report that holds its settings."""
    for report in reports:
        for result in report.benchmarks:
            yield report, result


def percent(share: float) -> float:
    """A share in [0, 1] in percent, rounded to what its interval can carry."""
    return round(100 * share, 2)


def model_index_results(reports: Sequence[EvaluationReport]) -> list[EvalResult]:
    """One entry for each metric, with its interval and the sampling settings as its arguments."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=clean_line(result.source),
            dataset_name=clean_line(result.name),
            dataset_revision=result.revision,
            metric_type="accuracy",
            metric_name=clean_line(metric),
            metric_value=percent(estimate.value),
            metric_args={
                "interval_95": [percent(estimate.low), percent(estimate.high)],
                "problems": result.problems,
                "samples": result.samples,
                "temperature": report.sampling.temperature,
                "top_p": report.sampling.top_p,
                "top_k": report.sampling.top_k,
                "max_new_tokens": report.sampling.max_new_tokens,
                "seed": report.sampling.seed,
            },
        )
        for report, result in each_result(reports)
        for metric, estimate in result.metrics.items()
    ]


def eval_results_files(reports: Sequence[EvaluationReport]) -> dict[str, str]:
    """`.eval_results/*.yaml` for those benchmarks that the Hub has registered, by path in the repository.

    The value is avg@k, the mean accuracy of one sample.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for report, result in each_result(reports):
        task = REGISTERED_BENCHMARKS.get(result.source)
        metric = f"avg@{result.samples}"
        if task is None or metric not in result.metrics:
            continue
        entry = EvalResultEntry(
            dataset_id=result.source,
            task_id=task,
            value=percent(result.metrics[metric].value),
            dataset_revision=result.revision,
            date=report.date,
            notes=f"{metric}; {report.sampling.describe()}; graded by {clean_line(result.grader)}",
        )
        entries.setdefault(result.source, []).append(entry)
    return {
        f".eval_results/{source.replace('/', '--')}.yaml": yaml_dump(
            eval_result_entries_to_yaml(found), sort_keys=False
        )
        for source, found in entries.items()
    }
