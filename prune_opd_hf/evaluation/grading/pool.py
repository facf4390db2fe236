r"""Grading of mathematical answers in processes: the same verdict in any thread, order and number of workers.

The last \boxed{} of a response, behind what it thinks, is compared with the gold by math-verify (`math_grader`), in processes
with a limit on CPU time and memory. An answer that hangs or crashes the comparison counts as wrong and is reported as such; the
run goes on. What counts as equal, and what is known to be accepted or rejected wrongly, is listed in
`math_grader/equivalence.py`; where the answer stands, in `math_grader/extraction.py`.
"""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from prune_opd_hf.errors import ConfigError, InputError, PruneOPDError
from prune_opd_hf.evaluation.grading.math_grader.extraction import extract_answer, final_answer
from prune_opd_hf.evaluation.grading.math_grader.rewriting import canonical_rational, read_literal
from prune_opd_hf.evaluation.grading.verdicts import Verdict
from prune_opd_hf.records.environment import available_cores

START_SECONDS = 300.0
"""After so long a process that did not become ready is given up."""

WALL_FACTOR = 20.0
"""The limit is on CPU time; in wall time a busy machine may take this many times longer before the process is killed."""

MEMORY_BYTES = 2 * 2**30
"""Limit on the address space of a process, where the system has one."""

_NO_ANSWER = Verdict(False, None, "no_answer")
_PLAIN_NUMBER = re.compile(r"[+-]?\d{1,300}(?:\.\d{1,300})?")
_PACKAGE = Path(__file__).parent / "math_grader" / "__init__.py"
_BOOTSTRAP = """
import importlib.util, json, os, sys
sys.path[:] = json.loads(sys.stdin.readline())
location, memory_bytes = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "math_grader", location, submodule_search_locations=[os.path.dirname(location)]
)
sys.modules["math_grader"] = importlib.util.module_from_spec(spec)
from math_grader.worker import serve
serve(int(memory_bytes))
"""
"""`math_grader` is loaded from its files under that name: the process starts in a second, without the rest of this package, and
does not import the caller's main module, which would run scripts without a main guard again."""


class GraderStartError(PruneOPDError, RuntimeError):
    """A grading process could not be started; the message holds the end of its error output."""


class ProcessDiedError(Exception):
    """The process ended before it answered; `timed_out` says whether a time limit stopped it."""

    def __init__(self, timed_out: bool) -> None:
        super().__init__("timed out" if timed_out else "crashed")
        self.timed_out = timed_out


class GradingPool(contextlib.AbstractContextManager):
    """Processes that grade mathematical answers. Use it as a context manager, or call `close`.

    Processes start when they are first needed: where answer and gold are plain numbers none is. Equal answers to equal golds
    are compared once in each call.

    Args:
        workers: processes at most; by default one for each available CPU core, and no more than 8.
        cpu_seconds: limit for one comparison. A sum of 400 terms takes 2 to 4 seconds.
        progress: show a bar with the time left where grading takes long.
    """

    def __init__(self, workers: int | None = None, *, cpu_seconds: float = 10.0, progress: bool = False) -> None:
        if workers is None:
            workers = min(8, available_cores())
        if workers < 1:
            raise ConfigError(f"a grading pool needs at least 1 worker, got {workers}")
        if not 0 < cpu_seconds < float("inf"):
            raise ConfigError(f"cpu_seconds must be positive and finite, got {cpu_seconds}")
        self.cpu_seconds, self._progress = cpu_seconds, progress
        self._processes = [GradingProcess(cpu_seconds) for _ in range(workers)]
        self._idle: queue.SimpleQueue[GradingProcess] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)

    @property
    def name(self) -> str:
        """The grader and its settings, for reports."""
        return f"math-verify {version('math-verify')} on the last \\boxed{{}}, at most {self.cpu_seconds:g} CPU seconds each"

    def grade(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """One verdict for each response against its gold, in order. Several threads may call it at a time.

        A gold may be a whole solution, as in GSM8K and MATH: its `final_answer` counts.
        """
        if len(responses) != len(golds):
            raise InputError(
                f"one gold is needed for each response, got {len(responses)} responses, {len(golds)} golds"
            )
        comparisons = [
            (extract_answer(response), final_answer(gold)) for response, gold in zip(responses, golds, strict=True)
        ]
        verdicts = {
            (answer, gold): _NO_ANSWER if answer is None else _compare_numbers(answer, gold)
            for answer, gold in comparisons
        }
        hard = [comparison for comparison, verdict in verdicts.items() if verdict is None]
        if hard:
            with ThreadPoolExecutor(min(len(hard), len(self._processes)), "grading") as threads:
                found = tqdm(threads.map(self._ask, hard), "grading", len(hard), delay=5, disable=not self._progress)
                verdicts.update(zip(hard, found, strict=True))
        return [replace(verdicts[answer, gold] or _NO_ANSWER, extracted=answer) for answer, gold in comparisons]

    def close(self) -> None:
        """Stop the processes. A later call of `grade` starts new ones."""
        for process in self._processes:
            process.stop()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, comparison: tuple[str, str]) -> Verdict:
        process = self._idle.get()
        try:
            for _ in range(2):  # it may have died of something else: once more in a new one
                try:
                    correct, answer = process.ask(*comparison)
                    return _NO_ANSWER if answer is None else Verdict(correct, answer, "graded")
                except ProcessDiedError as death:
                    if death.timed_out:
                        return Verdict(False, None, "timed_out")
            return Verdict(False, None, "crashed")
        finally:
            self._idle.put(process)


class GradingProcess:
    """One process of `math_grader/worker.py`, started when it is first asked, killed when it hangs, replaced; for one thread."""

    def __init__(self, cpu_seconds: float) -> None:
        self._cpu_seconds = cpu_seconds
        self._process: subprocess.Popen[str] | None = None

    def ask(self, answer: str, gold: str) -> tuple[bool, str | None]:
        """Whether they are equal, and the canonical string of the answer; after a ProcessDiedError the next call starts anew."""
        if self._process is None:
            self._process = self._start()
        wall_seconds = self._cpu_seconds * (WALL_FACTOR if hasattr(signal, "setitimer") else 1)
        correct, canonical = self._exchange(self._process, [answer, gold, self._cpu_seconds], wall_seconds)
        return correct, canonical

    def stop(self) -> None:
        """End the process; without effect if there is none."""
        process, self._process = self._process, None
        if process is not None:
            _kill(process)

    def _start(self) -> "subprocess.Popen[str]":
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, str(_PACKAGE), str(MEMORY_BYTES)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="ascii",
                env={**os.environ, "PYTHONHASHSEED": "0"},  # the order of sets, and with it sympy's, is the same in all
                start_new_session=True,  # an interrupt from the keyboard is for the owner
            )
            try:
                self._exchange(process, sys.path, START_SECONDS)
            except ProcessDiedError:
                errors.seek(0)
                output = errors.read().decode("utf-8", "replace").strip()
                raise GraderStartError(
                    "a grading process could not be started; check that math-verify and its antlr runtime are installed "
                    f"(pip install 'math-verify[antlr4-13-2]'). Its error output ends with: {output[-2000:]}"
                ) from None
        return process

    def _exchange(self, process: "subprocess.Popen[str]", message: Any, wall_seconds: float) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(wall_seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        self._process = None
        _kill(process)
        raise ProcessDiedError(expired.is_set() or process.returncode == -getattr(signal, "SIGPROF", 0))


def _kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(OSError):  # what was still to be written meets a closed pipe
            stream.close()
    process.wait()


def _compare_numbers(answer: str, gold: str) -> Verdict | None:
    """The verdict that `judge` gives where both are plain numbers; None elsewhere."""
    if not (_PLAIN_NUMBER.fullmatch(answer) and _PLAIN_NUMBER.fullmatch(gold)):
        return None
    value, gold_value = read_literal(answer), read_literal(gold)
    assert value is not None
    return Verdict(value == gold_value, canonical_rational(value), "graded")
