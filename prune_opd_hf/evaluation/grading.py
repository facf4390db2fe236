r"""Grading of responses against gold answers: the same verdict in any thread, order and number of workers.

The last \boxed{} of a response is compared with the gold by math-verify (`math_grader`), in processes with a limit on CPU time
and memory. An answer that hangs or crashes the comparison counts as wrong and is reported as such; the run goes on. What is
known to be accepted or rejected wrongly is listed in `math_grader/equivalence.py`.
"""

import os
import queue
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from types import TracebackType
from typing import Protocol, runtime_checkable

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.evaluation.grading_process import GradingProcess, ProcessDiedError
from prune_opd_hf.evaluation.math_grader.extraction import extract_answer
from prune_opd_hf.evaluation.math_grader.literals import canonical_rational, read_literal

STATUSES = ("graded", "no_answer", "timed_out", "crashed")

_PLAIN_NUMBER = re.compile(r"[+-]?\d{1,300}(?:\.\d{1,300})?")


@dataclass(frozen=True)
class Verdict:
    """What became of one response.

    Attributes:
        correct: whether its answer equals the gold.
        answer: one string for all answers of the same value, the same for all correct ones; None where there is none. Votes
            are counted on it.
        status: "graded"; "no_answer": none was found, or it could not be read; "timed_out": the comparison was stopped;
            "crashed": it died. Only graded answers can be correct.

    Raises:
        ConfigError: an unknown status, or one that contradicts the rest.
    """

    correct: bool
    answer: str | None
    status: str

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ConfigError(f"status must be one of {', '.join(STATUSES)}, got {self.status!r}")
        if (self.status == "graded") != (self.answer is not None) or (self.correct and self.status != "graded"):
            raise ConfigError(
                f"a verdict has an answer if it is graded and only then, and only then can be right: {self}"
            )


@runtime_checkable
class Grader(Protocol):
    """What evaluation asks of a grader."""

    @property
    def name(self) -> str:
        """What reports say about it."""

    def grade(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """One verdict for each response against its gold, in order."""


class GradingPool:
    """Processes that grade mathematical answers. Use it as a context manager, or call `close`.

    Processes start when they are first needed: where answer and gold are plain numbers none is. Equal answers to equal golds
    are compared once in each call.

    Args:
        workers: processes at most; by default one for each available CPU core, and no more than 8.
        cpu_seconds: limit for one comparison. A sum of 400 terms takes 2 to 4 seconds.
        memory_bytes: limit on the address space of each process.

    Raises:
        ConfigError: no worker, or no time.

    Example:
        >>> with GradingPool(workers=1) as pool:
        ...     for verdict in pool.grade([r"\\boxed{\\frac{1}{2}}", r"\\boxed{3}", "no idea"], ["0.5", "2", "2"]):
        ...         print(verdict)
        Verdict(correct=True, answer='1/2', status='graded')
        Verdict(correct=False, answer='3', status='graded')
        Verdict(correct=False, answer=None, status='no_answer')
    """

    def __init__(self, workers: int | None = None, *, cpu_seconds: float = 10.0, memory_bytes: int = 2 * 2**30) -> None:
        workers = min(8, _available_cores()) if workers is None else workers
        if workers < 1:
            raise ConfigError(f"a grading pool needs at least 1 worker, got {workers}")
        if not 0 < cpu_seconds < float("inf"):
            raise ConfigError(f"cpu_seconds must be positive and finite, got {cpu_seconds}")
        if memory_bytes < 2**28:
            raise ConfigError(f"a grading process needs at least 256 MiB, got {memory_bytes} bytes")
        self.cpu_seconds = cpu_seconds
        self._processes = [GradingProcess(cpu_seconds, memory_bytes) for _ in range(workers)]
        self._idle: queue.SimpleQueue[GradingProcess] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)

    @property
    def name(self) -> str:
        """The grader and its settings, for reports."""
        return f"math-verify {version('math-verify')} on the last \\boxed{{}}, at most {self.cpu_seconds:g} CPU seconds each"

    def grade(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """One verdict for each response against its gold, in order. Several threads may call it at a time.

        Raises:
            InputError: as many golds as responses are needed.
            GraderStartError: no process could be started.
        """
        if len(responses) != len(golds):
            raise InputError(
                f"one gold is needed for each response, got {len(responses)} responses, {len(golds)} golds"
            )
        answers = [extract_answer(response) for response in responses]
        questions = [(answer, gold) for answer, gold in zip(answers, golds, strict=True) if answer is not None]
        verdicts = {question: _compare_numbers(*question) for question in questions}
        hard = [question for question, verdict in verdicts.items() if verdict is None]
        if hard:
            with ThreadPoolExecutor(min(len(hard), len(self._processes)), "grading") as threads:
                verdicts.update(zip(hard, threads.map(self._ask, hard), strict=True))
        nothing = Verdict(False, None, "no_answer")
        return [
            nothing if answer is None else verdicts[answer, gold] or nothing
            for answer, gold in zip(answers, golds, strict=True)
        ]

    def close(self) -> None:
        """Stop the processes. A later call of `grade` starts new ones."""
        for process in self._processes:
            process.stop()

    def __enter__(self) -> "GradingPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, question: tuple[str, str]) -> Verdict:
        process = self._idle.get()
        try:
            try:
                correct, answer = process.ask(*question)
            except ProcessDiedError as death:
                if death.timed_out:
                    raise
                correct, answer = process.ask(*question)  # it may have died of something else: once more in a new one
        except ProcessDiedError as death:
            return Verdict(False, None, "timed_out" if death.timed_out else "crashed")
        finally:
            self._idle.put(process)
        return Verdict(False, None, "no_answer") if answer is None else Verdict(correct, answer, "graded")


def _compare_numbers(answer: str, gold: str) -> Verdict | None:
    """The verdict that `judge` gives where both are plain numbers; None elsewhere."""
    if not (_PLAIN_NUMBER.fullmatch(answer) and _PLAIN_NUMBER.fullmatch(gold)):
        return None
    value, gold_value = read_literal(answer), read_literal(gold)
    assert value is not None
    return Verdict(value == gold_value, canonical_rational(value), "graded")


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
