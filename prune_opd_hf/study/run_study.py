"""Runs a study: every arm with every seed, each in a process of its own, side by side where there are cores.

Each run leaves one file. A study that was killed continues: runs whose file is there, and was made with these settings, are not
repeated. A process has one thread, so that runs side by side see the same machine.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from prune_opd_hf.errors import ConfigError, FileFormatError, PruneOPDError
from prune_opd_hf.records.environment import available_cores
from prune_opd_hf.records.folders import check_folder
from prune_opd_hf.study.arm_training import ArmRun, TrainingOrder
from prune_opd_hf.study.study_page import write_study
from prune_opd_hf.study.study_report import StudyReport
from prune_opd_hf.study.study_settings import StudySettings

RUNS_FOLDER = "runs"
STUDENTS_FOLDER = "students"
LINES_PER_RUN = 4
"""Lines of progress that each run prints where there is no terminal for bars."""

SECONDS_TO_END = 10
"""How long a process has to end after SIGTERM, before it is killed."""

LAST_LINES = 12
"""Lines of its output that the error of a failed process holds."""


def run_study(
    settings: StudySettings,
    output_dir: str | os.PathLike[str],
    *,
    command: str = "run_study(...)",
    console: Console | None = None,
) -> StudyReport:
    """Run what is not finished yet, and write the report and its figures into `output_dir`.

    Args:
        settings: what to compare.
        output_dir: folder of the study. It may hold finished runs of the same settings.
        command: what repeats the study, for the report.
        console: where progress is shown; standard output by default.

    Returns:
        The report, which is also in `output_dir` as report.json and README.md.

    Raises:
        ConfigError: `output_dir` cannot be written, or holds a run of other settings.
        PruneOPDError: a run failed; the message ends with its output. The other runs were finished first.
    """
    folder = Path(output_dir)
    if any((folder / name).exists() for name in ("README.md", "report.json")) and not (folder / RUNS_FOLDER).is_dir():
        raise ConfigError(
            f"{folder} holds a README.md or report.json of something else: give the study another output_dir"
        )
    runs = run_arms(settings, output_dir, command=command, console=console)
    shown = next(run for run in runs if run.arm == settings.reference)
    return write_study(settings, runs, folder, command=command, shown=shown)


def run_arms(
    settings: StudySettings,
    output_dir: str | os.PathLike[str],
    *,
    command: str | None = None,
    console: Console | None = None,
    keep_students: bool = False,
) -> list[ArmRun]:
    """Train every arm with every seed, as far as they are not finished; see `run_study`.

    Args:
        keep_students: save every student with its training summary, see `student_path`.

    Returns:
        The runs in the order of `StudySettings.runs`.
    """
    console = Console() if console is None else console
    check_folder(output_dir)
    folder, runs = Path(output_dir).absolute(), settings.runs()
    finished = _load_finished(settings, folder)
    if finished:
        console.print(f"{len(finished)} of {len(runs)} runs are finished already.", highlight=False)
    for arm, seed in runs:
        known = finished.get((settings.arms[arm].length_from or "", seed))
        if known is not None and (arm, seed) not in finished:
            settings.length_for(arm, seed, known.mean_kept_length)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[state]}"))
    bars = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    futures: dict[tuple[str, int], Future[ArmRun]] = {}

    def train(arm: str, seed: int) -> ArmRun:
        """Start a process, and follow it to its end."""
        if (arm, seed) in finished:
            return finished[arm, seed]
        source, length = settings.arms[arm].length_from, None
        if source is not None:  # runs start in their order, so that the one waited for has started
            length = settings.length_for(arm, seed, futures[source, seed].result().mean_kept_length)
        order = TrainingOrder(
            study=settings,
            arm=arm,
            seed=seed,
            pruning_length=length,
            result=str(result_path(folder, arm, seed)),
            student=str(student_path(folder, arm, seed)) if keep_students else None,
            command=command,
        )
        name = settings.arms[arm].label + (f", seed {seed}" if len(settings.seeds) > 1 else "")
        bar, printed = bars.add_task(name, total=1.0, state="starting"), 0

        def show(point: dict[str, Any]) -> None:
            nonlocal printed
            share = min(point["share"], 1.0)
            state = (
                f"step {point['step']:4d}  accuracy {point['accuracy']:4.0%}  "
                f"{point['kept_tokens'] / max(point['rollouts'], 1):5.1f} tokens kept of each rollout"
            )
            bars.update(bar, completed=share, state=state)
            if not console.is_terminal and int(share * LINES_PER_RUN) > printed:
                printed = int(share * LINES_PER_RUN)
                console.print(
                    f"{name:<9}  {share:4.0%}  {point['seconds']:6.1f} s  {state}", highlight=False, markup=False
                )

        processes.run("prune_opd_hf.study.arm_training", json.dumps(asdict(order)), show)
        bars.remove_task(bar)
        run = ArmRun.load(order.result)
        last = run.curve[-1]
        console.print(
            f"{name}: {last.step} steps, {last.seconds:.1f} s ({last.cpu_seconds:.1f} CPU s), {last.generated_tokens:,} tokens, "
            f"{run.mean_kept_length:.1f} kept of each rollout, accuracy {last.accuracy:.1%}",
            highlight=False,
            markup=False,
        )
        return run

    with bars, ThreadPoolExecutor(settings.processes or available_cores()) as threads, Processes() as processes:
        for run in runs:
            futures[run] = threads.submit(train, *run)
        failures = {run: error for run, future in futures.items() if (error := future.exception()) is not None}
    if failures:
        (arm, seed), error = next(iter(failures.items()))
        if isinstance(error, ConfigError):  # no process was started
            raise error
        raise PruneOPDError(
            f"{len(failures)} of {len(runs)} runs of the study failed, the first being {arm} with seed {seed}; the same command "
            f"continues. Its output:\n{error}"
        ) from error
    return [futures[run].result() for run in runs]


def result_path(folder: Path, arm: str, seed: int) -> Path:
    return folder / RUNS_FOLDER / f"{arm}-seed{seed}.json"


def student_path(folder: Path, arm: str, seed: int) -> Path:
    """Folder of a run's student, where students are kept."""
    return folder / STUDENTS_FOLDER / f"{arm}-seed{seed}"


class Processes:
    """Python modules in processes of their own; leaving the context stops those that still run."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []
        self._lock, self._stopping = Lock(), False

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._stopping = True
        for process in self._started:
            process.terminate()
        for process in self._started:
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()

    def run(self, module: str, order: str, on_message: Callable[[dict[str, Any]], None]) -> None:
        """Run `python -m module` with one thread to its end, `order` being its standard input, and call `on_message` with every
        line of JSON that it prints; may be called from several threads.

        Raises:
            PruneOPDError: it failed; the message is what it printed last besides messages.
        """
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        output: deque[str] = deque(maxlen=LAST_LINES)
        with tempfile.TemporaryFile("w+") as file, self._lock:
            if self._stopping:
                raise PruneOPDError("stopped before it began")
            file.write(order)
            file.seek(0)
            process = subprocess.Popen(
                # Without the filter runpy warns that the package has imported the module already.
                [sys.executable, "-W", "ignore::RuntimeWarning:runpy", "-m", module],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **one_thread},
            )
            self._started.append(process)
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    message = json.loads(line) if line.startswith("{") else None
                except ValueError:  # a line cut short by the end of the process
                    message = None
                if message is None:
                    output.append(line)
                else:
                    on_message(message)
        if process.returncode:
            raise PruneOPDError("".join(output).strip() or f"nothing; exit code {process.returncode}")


def _load_finished(settings: StudySettings, folder: Path) -> dict[tuple[str, int], ArmRun]:
    finished = {}
    for arm, seed in settings.runs():
        path = result_path(folder, arm, seed)
        if path.is_file():
            try:
                run = ArmRun.load(path)
            except FileFormatError as error:
                raise FileFormatError(f"{error}: remove it") from error
            if run.fingerprint != settings.fingerprint(arm):
                raise ConfigError(
                    f"{path} is a run of other settings: give the study another --output_dir, or remove {folder / RUNS_FOLDER}"
                )
            finished[arm, seed] = run
    return finished
