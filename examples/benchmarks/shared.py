"""What benchmarks share: a time limit, timing that waits for the device, the machine in words, a report on disk from the first
result on. It knows devices and clocks; it knows no model.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

Row = dict[str, Any]


class Deadline:
    """Seconds that are left of the time a run may take.

    Example: nothing that takes a minute fits into a second.
        >>> Deadline(1.0).fits(60.0)
        False
    """

    def __init__(self, seconds: float) -> None:
        self.started, self.seconds = time.monotonic(), seconds

    @property
    def left(self) -> float:
        """Seconds left; below 0 once it is over."""
        return self.seconds - (time.monotonic() - self.started)

    def fits(self, seconds: float) -> bool:
        """Whether something that takes so long still ends in time."""
        return seconds <= self.left


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mark(device: torch.device) -> Any:
    """A moment in the device's own queue of work (on the CPU: now); see `milliseconds_between`."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def milliseconds_between(earlier: Any, later: Any) -> float:
    """Milliseconds from one mark to the next; the device must have reached the later one (`synchronize`)."""
    return 1e3 * (later - earlier) if isinstance(earlier, float) else earlier.elapsed_time(later)


@dataclass
class Timing:
    """Runs of one way of doing something.

    Attributes:
        seconds: of each run, the device having finished at both ends.
        peak_bytes: most memory allocated on the device in any run; 0 on the CPU.
        result: what the last run returned.
        error: the first line of why it could not run, where its memory did not suffice.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    result: Any = None
    error: str | None = None

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def timed_once(way: Callable[[], Any], device: torch.device, timing: Timing) -> None:
    """Run once and note it in `timing`."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    timing.result = way()
    synchronize(device)
    timing.seconds.append(time.perf_counter() - started)
    if device.type == "cuda":
        timing.peak_bytes = max(timing.peak_bytes, torch.cuda.max_memory_allocated(device))


def interleaved_within(
    ways: dict[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    seconds: float,
    on_run: Callable[[str, float], None] | None = None,
) -> dict[str, Timing]:
    """Every way in turn, so that a slow moment of the machine meets all of them: one round at least, further ones while another
    as long as the longest so far ends within `seconds`. Nothing is warmed up here. A way that runs out of memory is left out from
    then on.

    Args:
        on_run: told the name and the seconds of each run when it ends.
    """
    timings = {name: Timing() for name in ways}
    started, longest = time.monotonic(), 0.0
    for done in range(rounds):
        round_started = time.monotonic()
        if done and round_started - started + longest > seconds:
            break
        for name, way in ways.items():
            if timings[name].error is not None:
                continue
            try:
                timed_once(way, device, timings[name])
            except torch.OutOfMemoryError as error:
                timings[name].error = str(error).splitlines()[0]
            else:
                if on_run is not None:
                    on_run(name, timings[name].seconds[-1])
        longest = max(longest, time.monotonic() - round_started)
    return timings


def copy_bandwidth(device: torch.device, elements: int = 2**30, repeats: int = 9) -> float:
    """Bytes a second that the device reads and writes in a large copy of 16-bit numbers: median after two copies of warm-up."""
    source = torch.ones(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    milliseconds = []
    for _ in range(repeats + 2):
        before = mark(device)
        target.copy_(source)
        after = mark(device)
        synchronize(device)
        milliseconds.append(milliseconds_between(before, after))
    return 2 * source.numel() * source.element_size() / (statistics.median(milliseconds[2:]) / 1e3)


def free_bytes(device: torch.device) -> float:
    """Memory that a program may still take on the device; endless on the CPU, where toy sizes run."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def describe_machine(device: torch.device) -> Row:
    """The machine and the versions, as figures need them; nothing that names whose machine it is."""
    machine: Row = {
        "device": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine = {
            **machine,
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "host": _processor(),
        }
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Report:
    """Tables of results: printed line by line, and written to `folder` anew after each line, so that a run cut short keeps what it
    has.

    Args:
        folder: where `NAME.json` and `NAME.md` go; None writes nothing.
        name: of the two files.
        title, header: opens the Markdown file; `header` is a table of two columns.
        first, last: names of tables that the Markdown file begins and ends with, whenever they came.
    """

    def __init__(
        self, folder: Path | None, name: str, title: str, header: Row, *, first: str = "", last: str = ""
    ) -> None:
        self.folder, self.name, self.title, self.header = folder, name, title, header
        self.first, self.last = first, last
        self.tables: dict[str, list[Row]] = {}
        self.notes: list[str] = []
        self.complete = False
        self._shown_last = ""
        print(title)
        for key, value in header.items():
            print(f"  {key}: {value}")
        self.write()

    def add(self, table: str, row: Row) -> None:
        """One line of a table."""
        self.tables.setdefault(table, []).append(row)
        if table != self._shown_last:
            print(f"\n{table}")
        self._shown_last = table
        print("  " + ", ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
        self.write()

    def note(self, text: str) -> None:
        """A line of its own: what was skipped, or failed."""
        self.notes.append(text)
        print(f"  {text}", flush=True)
        self.write()

    def write(self) -> None:
        """Both files, each replaced in one go."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        figures = {**self.header, "tables": self.tables, "notes": self.notes, "complete": self.complete}
        _replace(self.folder / f"{self.name}.json", json.dumps(figures, indent=1, allow_nan=False) + "\n")
        _replace(self.folder / f"{self.name}.md", self.markdown())

    def markdown(self) -> str:
        """The report as Markdown."""
        lines = [f"# {self.title}", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {_shown(value)} |" for key, value in self.header.items()]
        ordered = sorted(self.tables, key=lambda name: (name == self.last) - (name == self.first))
        for name, rows in ((name, self.tables[name]) for name in ordered):
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines += ["", f"## {name}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(_shown(row.get(column)) for column in columns)} |" for row in rows]
        if self.notes:
            lines += ["", "## Skipped, cut short or failed", "", *(f"- {note}" for note in self.notes)]
        if not self.complete:
            lines += ["", "This run has not ended: what is here is what it had."]
        return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "/")


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
