"""The record of an evaluation: every number with its interval, and everything that is needed to repeat it.

Reports are written by `evaluate_model`, read by cards, comparisons and the command line. They are meant to be published, so
they hold names, hashes and settings, never a machine's paths. This module knows neither models nor grading.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import date as calendar_date
from datetime import datetime, timezone
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from prune_opd_hf.errors import ConfigError, FileFormatError
from prune_opd_hf.records.statistics import Estimate

FILE_KIND = "prune_opd_hf.evaluation_report"
FILE_VERSION = 1

_ADDED_LATER = {"prompt_form"}
"""Fields that older reports of this version lack; they then have their defaults."""

SHARES = ("truncated_share", "no_answer_share", "timed_out_share", "crashed_share")

_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_MACHINE_PATH = re.compile(r"^(?:[/~.]|[A-Za-z]:[\\/]|\\\\|file:)")


@dataclass(frozen=True)
class SamplingSettings:
    """How the samples were drawn.

    Attributes:
        temperature: 0 means greedy decoding.
        top_p, top_k: the warpers; 1.0 and 0 switch them off.
        max_new_tokens: cap on the response; longer ones are cut and count as truncated.
        seed: of the first sample.
        samples: drawn for each problem.

    Example: the settings of the published results.
        >>> SamplingSettings(temperature=1.0, top_p=0.95, max_new_tokens=31744, seed=0, samples=16).describe()
        '16 samples a problem, temperature 1.0, top_p 0.95, top_k off, at most 31744 new tokens, seed 0'
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    samples: int
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0 (0 switches it off), got {self.top_k}")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.samples < 1:
            raise ConfigError(f"samples must be at least 1, got {self.samples}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")

    def describe(self) -> str:
        """One line for a card or a table's caption."""
        return (
            f"{self.samples} sample{'s' * (self.samples != 1)} a problem, temperature {self.temperature}, "
            f"top_p {self.top_p}, top_k {self.top_k or 'off'}, at most {self.max_new_tokens} new tokens, seed {self.seed}"
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
        samples: drawn for each problem (the k of the metrics).
        metrics: "avg@k", "pass@k", "maj@k" for the values of k that were computed, each with its interval.
        problem_scores: under the same names, one score for each problem in the benchmark's order. Paired comparisons
            read them; a metric is their mean.
        truncated_share, no_answer_share, timed_out_share, crashed_share: of all samples. Cut at `max_new_tokens`;
            without an answer that could be read; stopped by the grader's time limit; the grader died on them.
            The last three count as wrong, and so does a truncated sample without an answer.
        prompt_tokens, response_tokens: totals over all samples.
        wall_seconds: generation and grading of this benchmark.
        prompt_suffix: what was appended to each problem.
        grader: what judged the answers.
        prompt_form: what each prompt was put into: a chat template, by the hash of its text, with its settings; "no
            template"; "" in reports that were written before this was noted.

    Raises:
        ConfigError: a number outside its range, scores that do not fit the number of problems, or a machine's path.
    """

    name: str
    source: str
    revision: str | None
    content_hash: str
    problems: int
    samples: int
    metrics: Mapping[str, Estimate]
    problem_scores: Mapping[str, tuple[float, ...]]
    truncated_share: float
    no_answer_share: float
    timed_out_share: float
    crashed_share: float
    prompt_tokens: int
    response_tokens: int
    wall_seconds: float
    prompt_suffix: str
    grader: str
    prompt_form: str = ""

    def __post_init__(self) -> None:
        refuse_machine_path("benchmark name", self.name)
        refuse_machine_path("source", self.source)
        if not _SHA256.fullmatch(self.content_hash):
            raise ConfigError(f"content_hash must be 'sha256:' and 64 hex digits, got {self.content_hash!r}")
        for name in ("problems", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("prompt_tokens", "response_tokens", "wall_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
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
        """Tokens of an average response."""
        return self.response_tokens / (self.problems * self.samples)


@dataclass(frozen=True)
class EvaluationReport:
    """What a card quotes and a comparison reads.

    Attributes:
        model_name: Hub id or the folder's name alone, never a path.
        model_hash: "sha256:..." over the content of the weights' safetensors files.
        sampling: how the samples were drawn.
        benchmarks: one result each, in the order they were run.
        versions: package name to version.
        hardware: what it ran on, such as "1x NVIDIA H100 80GB HBM3".
        engine: what generated, such as "generate_batch".
        dtype: of the model's weights while it generated, such as "bfloat16".
        date: of the evaluation, YYYY-MM-DD (UTC).

    Raises:
        ConfigError: no benchmark, one twice, a malformed hash or date, or a machine's path.

    Example:
        >>> scores = {"avg@2": (1.0, 0.5)}
        >>> result = BenchmarkResult(
        ...     name="two-problems", source="two.json", revision=None, content_hash="sha256:" + "0" * 64,
        ...     problems=2, samples=2, metrics={"avg@2": Estimate(0.75, 0.31, 0.95, "by hand")}, problem_scores=scores,
        ...     truncated_share=0.25, no_answer_share=0.0, timed_out_share=0.0, crashed_share=0.0,
        ...     prompt_tokens=40, response_tokens=1000, wall_seconds=1.5, prompt_suffix="", grader="exact",
        ... )
        >>> report = EvaluationReport(
        ...     model_name="org/student", model_hash="sha256:" + "1" * 64,
        ...     sampling=SamplingSettings(temperature=1.0, top_p=0.95, max_new_tokens=512, seed=0, samples=2),
        ...     benchmarks=(result,), versions={"transformers": "5.17.0"}, hardware="CPU", engine="generate",
        ...     dtype="float32", date="2026-11-23",
        ... )
        >>> print(report.to_markdown().splitlines()[2])
        | two-problems (two.json) | 2 | 75.0 [31.0, 95.0] | 25.0% | 0.0% | 0.0% | 250 |
        >>> EvaluationReport.from_json(report.to_json()) == report
        True
    """

    model_name: str
    model_hash: str
    sampling: SamplingSettings
    benchmarks: tuple[BenchmarkResult, ...]
    versions: Mapping[str, str]
    hardware: str
    engine: str
    dtype: str
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).date().isoformat())

    def __post_init__(self) -> None:
        refuse_machine_path("model_name", self.model_name)
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

    def to_json(self) -> str:
        """The whole record, with its kind and version."""
        document = {"kind": FILE_KIND, "version": FILE_VERSION, "report": asdict(self)}
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "EvaluationReport":
        """Read what `to_json` wrote.

        Raises:
            FileFormatError: not such a record, of another version, or with values outside their range.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise FileFormatError(f"not an evaluation report: invalid JSON at line {error.lineno}") from error
        except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
            raise FileFormatError(f"not an evaluation report: {error}") from error
        if not isinstance(document, dict) or document.get("kind") != FILE_KIND:
            raise FileFormatError(f"not an evaluation report: its 'kind' should be {FILE_KIND!r}")
        if document.get("version") != FILE_VERSION:
            raise FileFormatError(
                f"this evaluation report has version {document.get('version')}, this package reads version "
                f"{FILE_VERSION}: use the package version that wrote it"
            )
        try:
            return _parse_report(document.get("report"))
        except (TypeError, AttributeError, ValueError, OverflowError) as error:
            raise FileFormatError(f"damaged evaluation report: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON; a reader never meets half a file.

        Returns:
            The path written to.
        """
        return write_whole(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "EvaluationReport":
        """Read a report from disk.

        Raises:
            FileNotFoundError: no such file.
            FileFormatError: not a report, or of another version.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (FileFormatError, UnicodeDecodeError) as error:
            raise FileFormatError(f"{Path(path).name}: {error}") from error


def write_whole(target: Path, text: str) -> Path:
    """Write a text file that a reader finds whole or not at all, and make its folder where it is missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return target


def refuse_machine_path(what: str, value: str) -> None:
    """Only a name that says nothing about a machine, and that prints, may go into a report.

    Raises:
        ConfigError: a path, an empty text, or one with control characters or broken ones.
    """
    if not value or _MACHINE_PATH.match(value) or not value.isprintable():
        raise ConfigError(
            f"{what} goes into published files: give a Hub id or a file's or folder's name alone, got {value!r}"
        )


def _parse_report(data: Any) -> EvaluationReport:
    values = _checked_fields(EvaluationReport, data)
    values["sampling"] = SamplingSettings(**_checked_fields(SamplingSettings, values["sampling"]))
    values["benchmarks"] = tuple(_parse_benchmark(item) for item in values["benchmarks"])
    for name, version in values["versions"].items():
        _check_text(f"version of {name}", f"{name} {version}")
    return EvaluationReport(**values)


def _parse_benchmark(data: Any) -> BenchmarkResult:
    values = _checked_fields(BenchmarkResult, data)
    values["metrics"] = {name: Estimate(**_checked_fields(Estimate, item)) for name, item in values["metrics"].items()}
    for name in values["metrics"]:
        _check_text("name of a metric", name)
    values["problem_scores"] = {name: tuple(map(float, item)) for name, item in values["problem_scores"].items()}
    return BenchmarkResult(**values)


def _checked_fields(record: type, data: Any) -> dict[str, Any]:
    expected = {item.name for item in fields(record)}
    if not isinstance(data, dict) or not expected - _ADDED_LATER <= set(data) <= expected:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise FileFormatError(f"{record.__name__} needs the fields {sorted(expected)}, got {found}")
    for item in fields(record):
        value, kinds = data.get(item.name), get_args(item.type) if isinstance(item.type, UnionType) else (item.type,)
        if item.name not in data or not set(kinds) <= {str, int, float, type(None)}:
            continue
        wanted = (*kinds, int) if float in kinds else kinds
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise FileFormatError(
                f"{item.name} should be {' or '.join(kind.__name__ for kind in kinds)}, got {type(value).__name__}"
            )
        if isinstance(value, str) and item.name != "prompt_suffix":
            _check_text(item.name, value)
        elif isinstance(value, int):
            float(value)  # refuses what no number of this record can be
    return dict(data)


def _check_text(what: str, value: str) -> None:
    """Reports of others are shown in terminals: no control characters, no halves of characters."""
    if not value.isprintable():
        raise FileFormatError(f"{what} holds characters that do not print: {value!r}")
