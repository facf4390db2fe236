"""Evaluation reports in the two forms that the Hub reads: the card's `model-index` and `.eval_results/*.yaml`.

Scores are in percent there. `verified` and its token are never written: they are the Hub's to give.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from prune_opd_hf.evaluation.benchmarks import BOXED_SUFFIX, CHAIN, CHAIN_PROBLEMS, REGISTRY
from prune_opd_hf.hub.client import is_hub_id
from prune_opd_hf.hub.markdown import Markdown, clean_line, code, fence, table
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
                "num_generations": result.num_generations,
                "temperature": report.sampling.temperature,
                "top_p": report.sampling.top_p,
                "top_k": report.sampling.top_k,
                "max_completion_length": report.sampling.max_completion_length,
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
        metric = f"avg@{result.num_generations}"
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


_ENGINES = ("continuous_batching", "loop")
"""The engines of `prune-opd evaluate`; reports by others cannot be repeated with it."""


def snippet(repo_id: str | None, prompt: str | None, max_new_tokens: int, *, chat: bool) -> Markdown:
    """Code that loads the student with plain Transformers and asks it one thing; names enter as Python literals."""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"name = {literal(repo_id or '.')}",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")',
        "",
    ]
    lines.append(f"prompt = {literal(prompt or 'What is 12 * 34?')}")
    if chat:
        lines += [
            'messages = [{"role": "user", "content": prompt}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        lines += ['inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)']
    lines += [
        f"output = model.generate(**inputs, max_new_tokens={max_new_tokens})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return fence("\n".join(lines), "python")


def snippet_length(reports: Sequence[EvaluationReport]) -> int:
    """How many tokens the snippet allows: what the student was evaluated with, within reason."""
    return min(1024, reports[0].sampling.max_completion_length) if reports else 512


def repeat_commands(
    reports: Sequence[EvaluationReport],
    repo_id: str | None,
    comparisons: Mapping[str, Sequence[EvaluationReport]],
) -> Markdown | None:
    """The commands that measure the scores again: this student's, and those of compared models that are on the Hub."""
    subjects = [(report, repo_id or ".") for report in reports]
    subjects += [
        (report, report.model_name)
        for others in comparisons.values()
        for report in others
        if is_hub_id(report.model_name)
    ]
    lines: list[str] = []
    number = 0
    for report, model in subjects:
        for limit, results in _by_limit(report).items():
            number += 1
            files = [result for result in results if _is_file(result)]
            lines += [
                f"# {clean_line(item.source)} is the file with content {item.content_hash[7:19]}" for item in files
            ]
            lines.append(_evaluate_command(report, model, results, limit, f"repeated/{number}"))
    return shell("\n".join(lines)) if lines else None


def unrepeatable(
    reports: Sequence[EvaluationReport], comparisons: Mapping[str, Sequence[EvaluationReport]]
) -> dict[str, str]:
    """Benchmarks with scores that no command of this package measures again, and what measured them."""
    everything = [*reports, *(report for others in comparisons.values() for report in others)]
    return {
        result.name: report.engine
        for report in everything
        for result in report.benchmarks
        if not any(result in results for results in _by_limit(report).values())
    }


def _by_limit(report: EvaluationReport) -> dict[int | None, list[BenchmarkResult]]:
    """The results that `prune-opd evaluate` can repeat, by the number of problems that it has to be limited to."""
    found: dict[int | None, list[BenchmarkResult]] = {}
    if _engine(report) is None:
        return found
    for result in report.benchmarks:
        entry = REGISTRY.get(result.name)
        if entry is not None and (result.source, result.prompt_suffix) == (entry.dataset_id, BOXED_SUFFIX):
            whole = entry.problems
        elif result.name == CHAIN and not result.prompt_suffix:
            whole = CHAIN_PROBLEMS
        elif _is_file(result):
            whole = result.problems  # unless it was limited, which the report of a file does not tell
        else:
            continue
        found.setdefault(None if result.problems == whole else result.problems, []).append(result)
    return found


def _is_file(result: BenchmarkResult) -> bool:
    return result.source.endswith((".json", ".jsonl")) and result.prompt_suffix == BOXED_SUFFIX


def _engine(report: EvaluationReport) -> str | None:
    return report.engine if report.engine in _ENGINES else None


def _evaluate_command(
    report: EvaluationReport, model: str, results: Sequence[BenchmarkResult], limit: int | None, output: str
) -> str:
    sampling = report.sampling

    def words() -> Iterator[str]:
        yield from ("prune-opd", "evaluate", model, "--benchmarks")
        for result in results:
            yield clean_line(f"{result.name}={result.source}" if _is_file(result) else result.name)
        yield from ("--num-generations", str(sampling.num_generations), "--temperature", str(sampling.temperature))
        yield from ("--top-p", str(sampling.top_p), "--top-k", str(sampling.top_k))
        yield from ("--max-completion-length", str(sampling.max_completion_length), "--seed", str(sampling.seed))
        if limit is not None:
            yield from ("--limit", str(limit))
        yield from ("--engine", _engine(report) or "auto", "--dtype", clean_line(report.dtype), "--output-dir", output)

    return shlex.join(words())


def literal(value: str) -> str:
    """A string literal that Python reads back as `value`, on one line and without invisible characters."""
    return json.dumps(value) if value.isascii() and value.isprintable() else repr(value)


def shell(command: str) -> Markdown:
    """Commands as a block, one a line."""
    return fence("\n".join(map(clean_line, command.splitlines())), "bash")


def duration(seconds: int | float) -> str:
    """A duration in the largest unit that it fills.

    Example:
        >>> duration(42.0), duration(600.0), duration(18000.0)
        ('42.0 s', '10.0 min', '5.0 h')
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
