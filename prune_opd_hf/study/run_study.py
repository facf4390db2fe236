"""Runs a study: every arm with every seed, side by side where there are cores; finished runs are kept.

Each run is a process of its own that leaves one file. A study that was killed continues: runs whose file is there, and was made
with these settings, are not repeated.
"""

import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from prune_opd_hf.errors import ConfigError, PruneOPDError
from prune_opd_hf.records.files import write_json
from prune_opd_hf.study.arm_training import ArmRun, TrainingOrder
from prune_opd_hf.study.study_page import write_study
from prune_opd_hf.study.study_report import StudyReport
from prune_opd_hf.study.study_settings import StudySettings
from prune_opd_hf.study.worker_processes import WorkerProcesses

RUNS_FOLDER = "runs"
STUDENTS_FOLDER = "students"
LINES_PER_RUN = 4
"""Lines of progress that each run prints where there is no terminal for bars."""


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
        ConfigError: `output_dir` holds a run of other settings.
        PruneOPDError: a run failed; the message ends with its output. The other runs were finished first.
    """
    runs = run_arms(settings, output_dir, command=command, console=console)
    return write_study(settings, runs, Path(output_dir), command=command)


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
    folder, runs = Path(output_dir), settings.runs()
    finished = _load_finished(settings, folder)
    if finished:
        console.print(f"{len(finished)} of {len(runs)} runs are finished already.", highlight=False)
    failures: dict[tuple[str, int], str] = {}
    waiting = [run for run in runs if run not in finished]
    at_once = settings.processes or _cores()
    with (
        tempfile.TemporaryDirectory() as scratch,
        WorkerProcesses() as workers,
        _Progress(settings, console) as progress,
    ):

        def start_ready_runs() -> None:
            for run in list(waiting):
                if workers.running >= at_once:
                    return
                arm, seed = run
                source = settings.arms[arm].length_from
                if source is not None and (source, seed) in failures:
                    failures[run] = f"needs the run {source} of seed {seed}, which failed"
                    waiting.remove(run)
                elif source is None or (source, seed) in finished:
                    order = TrainingOrder(
                        study=settings,
                        arm=arm,
                        seed=seed,
                        pruning_length=None if source is None else round(finished[source, seed].mean_kept_length, 2),
                        result=os.path.abspath(result_path(folder, arm, seed)),
                        student=os.path.abspath(student_path(folder, arm, seed)) if keep_students else None,
                        command=command,
                    )
                    file = Path(scratch) / f"{arm}-{seed}.json"
                    write_json(file, asdict(order))
                    workers.start(f"{arm}/{seed}", "prune_opd_hf.study.arm_training", file)
                    progress.begin(run)
                    waiting.remove(run)

        start_ready_runs()
        for event in workers.events():
            arm, seed_text = event.name.rsplit("/", 1)
            run = (arm, int(seed_text))
            if event.message is not None:
                progress.update(run, event.message)
                continue
            if event.exit_code == 0 and result_path(folder, *run).is_file():
                finished[run] = ArmRun.load(result_path(folder, *run))
                progress.end(finished[run], len(finished), len(runs))
            else:
                failures[run] = event.output or f"nothing; exit code {event.exit_code}"
            start_ready_runs()
    if failures:
        (arm, seed), output = next(iter(failures.items()))
        raise PruneOPDError(
            f"{len(failures)} of {len(runs)} runs of the study failed, the first being {arm} with seed {seed}; the same command "
            f"continues. Its output:\n{output}"
        )
    return [finished[run] for run in runs]


def result_path(folder: Path, arm: str, seed: int) -> Path:
    """File of a finished run."""
    return folder / RUNS_FOLDER / f"{arm}-seed{seed}.json"


def student_path(folder: Path, arm: str, seed: int) -> Path:
    """Folder of a run's student, where students are kept."""
    return folder / STUDENTS_FOLDER / f"{arm}-seed{seed}"


def _load_finished(settings: StudySettings, folder: Path) -> dict[tuple[str, int], ArmRun]:
    finished = {}
    for arm, seed in settings.runs():
        path = result_path(folder, arm, seed)
        if path.is_file():
            run = ArmRun.load(path)
            if run.fingerprint != settings.fingerprint(arm):
                raise ConfigError(
                    f"{path} is a run of other settings: give the study another --output_dir, or remove {folder / RUNS_FOLDER}"
                )
            finished[arm, seed] = run
    return finished


@dataclass
class _Progress:
    """A bar for each run that is under way; where there is no terminal, a few lines for each run."""

    settings: StudySettings
    console: Console
    bars: Progress = field(init=False)

    def __post_init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[state]}"),
        )
        self.bars = Progress(
            *columns, TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal
        )
        self._tasks: dict[tuple[str, int], TaskID] = {}
        self._lines: dict[tuple[str, int], int] = {}

    def __enter__(self) -> "_Progress":
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def begin(self, run: tuple[str, int]) -> None:
        """Show that a run has started."""
        self._tasks[run] = self.bars.add_task(self._name(*run), total=1.0, state="starting")

    def update(self, run: tuple[str, int], point: dict[str, Any]) -> None:
        """Show a step of a run."""
        share, name = min(point["share"], 1.0), self._name(*run)
        state = (
            f"step {point['step']:4d}  accuracy {point['accuracy']:4.0%}  "
            f"{point['kept_tokens'] / max(point['rollouts'], 1):5.1f} tokens kept of each rollout"
        )
        if self.console.is_terminal:
            self.bars.update(self._tasks[run], completed=share, state=state)
        elif share * LINES_PER_RUN >= self._lines.setdefault(run, 0) + 1:
            self._lines[run] = int(share * LINES_PER_RUN)
            self.console.print(
                f"{name:<9}  {share:4.0%}  {point['seconds']:6.1f} s  {state}", highlight=False, markup=False
            )

    def end(self, run: ArmRun, done: int, total: int) -> None:
        """Replace the bar of a finished run by a line."""
        self.bars.remove_task(self._tasks.pop((run.arm, run.seed)))
        last = run.curve[-1]
        self.console.print(
            f"[{done}/{total}] {self._name(run.arm, run.seed)}: {last.step} steps, {last.seconds:.1f} s "
            f"({last.cpu_seconds:.1f} CPU s), {last.generated_tokens:,} tokens, {run.mean_kept_length:.1f} kept of "
            f"each rollout, accuracy {last.accuracy:.1%}",
            highlight=False,
            markup=False,
        )

    def _name(self, arm: str, seed: int) -> str:
        return self.settings.arms[arm].label + (f", seed {seed}" if len(self.settings.seeds) > 1 else "")


def _cores() -> int:
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on every system
        return max(1, os.cpu_count() or 1)
