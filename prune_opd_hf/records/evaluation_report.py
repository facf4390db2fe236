"""The record of an evaluation: every number with its interval, and everything that is needed to repeat it.

Reports are written by `evaluate_model`, read by cards, comparisons and the command line. They are meant to be published, so
they hold names, hashes and settings, never a machine's paths. This module knows neither models nor grading.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date as calendar_date
from typing import ClassVar

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.records.files import FREE_TEXT, SavedRecord, check_publishable_name, check_values
from prune_opd_hf.records.statistics import Estimate

REPORT_FILE = "report.json"
"""Name of the record inside the folder of an evaluation."""

SHARES = ("truncated_share", "no_answer_share", "timed_out_share", "crashed_share")

_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class SamplingSettings:
    """How the samples were drawn.

    Attributes:
        temperature: 0 means greedy decoding.
        top_p, top_k: the warpers; 1.0 and 0 switch them off.
        max_completion_length: cap on the response; longer ones are cut and count as truncated.
        seed: of the first sample.
        num_generations: samples for each problem.

    Example: the settings of the published results.
        >>> SamplingSettings(temperature=1.0, top_p=0.95, max_completion_length=31744, seed=0, num_generations=16).describe()
        '16 samples a problem, temperature 1.0, top_p 0.95, top_k off, at most 31744 new tokens, seed 0'
    """

    temperature: float
    top_p: float
    max_completion_length: int
    seed: int
    num_generations: int
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], got {self.top_p}")
        _check_least(self, 0, "temperature", "top_k", "seed")
        _check_least(self, 1, "max_completion_length", "num_generations")

    def describe(self) -> str:
        """One line for a card or a table's caption."""
        return (
            f"{self.num_generations} sample{'s' * (self.num_generations != 1)} a problem, temperature {self.temperature}, "
            f"top_p {self.top_p}, top_k {self.top_k or 'off'}, at most {self.max_completion_length} new tokens, seed {self.seed}"
        )


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark's scores and the problems they were taken on.

    Attributes:
        name: the registry's name, such as "aime24".
        source: Hub dataset id, or the file's name alone for a local file.
        revision: Hub commit; None for a local file.
        content_hash: "sha256:..." over prompts and answers, which tells copies of one name apart.
        problems: their number.
        num_generations: samples for each problem (the k of the metrics).
        metrics: "avg@k", "pass@k", "maj@k" for the values of k that were computed, each with its interval.
        problem_scores: under the same names, one score for each problem in the benchmark's order. Paired comparisons
            read them; a metric is their mean.
        truncated_share, no_answer_share, timed_out_share, crashed_share: of all samples. Cut at `max_completion_length`;
            without an answer that could be read; stopped by the grader's time limit; the grader died on them.
            The last three count as wrong, and so does a truncated sample without an answer.
        prompt_tokens, response_tokens: totals over all samples.
        wall_seconds: generation and grading of this benchmark.
        prompt_suffix: what was appended to each problem.
        grader: what judged the answers.
        prompt_form: what each prompt was put into: a chat template, by the hash of its text, with its settings as JSON; "no
            template"; "" in reports that were written before this was noted.

    Raises:
        ConfigError: a number outside its range, scores that do not fit the number of problems, or a machine's path.
    """

    name: str
    source: str
    revision: str | None
    content_hash: str
    problems: int
    num_generations: int
    metrics: Mapping[str, Estimate]
    problem_scores: Mapping[str, tuple[float, ...]]
    truncated_share: float
    no_answer_share: float
    timed_out_share: float
    crashed_share: float
    prompt_tokens: int
    response_tokens: int
    wall_seconds: float
    prompt_suffix: str = field(metadata=FREE_TEXT)
    grader: str
    prompt_form: str = ""

    def __post_init__(self) -> None:
        check_publishable_name("benchmark name", self.name)
        check_publishable_name("source", self.source)
        if not _SHA256.fullmatch(self.content_hash):
            raise ConfigError(f"content_hash must be 'sha256:' and 64 hex digits, got {self.content_hash!r}")
        _check_least(self, 1, "problems", "num_generations")
        _check_least(self, 0, "prompt_tokens", "response_tokens", "wall_seconds")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not self.metrics or set(self.metrics) != set(self.problem_scores):
            raise ConfigError(
                "metrics and problem_scores must have the same names and at least one, "
                f"got {sorted(self.metrics)} and {sorted(self.problem_scores)}"
            )
        for name, scores in self.problem_scores.items():
            if len(scores) != self.problems:
                raise ConfigError(f"problem_scores[{name!r}] must hold {self.problems} scores, got {len(scores)}")
            if not all(0 <= score <= 1 for score in scores):
                raise ConfigError(f"problem_scores[{name!r}] must lie in [0, 1]")

    @property
    def mean_response_tokens(self) -> float:
        return self.response_tokens / (self.problems * self.num_generations)


@dataclass(frozen=True)
class EvaluationReport(SavedRecord):
    """What a card quotes and a comparison reads.

    Attributes:
        model_name: Hub id or the folder's name alone, never a path.
        model_hash: "sha256:..." over the content of the weights' safetensors files.
        sampling: how the samples were drawn.
        benchmarks: one result each, in the order they were run.
        versions: package name to version.
        hardware: what it ran on, such as "1x NVIDIA H100 80GB HBM3".
        engine: what generated, such as "loop"; those of `evaluate_model` are named in its documentation.
        dtype: of the model's weights while it generated, such as "bfloat16".
        date: of the evaluation, YYYY-MM-DD (UTC).

    Raises:
        ConfigError: no benchmark, one twice, a malformed hash or date, a machine's path, a number that is not finite, or
            text that does not print.

    Example:
        >>> scores = {"avg@2": (1.0, 0.5)}
        >>> result = BenchmarkResult(
        ...     name="two-problems", source="two.json", revision=None, content_hash="sha256:" + "0" * 64,
        ...     problems=2, num_generations=2, metrics={"avg@2": Estimate(0.75, 0.31, 0.95, "by hand")}, problem_scores=scores,
        ...     truncated_share=0.25, no_answer_share=0.0, timed_out_share=0.0, crashed_share=0.0,
        ...     prompt_tokens=40, response_tokens=1000, wall_seconds=1.5, prompt_suffix="", grader="exact",
        ... )
        >>> report = EvaluationReport(
        ...     model_name="org/student", model_hash="sha256:" + "1" * 64,
        ...     sampling=SamplingSettings(temperature=1.0, top_p=0.95, max_completion_length=512, seed=0, num_generations=2),
        ...     benchmarks=(result,), versions={"transformers": "5.17.0"}, hardware="CPU", engine="loop",
        ...     dtype="float32", date="2026-11-23",
        ... )
        >>> print(report.to_markdown().splitlines()[2])
        | two-problems (two.json) | 2 | 75.0 [31.0, 95.0] | 25.0% | 0.0% | 0.0% | 250 |
        >>> EvaluationReport.from_json(report.to_json()) == report
        True
    """

    KIND: ClassVar[str] = "prune_opd_hf.evaluation_report"
    FILE_NAME: ClassVar[str] = REPORT_FILE

    model_name: str
    model_hash: str
    sampling: SamplingSettings
    benchmarks: tuple[BenchmarkResult, ...]
    versions: Mapping[str, str]
    hardware: str
    engine: str
    dtype: str
    date: str

    def __post_init__(self) -> None:
        check_values(self)
        check_publishable_name("model_name", self.model_name)
        if not _SHA256.fullmatch(self.model_hash):
            raise ConfigError(f"model_hash must be 'sha256:' and 64 hex digits, got {self.model_hash!r}")
        names = [result.name for result in self.benchmarks]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"a report needs at least one benchmark and each once, got {names}")
        try:
            calendar_date.fromisoformat(self.date)
        except ValueError:
            raise ConfigError(f"date must be YYYY-MM-DD, got {self.date!r}") from None

    def __getitem__(self, benchmark: str) -> BenchmarkResult:
        """One benchmark's result by its name.

        Raises:
            KeyError: it was not run; the message lists those that were.
        """
        for result in self.benchmarks:
            if result.name == benchmark:
                return result
        raise KeyError(f"no benchmark {benchmark!r} in this report; it has {[r.name for r in self.benchmarks]}")

    def to_markdown(self) -> str:
        """A table with one row a benchmark, scores in percent with 95% intervals, and the settings below it."""
        metrics = list(dict.fromkeys(name for result in self.benchmarks for name in result.metrics))
        header = ["benchmark", "problems", *metrics, "truncated", "no answer", "timed out", "mean tokens"]
        rows = [header, ["---", *["---:"] * (len(header) - 1)]]
        for result in self.benchmarks:
            estimates = [result.metrics.get(name) for name in metrics]
            rows.append(
                [
                    f"{result.name} ({result.source}{f' @ {result.revision[:8]}' if result.revision else ''})",
                    str(result.problems),
                    *["" if estimate is None else str(estimate) for estimate in estimates],
                    f"{100 * result.truncated_share:.1f}%",
                    f"{100 * result.no_answer_share:.1f}%",
                    f"{100 * (result.timed_out_share + result.crashed_share):.1f}%",
                    f"{result.mean_response_tokens:.0f}",
                ]
            )
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        return f"{table}\n\n{self._caption()}\n"

    def _caption(self) -> str:
        methods = dict.fromkeys(e.method for result in self.benchmarks for e in result.metrics.values())
        graders = dict.fromkeys(result.grader for result in self.benchmarks)
        forms = [
            f"{r.name}: {r.prompt_form}" + (f", then {r.prompt_suffix!r}" if r.prompt_suffix else "")
            for r in self.benchmarks
            if r.prompt_form
        ]
        hashes = "; ".join(f"{r.name} {r.content_hash.removeprefix('sha256:')[:12]}" for r in self.benchmarks)
        versions = ", ".join(f"{name} {version}" for name, version in sorted(self.versions.items()))
        seconds = sum(result.wall_seconds for result in self.benchmarks)
        return "\n".join(
            [
                f"- Model: {self.model_name}, weights {self.model_hash.removeprefix('sha256:')[:12]}, {self.dtype}",
                f"- Sampling: {self.sampling.describe()}",
                *([f"- Prompts: {'; '.join(forms)}"] if forms else []),
                f"- In percent, with 95% intervals: {'; '.join(methods)}",
                f"- Graded by {'; '.join(graders)}",
                f"- Problems (hash of their content): {hashes}",
                f"- Ran on {self.hardware}, {self.engine}, {seconds:.0f} s, {self.date}",
                f"- Versions: {versions}",
            ]
        )


def _check_least(record: object, least: int, *names: str) -> None:
    for name in names:
        if not least <= getattr(record, name) < float("inf"):
            raise ConfigError(f"{name} must be at least {least} and finite, got {getattr(record, name)}")
