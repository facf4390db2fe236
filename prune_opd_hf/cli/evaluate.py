"""The command line of evaluation: `prune-opd evaluate` and `prune-opd report`. Thin over `evaluate_model` and reports."""

import itertools
import re
from dataclasses import dataclass
from typing import Literal

from prune_opd_hf.cli.parser import LoadingArguments, VLLMArguments
from prune_opd_hf.errors import ConfigError
from prune_opd_hf.records.evaluation_report import EvaluationReport
from prune_opd_hf.records.files import read_json
from prune_opd_hf.records.settings import NEEDED, setting


@dataclass(frozen=True)
class EvaluateArguments(LoadingArguments, VLLMArguments):
    """Arguments of `prune-opd evaluate`."""

    model: str = setting(
        NEEDED, "Hub id or folder of the model or of an adapter; 'embedded' for the student of the embedded task"
    )
    benchmarks: list[str] = setting(
        NEEDED,
        "any of amc23, aime24, aime25, hmmt24, hmmt25, math500, chain; paths of JSON or JSON-lines files with prompt "
        "and answer; or name=path",
    )
    num_generations: int = setting(16, "samples for each problem")
    temperature: float = setting(1.0, "0 is greedy decoding")
    top_p: float = setting(0.95, "nucleus mass; 1 switches it off")
    top_k: int = setting(0, "0 switches it off")
    max_completion_length: int = setting(31744, "tokens; longer responses are cut and count as truncated")
    seed: int = setting(0, "the samples repeat for the same seed (on a GPU: see --engine)")
    output_dir: str = setting(
        "evaluation",
        "samples, graded.jsonl (with golds, answers and verdicts), report.json and report.md go here; a killed run "
        "continues here",
    )
    engine: str = setting(
        "auto",
        "continuous_batching (of Transformers), loop (the same samples for any batch and after a restart), vllm, or "
        "auto: the first on a GPU, else the loop",
    )
    slots: int = setting(32, "rows that the loop decodes at a time")
    limit: int | None = setting(None, "take the first so many problems of each benchmark only")
    prompt_suffix: str | None = setting(
        None,
        "appended to each problem; boxed asks for reasoning and a boxed answer, '' is none. By default the named "
        "benchmarks are asked with boxed, files as they stand",
    )
    chat_template_kwargs: str | None = setting(
        None, "for the tokenizer's chat template, as JSON: '{\"enable_thinking\": false}'"
    )


def evaluate(arguments: EvaluateArguments) -> int:
    """Run the evaluation, print the table and where it lies. Returns the exit code."""
    from accelerate import PartialState

    from prune_opd_hf.evaluation.evaluate import evaluate_model
    from prune_opd_hf.generation import VLLMSettings
    from prune_opd_hf.tasks import EMBEDDED, resolve_embedded

    settings = {**vars(arguments), "dtype": arguments.dtype or "auto"}
    model, quiet = settings.pop("model"), settings.pop("quiet")
    mode, url = settings.pop("vllm_mode"), settings.pop("vllm_server_base_url")
    settings["vllm"] = VLLMSettings.of(mode=mode, server_base_url=url)
    if arguments.chat_template_kwargs is not None:
        settings["chat_template_kwargs"] = read_json(arguments.chat_template_kwargs, "chat_template_kwargs")
    name = "embedded-student" if model == EMBEDDED else None
    report = evaluate_model(resolve_embedded(model, "student"), **settings, model_name=name, progress=not quiet)
    if PartialState().is_main_process:
        print(aligned(report.to_markdown()))
        print(
            f"The report and the samples lie in {arguments.output_dir}; graded.jsonl has each with its gold and verdict"
        )
    PartialState().destroy_process_group()  # left to the interpreter's end it may abort it
    return 0


@dataclass(frozen=True)
class ReportArguments:
    """Arguments of `prune-opd report show REPORT` and `prune-opd report compare REPORT OTHER`."""

    action: Literal["show", "compare"] = setting(
        NEEDED, "show prints a report's table; compare says whether two differ by more than the noise"
    )
    report: str = setting(NEEDED, "a report.json, or the folder it lies in")
    other: str | None = setting(None, "the report to compare with")
    metric: str = setting("avg", "to compare: avg, or a full name such as pass@4 or maj@16")

    def __post_init__(self) -> None:
        if (self.action == "compare") != (self.other is not None):
            raise ConfigError(f"report {self.action} takes {'two reports' if self.other is None else 'one report'}")


def report(arguments: ReportArguments) -> int:
    """Print a report, or whether the other one differs from it. Returns the exit code."""
    first = EvaluationReport.load(arguments.report)
    shown = first.to_markdown()
    if arguments.other is not None:
        from prune_opd_hf.evaluation.comparison import compare_reports

        shown = compare_reports(first, EvaluationReport.load(arguments.other), arguments.metric).to_markdown()
    print(aligned(shown), end="")
    return 0


def aligned(markdown: str) -> str:
    r"""Markdown whose tables also line up in a terminal; it means the same.

    Example:
        >>> print(aligned("| a | b |\n| --- | ---: |\n| long name | 7 |\nand so on"))
        | a         |    b |
        | --------- | ---: |
        | long name |    7 |
        and so on
    """
    lines: list[str] = []
    for is_table, group in itertools.groupby(markdown.split("\n"), lambda line: line.startswith("|")):
        if not is_table:
            lines += group
            continue
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in group]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for number, row in enumerate(rows):
            cells = []
            for cell, rule, width in zip(row, rows[1], widths, strict=True):
                if number == 1:
                    cells.append(rule[:-1].rjust(width - 1, "-") + rule[-1])
                else:
                    cells.append(cell.rjust(width) if rule.endswith(":") else cell.ljust(width))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
