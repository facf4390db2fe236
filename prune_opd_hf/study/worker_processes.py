"""Worker processes: started, read from, and stopped when the context is left.

A worker is a module that takes one JSON file and writes messages, lines of JSON, to standard output. One thread each, so that
workers side by side see the same machine.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Any

SECONDS_TO_END = 10
"""How long a worker has to end after it was asked to, before it is killed."""


@dataclass(frozen=True)
class WorkerEvent:
    """A message of one worker, or its end.

    Attributes:
        name: of the worker.
        message: one line of its output; None when it has ended.
        exit_code: once it has ended.
        errors: its standard error, once it has ended.
    """

    name: str
    message: dict[str, Any] | None = None
    exit_code: int | None = None
    errors: str = ""


class WorkerProcesses:
    """Workers that run at the same time; leaving the context stops those that still run.

    Example: the end of a worker comes with its standard error.
        >>> with WorkerProcesses() as workers:
        ...     workers.start("w", "this_module.does_not_exist", Path("settings.json"))
        ...     event = workers.next_event()
        >>> event.name, event.exit_code, "No module named" in event.errors
        ('w', 1, True)
    """

    def __init__(self) -> None:
        self._events: Queue[WorkerEvent] = Queue()
        self._stack = ExitStack()
        self._running: set[str] = set()

    def __enter__(self) -> "WorkerProcesses":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def running(self) -> int:
        """Workers whose end has not been read yet."""
        return len(self._running)

    def start(self, name: str, module: str, settings: Path) -> None:
        """Run `python -m module settings` in a process of its own, with one thread."""
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(
            # Without the filter runpy warns that the package has imported the module already.
            [sys.executable, "-W", "ignore::RuntimeWarning:runpy", "-m", module, os.fspath(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **one_thread},
        )
        self._running.add(name)
        reader = Thread(target=_read_messages, args=(name, process, self._events), daemon=True)
        self._stack.callback(reader.join)  # after the process was stopped: callbacks run from the last to the first
        self._stack.callback(_stop, process)
        reader.start()

    def next_event(self) -> WorkerEvent:
        """Wait for the next event of any worker."""
        event = self._events.get()
        if event.message is None:
            self._running.discard(event.name)
        return event

    def events(self) -> Iterator[WorkerEvent]:
        """Every event until all workers have ended; more may be started meanwhile."""
        while self._running:
            yield self.next_event()


def _read_messages(name: str, process: subprocess.Popen, events: Queue) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    with process.stdout, process.stderr:
        error_reader = Thread(target=errors.extend, args=(process.stderr,), daemon=True)
        error_reader.start()
        for line in process.stdout:
            if line.startswith("{"):
                try:
                    events.put(WorkerEvent(name, json.loads(line)))
                except ValueError:
                    continue  # a line cut short by the end of the process
        code = process.wait()
        error_reader.join()
    events.put(WorkerEvent(name, exit_code=code, errors="".join(errors).strip()))


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
