"""The parts of a card that are run: the usage snippet, and the commands that measure its numbers again."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence

from prune_opd_hf.evaluation.benchmarks import BOXED_SUFFIX, CHAIN, CHAIN_PROBLEMS, REGISTRY
from prune_opd_hf.hub.card_template import shell
from prune_opd_hf.hub.hub_ids import is_hub_id
from prune_opd_hf.hub.markdown import Markdown, clean_line, fence
from prune_opd_hf.records.evaluation_report import BenchmarkResult, EvaluationReport

_ENGINES = {"refilling loop": "refilling", "continuous batching": "generate_batch"}
"""What `prune-opd evaluate --engine` calls the engines that reports name; other engines are not its."""


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
    return min(1024, reports[0].sampling.max_new_tokens) if reports else 512


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
        if entry is not None and (result.source, result.prompt_suffix) == (entry.dataset_id, entry.prompt_suffix):
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
    return next((option for words, option in _ENGINES.items() if report.engine.startswith(words)), None)


def _evaluate_command(
    report: EvaluationReport, model: str, results: Sequence[BenchmarkResult], limit: int | None, output: str
) -> str:
    sampling = report.sampling

    def words() -> Iterator[str]:
        yield from ("prune-opd", "evaluate", model, "--benchmarks")
        for result in results:
            yield clean_line(f"{result.name}={result.source}" if _is_file(result) else result.name)
        yield from ("--samples", str(sampling.samples), "--temperature", str(sampling.temperature))
        yield from ("--top-p", str(sampling.top_p), "--top-k", str(sampling.top_k))
        yield from ("--max-new-tokens", str(sampling.max_new_tokens), "--seed", str(sampling.seed))
        if limit is not None:
            yield from ("--limit", str(limit))
        yield from ("--engine", _engine(report) or "auto", "--dtype", clean_line(report.dtype), "--output-dir", output)

    return shlex.join(words())


def literal(value: str) -> str:
    """A string literal that Python reads back as `value`, on one line and without invisible characters."""
    return json.dumps(value) if value.isascii() and value.isprintable() else repr(value)
