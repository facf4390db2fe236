"""The tables of a card's results: this student beside the models it is compared with, and how each number was taken."""

from collections.abc import Mapping, Sequence
from typing import Any

from prune_opd_hf.hub.card_template import duration
from prune_opd_hf.hub.markdown import Markdown, code, table
from prune_opd_hf.hub.results import each_result
from prune_opd_hf.records.evaluation_report import EvaluationReport

STUDENT_COLUMN = "this student"
Comparisons = Mapping[str, Sequence[EvaluationReport]]


def results_table(reports: Sequence[EvaluationReport], comparisons: Comparisons) -> Markdown | None:
    """One row for each metric of this student, one column for each model; copies of a benchmark are told apart."""
    columns = _columns(reports, comparisons)
    keys = dict.fromkeys(
        (result.name, result.content_hash, metric) for _, result in each_result(reports) for metric in result.metrics
    )
    rows = [[key[0], code(key[2]), *[_cell(others, *key) for others in columns.values()]] for key in keys]
    return table(["benchmark", "metric", *columns], rows) if rows else None


def conditions(reports: Sequence[EvaluationReport], comparisons: Comparisons) -> list[dict[str, Any]]:
    """What was asked and how, once for all models that share it."""
    found: dict[Any, dict[str, Any]] = {}
    for column, others in _columns(reports, comparisons).items():
        for report, result in each_result(others):
            key = (result.name, result.source, result.content_hash, result.grader, report.sampling)
            entry = found.setdefault(key, {"columns": [], "result": result, "sampling": report.sampling.describe()})
            entry["columns"].append(column)
    return list(found.values())


def measurements_table(reports: Sequence[EvaluationReport], comparisons: Comparisons) -> Markdown:
    """One row for each model and benchmark: what was measured beside the scores, on what, and when."""
    rows = [
        [
            column,
            result.name,
            code(report.model_hash.removeprefix("sha256:")[:12]),
            f"{100 * result.truncated_share:.1f}%",
            f"{result.mean_response_tokens:.0f}",
            duration(result.wall_seconds),
            f"{report.hardware}, {report.dtype}",
            report.date,
        ]
        for column, others in _columns(reports, comparisons).items()
        for report, result in each_result(others)
    ]
    header = ["model", "benchmark", "weights", "cut at the limit", "tokens a response", "time", "ran on", "date"]
    return table(header, rows)


def _columns(reports: Sequence[EvaluationReport], comparisons: Comparisons) -> dict[str, Sequence[EvaluationReport]]:
    return {STUDENT_COLUMN: reports, **comparisons}


def _cell(reports: Sequence[EvaluationReport], benchmark: str, content_hash: str, metric: str) -> Markdown:
    for _, result in each_result(reports):
        if result.name == benchmark and result.content_hash == content_hash and metric in result.metrics:
            return Markdown(result.metrics[metric])
    return Markdown("not measured")
