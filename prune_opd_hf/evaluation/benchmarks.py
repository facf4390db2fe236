"""Benchmarks: where their problems come from, and what identifies the copy that was used.

Copies of one name differ (AMC23 circulates with 40 and with 83 problems), so a benchmark carries its source, the revision that
was loaded and a hash of its content, and reports quote them. This module knows no models, and of grading what a gold may be.
"""

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_opd_hf.errors import ConfigError, FileFormatError, HubError, InputError
from prune_opd_hf.evaluation.grading.math_grader.extraction import final_answer
from prune_opd_hf.records.files import check_publishable_name, first_line
from prune_opd_hf.tasks import ChainTask, Problem

BOXED_SUFFIX = r"Please reason step by step, and put your final answer within \boxed{}."
"""What the reference implementation of Prune-OPD appends to each problem, and what benchmarks of the registry are asked with. The
problems of a file are asked as they stand, unless a suffix is chosen."""

BOXED = "boxed"
"""Short for that suffix, on the command line and for `evaluate_model`."""

ANSWER_TYPES = ("math", "chain")
"""How answers are graded. "math": the last box, by math-verify; "chain": the digit before the end of the sequence."""

FILE_FORM = "a JSON list, or JSON lines, of objects with 'prompt' and 'answer'"

CHAIN = "chain"
CHAIN_PROBLEMS, CHAIN_SEED = 512, 0


@dataclass(frozen=True)
class BenchmarkEntry:
    """A data set on the Hub.

    Attributes:
        revision: the commit to load; a branch is resolved to its commit when it is loaded.
        problems: their number at that revision.
        split, question_column: where they are; the answers are in the column "answer".
    """

    dataset_id: str
    revision: str
    problems: int
    split: str = "train"
    question_column: str = "problem"


# AMC 12A and 12B of 2023 with numbers as answers (copies with 83 problems add those of 2022); AIME I and II; HMMT of February, by
# MathArena; 500 test problems of MATH (arXiv 2103.03874) chosen for PRM800K (arXiv 2305.20050).
REGISTRY = {
    "amc23": BenchmarkEntry("math-ai/amc23", "80815d37005feb82cd7f8fbc6901d5d3eff43057", 40, "test", "question"),
    "aime24": BenchmarkEntry("HuggingFaceH4/aime_2024", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", 30),
    "aime25": BenchmarkEntry("yentinglin/aime_2025", "6f71d77b0b89b9dabe07ab466c51df33f514df7f", 30),
    "hmmt24": BenchmarkEntry("MathArena/hmmt_feb_2024", "main", 30),
    "hmmt25": BenchmarkEntry("MathArena/hmmt_feb_2025", "6fdc4277120810ff75aa22d2d5489b91f7a262a1", 30),
    "math500": BenchmarkEntry("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", 500, "test"),
}
"""Benchmarks on the Hub, by name. The embedded task is "chain" (see `load_benchmark`)."""


@dataclass(frozen=True)
class Benchmark:
    """Problems and gold answers, and where they came from.

    Attributes:
        questions, answers: without the suffix; one gold for each question.
        source: Hub dataset id, or a file's name without its folders.
        revision: the Hub commit that was loaded; None for local files.
        prompt_suffix: appended to each question after a blank line; by default nothing is.
        answer_type: one of ANSWER_TYPES.

    Raises:
        InputError: no problem, an empty one, one with a broken character, not one answer for each question, or an answer that is a
            whole text of which no part is marked as the final one.
        ConfigError: an unknown answer type; a name or a source that is a machine's path.
    """

    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    source: str
    revision: str | None = None
    prompt_suffix: str = ""
    answer_type: str = "math"

    def __post_init__(self) -> None:
        check_publishable_name("benchmark name", self.name)
        check_publishable_name("source", self.source)
        if not self.questions or len(self.questions) != len(self.answers):
            raise InputError(
                f"benchmark {self.name!r} needs at least one problem and one answer for each, "
                f"got {len(self.questions)} problems and {len(self.answers)} answers"
            )
        for number, texts in enumerate(zip(self.questions, self.answers, strict=True)):
            where = f"problem {number} of benchmark {self.name!r} ({self.source})"
            if not all(text.strip() for text in texts):
                raise InputError(f"{where} is empty or has no answer")
            if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
                raise InputError(f"{where} has half a surrogate pair, which no tokenizer takes: correct its text")
            if self.answer_type == "math" and "\\begin" not in texts[1] and "\n" in final_answer(texts[1]).strip():
                raise InputError(
                    f"{where} has a whole text as its answer: give the final answer alone, or mark it with #### or \\boxed{{}}"
                )
        if self.answer_type not in ANSWER_TYPES:
            raise ConfigError(f"answer_type must be one of {', '.join(ANSWER_TYPES)}, got {self.answer_type!r}")

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def prompts(self) -> tuple[str, ...]:
        """What the model is asked: each question and the suffix."""
        ending = f"\n\n{self.prompt_suffix}" if self.prompt_suffix else ""
        return tuple(question + ending for question in self.questions)

    @property
    def content_hash(self) -> str:
        """ "sha256:" and the digest of questions and answers in their order; the suffix does not enter."""
        rows = list(zip(self.questions, self.answers, strict=True))
        return "sha256:" + hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def load_benchmark(name_or_path: str | os.PathLike[str]) -> Benchmark:
    r"""Load a benchmark of the registry from the Hub, the embedded task, or a local file.

    Args:
        name_or_path: a name of `REGISTRY`; "chain", the first 512 evaluation problems of the embedded task; the path of a
            JSON list, or of JSON lines, of objects with `prompt` and `answer`; or "name=path" to give the file another name
            than its own.

    Raises:
        ConfigError: an unknown name; the message names the nearest, and lists those there are.
        FileNotFoundError, HubError, FileFormatError: the problems cannot be fetched or read.
    """
    given = os.fspath(name_or_path)
    name, separator, path = given.partition("=")
    if given == CHAIN:
        return chain_benchmark(ChainTask().problems(CHAIN_PROBLEMS, CHAIN_SEED, split="evaluation"))
    if given.lower() in REGISTRY:
        return _load_from_hub(given.lower(), REGISTRY[given.lower()])
    if separator and not Path(given).exists():
        return _load_file(Path(path), name)
    if given.endswith((".json", ".jsonl")) or os.sep in given or Path(given).is_file():
        return _load_file(Path(given), Path(given).stem.lower())
    names = [*REGISTRY, CHAIN]
    near = difflib.get_close_matches(given.lower(), names, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(f"unknown benchmark {given!r}{meant}: give one of {', '.join(names)}, or the path of {FILE_FORM}")


def chain_benchmark(problems: Sequence[Problem]) -> Benchmark:
    """Problems of the embedded task as a benchmark, graded by exact match."""
    questions, answers = zip(*((problem.prompt, problem.answer) for problem in problems), strict=True)
    return Benchmark(CHAIN, questions, answers, "prune_opd_hf.tasks.chain", answer_type="chain")


def _load_file(path: Path, name: str) -> Benchmark:
    try:
        text = path.read_text(encoding="utf-8-sig")  # as Windows' editors write it, too
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no benchmark file {path}: give the path of {FILE_FORM}, or one of {', '.join([*REGISTRY, CHAIN])}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path.name} cannot be read as {FILE_FORM}: {first_line(error)}") from error
    if text.lstrip().startswith("["):
        rows = _parse(text, path.name)
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = [_parse(line, f"line {number} of {path.name}") for number, line in lines if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise FileFormatError(f"{path.name} must be {FILE_FORM}, and at least one")
    questions, answers = _columns(rows, "prompt", path.name)
    return Benchmark(name, questions, answers, path.name)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where} is no JSON ({first_line(error)}): give {FILE_FORM}") from error


def _load_from_hub(name: str, entry: BenchmarkEntry) -> Benchmark:
    from datasets import load_dataset
    from huggingface_hub import HfApi

    pinned = re.fullmatch("[0-9a-f]{40}", entry.revision)
    try:
        commit = entry.revision if pinned else HfApi().dataset_info(entry.dataset_id, revision=entry.revision).sha
        rows = load_dataset(entry.dataset_id, revision=commit, split=entry.split)
    except Exception as error:  # OSError, and what the transports of the client's versions raise
        raise HubError(
            f"{name} ({entry.dataset_id}) cannot be fetched: {first_line(error)}. Without a connection, pass the path of "
            f"{FILE_FORM}"
        ) from error
    if len(rows) != entry.problems:
        raise FileFormatError(
            f"{entry.dataset_id} at {commit} has {len(rows)} problems, {name} should have {entry.problems}: "
            "it was changed; save the copy that you want as JSON and pass its path"
        )
    questions, answers = _columns(list(rows), entry.question_column, entry.dataset_id)
    return Benchmark(name, questions, answers, entry.dataset_id, commit, BOXED_SUFFIX)


def _columns(rows: list[dict], question: str, source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    for number, row in enumerate(rows):
        for column in (question, "answer"):
            value = row.get(column)
            number_or_text = isinstance(value, str | int | float) and not isinstance(value, bool)
            if not number_or_text or (isinstance(value, float) and not math.isfinite(value)):
                raise FileFormatError(
                    f"row {number} of {source} has no {column!r} that is a text or a number; it has {sorted(row)}"
                )
    return tuple(str(row[question]) for row in rows), tuple(str(row["answer"]) for row in rows)
