"""Training runs in processes of their own: started, listened to, never left behind. The demo and the study share it.

A worker is a module that takes one JSON file of settings and tells how it goes in lines of JSON on standard output. One
thread each, so that runs side by side see the same machine.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
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
    """What one worker said, or that it ended.

    Attributes:
        name: of the worker.
        said: one line of its output; None when it has ended.
        exit_code: once it has ended.
        errors: what it wrote on standard error, once it has ended.
    """

    name: str
    said: dict[str, Any] | None = None
    exit_code: int | None = None
    errors: str = ""

    @property
    def ended(self) -> bool:
        """Whether this is the worker's last event."""
        return self.said is None


class WorkerProcesses:
    """Workers that run at the same time; leaving the context stops whatever still runs.

    Example: a worker that fails says why.
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
        """Workers that have not told their end yet."""
        return len(self._running)

    def start(self, name: str, module: str, settings: Path) -> None:
        """Run `python -m module settings` in a process of its own, with one thread."""
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(
            # Without the filter runpy remarks that the package knows the module already, before the worker's own words.
            [sys.executable, "-W", "ignore::RuntimeWarning:runpy", "-m", module, os.fspath(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **one_thread},
        )
        self._running.add(name)
        listener = Thread(target=_listen, args=(name, process, self._events), daemon=True)
        self._stack.callback(listener.join)  # after the process was stopped: callbacks run from the last to the first
        self._stack.callback(_stop, process)
        listener.start()

    def next_event(self) -> WorkerEvent:
        """Wait for the next event of any worker."""
        event = self._events.get()
        if event.ended:
            self._running.discard(event.name)
        return event

    def events(self) -> Iterator[WorkerEvent]:
        """Every event until all workers have ended; more may be started meanwhile."""
        while self._running:
            yield self.next_event()


def say(event: Mapping[str, Any]) -> None:
    """Tell the parent process, from within a worker."""
    print(json.dumps(event), flush=True)


def _listen(name: str, process: subprocess.Popen, events: Queue) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    with process.stdout, process.stderr:
        reader = Thread(target=_read_all, args=(process.stderr, errors), daemon=True)
        reader.start()
        for line in process.stdout:
            if line.startswith("{"):
                try:
                    events.put(WorkerEvent(name, json.loads(line)))
                except ValueError:
                    continue  # a line cut short by the end of the process
        code = process.wait()
        reader.join()
    events.put(WorkerEvent(name, exit_code=code, errors="".join(errors).strip()))


def _read_all(stream: Any, lines: list[str]) -> None:
    lines.extend(stream)


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
