"""Evaluation reports as a card and the Hub show them: tables, `model-index`, `.eval_results/*.yaml`, commands that repeat them.

Scores are in percent there. `verified` and its token are never written: they are the Hub's to give.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from prune_opd_hf.evaluation.benchmarks import BOXED, BOXED_SUFFIX, CHAIN, CHAIN_PROBLEMS, REGISTRY
from prune_opd_hf.generation import ENGINES
from prune_opd_hf.hub.client import is_hub_id
from prune_opd_hf.hub.markdown import Markdown, clean_line, code, shell, table
from prune_opd_hf.records.evaluation_report import BenchmarkResult, EvaluationReport
from prune_opd_hf.records.training_figures import duration

STUDENT_COLUMN = "this student"
Comparisons = Mapping[str, Sequence[EvaluationReport]]
REGISTERED_BENCHMARKS = ("MathArena/aime_2026", "MathArena/hmmt_feb_2026")
"""Datasets with an `eval.yaml` that the Hub lists as benchmarks; their task there has the same id."""


def _each_result(reports: Sequence[EvaluationReport]) -> Iterator[tuple[EvaluationReport, BenchmarkResult]]:
    """Every benchmark of every report, with the report that holds its settings."""
    for report in reports:
        for result in report.benchmarks:
            yield report, result


def results_table(reports: Sequence[EvaluationReport], comparisons: Comparisons) -> Markdown | None:
    """One row for each metric of this student, one column for each model; copies of a benchmark are told apart."""
    columns = {STUDENT_COLUMN: reports, **comparisons}
    keys = dict.fromkeys(
        (result.name, result.content_hash, metric) for _, result in _each_result(reports) for metric in result.metrics
    )
    rows = [[key[0], code(key[2]), *[_cell(others, *key) for others in columns.values()]] for key in keys]
    return table(["benchmark", "metric", *columns], rows) if rows else None


def _cell(reports: Sequence[EvaluationReport], benchmark: str, content_hash: str, metric: str) -> Markdown:
    results = [result for _, result in _each_result(reports) if metric in result.metrics]
    found = [result for result in results if (result.name, result.content_hash) == (benchmark, content_hash)]
    return Markdown("; ".join(str(result.metrics[metric]) for result in found) or "not measured")


def conditions(reports: Sequence[EvaluationReport], comparisons: Comparisons) -> list[dict[str, Any]]:
    """What was asked and how, once for all models that share it."""
    found: dict[Any, dict[str, Any]] = {}
    for column, others in {STUDENT_COLUMN: reports, **comparisons}.items():
        for report, result in _each_result(others):
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
        for column, others in {STUDENT_COLUMN: reports, **comparisons}.items()
        for report, result in _each_result(others)
    ]
    header = ["model", "benchmark", "weights", "truncated", "tokens a response", "time", "ran on", "date"]
    return table(header, rows)


def _percent(share: float) -> float:
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
            metric_value=_percent(estimate.value),
            metric_args={
                "interval_95": [_percent(estimate.low), _percent(estimate.high)],
                "problems": result.problems,
                "num_generations": result.num_generations,
                "temperature": report.sampling.temperature,
                "top_p": report.sampling.top_p,
                "top_k": report.sampling.top_k,
                "max_completion_length": report.sampling.max_completion_length,
                "seed": report.sampling.seed,
            },
        )
        for report, result in _each_result(reports)
        for metric, estimate in result.metrics.items()
    ]


def eval_results_files(reports: Sequence[EvaluationReport]) -> dict[str, str]:
    """`.eval_results/*.yaml` for those benchmarks that the Hub has registered, by path in the repository.

    The value is avg@k, the mean accuracy of one sample.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for report, result in _each_result(reports):
        metric = f"avg@{result.num_generations}"
        if result.source in REGISTERED_BENCHMARKS and metric in result.metrics:
            entry = EvalResultEntry(
                dataset_id=result.source,
                task_id=result.source,
                value=_percent(result.metrics[metric].value),
                dataset_revision=result.revision,
                date=report.date,
                notes=f"{metric}; {report.sampling.describe()}; graded by {clean_line(result.grader)}",
            )
            entries.setdefault(f".eval_results/{result.source.replace('/', '--')}.yaml", []).append(entry)
    return {path: yaml_dump(eval_result_entries_to_yaml(found), sort_keys=False) for path, found in entries.items()}


def repeat_commands(
    reports: Sequence[EvaluationReport], repo_id: str | None, comparisons: Comparisons
) -> Markdown | None:
    """The commands that measure the scores again: this student's, and those of compared models that are on the Hub."""
    others = [report for reports in comparisons.values() for report in reports if is_hub_id(report.model_name)]
    models = [*((report, repo_id or ".") for report in reports), *((report, report.model_name) for report in others)]
    lines: list[str] = []
    number = 0
    for report, model in models:
        for options, results in _by_options(report).items():
            number += 1
            for result in filter(_is_file, results):
                lines.append(f"# {clean_line(result.source)} is the file with content {result.content_hash[7:19]}")
            lines.append(_evaluate_command(report, model, results, dict(options), f"repeated/{number}"))
    return shell("\n".join(lines)) if lines else None


def unrepeatable(reports: Sequence[EvaluationReport], comparisons: Comparisons) -> dict[str, str]:
    """Benchmarks with scores that no command of this package measures again, and what measured them."""
    return {
        result.name: report.engine
        for others in (reports, *comparisons.values())
        for report, result in _each_result(others)
        if not any(result in results for results in _by_options(report).values())
    }


def _by_options(report: EvaluationReport) -> dict[tuple[tuple[str, Any], ...], list[BenchmarkResult]]:
    """The results that `prune-opd evaluate` can repeat, by the options that they need: a limit, a suffix, template settings."""
    found: dict[tuple[tuple[str, Any], ...], list[BenchmarkResult]] = {}
    for result in report.benchmarks if report.engine in ENGINES else ():
        entry, suffix = REGISTRY.get(result.name), ""
        if entry is not None and result.source == entry.dataset_id:
            whole, suffix = entry.problems, BOXED_SUFFIX
        elif result.name == CHAIN and not result.prompt_suffix:
            whole = CHAIN_PROBLEMS
        elif _is_file(result):
            whole = result.problems  # unless it was limited, which the report of a file does not tell
        else:
            continue
        options: dict[str, Any] = {} if result.problems == whole else {"limit": result.problems}
        if result.prompt_suffix != suffix:
            options["prompt-suffix"] = BOXED if result.prompt_suffix == BOXED_SUFFIX else result.prompt_suffix
        if "{" in result.prompt_form:
            options["chat-template-kwargs"] = result.prompt_form[result.prompt_form.index("{") :]
        if clean_line(result.prompt_suffix) == result.prompt_suffix:
            found.setdefault(tuple(options.items()), []).append(result)
    return found


def _is_file(result: BenchmarkResult) -> bool:
    return result.source.endswith((".json", ".jsonl"))


def _evaluate_command(
    report: EvaluationReport,
    model: str,
    results: Sequence[BenchmarkResult],
    options: Mapping[str, Any],
    output_dir: str,
) -> str:
    sampling = report.sampling
    settings = {
        "num-generations": sampling.num_generations,
        "temperature": sampling.temperature,
        "top-p": sampling.top_p,
        "top-k": sampling.top_k,
        "max-completion-length": sampling.max_completion_length,
        "seed": sampling.seed,
        **options,
        "engine": report.engine,
        "dtype": clean_line(report.dtype),
        "output-dir": output_dir,
    }
    benchmarks = [clean_line(f"{each.name}={each.source}" if _is_file(each) else each.name) for each in results]
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return shlex.join(["prune-opd", "evaluate", model, "--benchmarks", *benchmarks, *words])
