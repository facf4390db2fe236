"""Worker processes: started, read from, and stopped when the context is left.

A worker is a module that takes one JSON file. Lines of JSON that it prints are its messages; whatever else it prints is kept for
the case that it fails. One thread each, so that workers side by side see the same machine.
"""

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Any

SECONDS_TO_END = 10
"""How long a worker has to end after SIGTERM, before it is killed."""

LAST_LINES = 12


@dataclass(frozen=True)
class WorkerEvent:
    """A message of one worker, or its end.

    Attributes:
        name: of the worker.
        message: one line of its output; None when it has ended.
        exit_code: once it has ended.
        output: the last lines that it printed besides messages, once it has ended.
    """

    name: str
    message: dict[str, Any] | None = None
    exit_code: int | None = None
    output: str = ""


class WorkerProcesses:
    """Workers that run at the same time; leaving the context stops those that still run.

    Example: the end of a worker comes with what it printed.
        >>> with WorkerProcesses() as workers:
        ...     workers.start("w", "this_module.does_not_exist", Path("settings.json"))
        ...     event = workers.next_event()
        >>> event.name, event.exit_code, "No module named" in event.output
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
            stderr=subprocess.STDOUT,
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
    output: deque[str] = deque(maxlen=LAST_LINES)
    with process.stdout:
        for line in process.stdout:
            try:
                message = json.loads(line) if line.startswith("{") else None
            except ValueError:  # a line cut short by the end of the process
                message = None
            if message is None:
                output.append(line)
            else:
                events.put(WorkerEvent(name, message))
    events.put(WorkerEvent(name, exit_code=process.wait(), output="".join(output).strip()))


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
