"""One process that compares answers, seen from its owner: started when it is first asked, killed when it hangs, replaced.

It knows the protocol of `math_grader/worker.py` and nothing of answers. The process loads `math_grader` from its files under
that name, so that it starts in a second without loading the rest of this package, and does not import the caller's main
module, which would run scripts without a main guard again.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from prune_opd_hf.errors import PruneOPDError

START_SECONDS = 300.0
"""After so long a process that did not become ready is given up."""

WALL_FACTOR = 20.0
"""The limit is on CPU time; in wall time a busy machine may take this many times longer before the process is killed."""

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


class GraderStartError(PruneOPDError, RuntimeError):
    """A grading process could not be started; the message holds the end of its error output."""


class ProcessDiedError(Exception):
    """The process ended before it answered.

    Attributes:
        timed_out: whether it was stopped because of a time limit.
    """

    def __init__(self, timed_out: bool) -> None:
        super().__init__("timed out" if timed_out else "crashed")
        self.timed_out = timed_out


class GradingProcess:
    """A process that can be asked one question at a time; for one thread at a time.

    Args:
        cpu_seconds: limit for one question.
        memory_bytes: limit on the process's address space, where the system has one.
    """

    def __init__(self, cpu_seconds: float, memory_bytes: int) -> None:
        self._cpu_seconds = cpu_seconds
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[str] | None = None

    def ask(self, answer: str, gold: str) -> tuple[bool, str | None]:
        """Whether they are equal, and the canonical string of the answer.

        Raises:
            ProcessDiedError: the question hangs or kills the process. The next question starts a new one.
            GraderStartError: no process could be started.
        """
        if self._process is None:
            self._process = self._start()
        wall_seconds = self._cpu_seconds * (WALL_FACTOR if hasattr(signal, "setitimer") else 1)
        reply = self._exchange(self._process, [answer, gold, self._cpu_seconds], wall_seconds)
        return bool(reply[0]), reply[1]

    def stop(self) -> None:
        """End the process; without effect if there is none."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            _reap(process)

    def _start(self) -> "subprocess.Popen[str]":
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, str(_PACKAGE), str(self._memory_bytes)],
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
        process.kill()
        _reap(process)
        raise ProcessDiedError(expired.is_set() or process.returncode == -getattr(signal, "SIGPROF", 0))


def _reap(process: "subprocess.Popen[str]") -> None:
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(OSError):  # what was still to be written meets a closed pipe
            stream.close()
    process.wait()
