"""Runs a study: every arm with every seed, side by side where there are cores; what is finished stays finished.

Each run is a process of its own that leaves one file. A study that was killed takes up where it stopped: runs whose file is
there, and was made with these settings, are not repeated.
"""

import json
import os
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prune_opd_hf.errors import ConfigError, PruneOPDError
from prune_opd_hf.study.drawing import draw_study
from prune_opd_hf.study.markdown import study_page
from prune_opd_hf.study.report import StudyReport, write_text
from prune_opd_hf.study.settings import StudySettings
from prune_opd_hf.study.worker import ArmResult, run_fingerprint
from prune_opd_hf.study.worker_processes import WorkerEvent, WorkerProcesses

WORKER = "prune_opd_hf.study.worker"
RUNS_FOLDER = "runs"
NOTES_FILE = "notes.md"
"""What a reader adds by hand in the study's folder; it becomes part of the page and stays when the report is made again."""


def run_study(
    settings: StudySettings,
    output: str | os.PathLike[str],
    *,
    command: str = "run_study(...)",
    console: Console | None = None,
) -> StudyReport:
    """Run what is not finished yet, and write the report and its figures into `output`.

    Args:
        settings: what to compare.
        output: folder of the study. It may hold finished runs of the same settings.
        command: what repeats the study, for the report.
        console: where progress is shown; standard output by default.

    Returns:
        The report, which also lies in `output` as report.json and README.md.

    Raises:
        ConfigError: `output` holds a run of other settings.
        PruneOPDError: a run failed; the message ends with what it said. The other runs were finished first.
    """
    console = Console() if console is None else console
    folder = Path(output)
    runs = settings.runs()
    results = {}
    for arm, seed in runs:
        path = result_path(folder, arm, seed)
        if path.is_file():
            results[arm, seed] = ArmResult.load(path)
            if results[arm, seed].fingerprint != run_fingerprint(settings, arm):
                raise ConfigError(
                    f"{path} is a run of other settings: give the study another --output_dir, or remove {folder / RUNS_FOLDER}"
                )
    if results:
        console.print(f"{len(results)} of {len(runs)} runs are finished already.", highlight=False)
    failures: dict[tuple[str, int], str] = {}
    with tempfile.TemporaryDirectory() as scratch, WorkerProcesses() as workers, _progress(console) as progress:
        bar = progress.add_task("runs", total=len(runs), completed=len(results))
        waiting = [run for run in runs if run not in results]
        at_once = settings.processes or _cores()

        def start_what_is_ready() -> None:
            for run in list(waiting):
                if workers.running >= at_once:
                    return
                arm, seed = run
                needs = settings.arms[arm].length_from
                if needs is not None and (needs, seed) in failures:
                    failures[run] = f"needs the run {needs} of seed {seed}, which failed"
                    waiting.remove(run)
                elif needs is None or (needs, seed) in results:
                    length = None if needs is None else round(results[needs, seed].mean_kept_length, 2)
                    asked = Path(scratch) / f"{arm}-{seed}.json"
                    asked.write_text(json.dumps(_order(settings, arm, seed, length, folder)), encoding="utf-8")
                    workers.start(f"{arm}/{seed}", WORKER, asked)
                    waiting.remove(run)

        start_what_is_ready()
        for event in workers.events():
            arm, seed_text = event.name.rsplit("/", 1)
            run = (arm, int(seed_text))
            if not event.ended:
                continue
            path = result_path(folder, *run)
            if event.exit_code == 0 and path.is_file():
                results[run] = ArmResult.load(path)
                progress.update(bar, completed=len(results))
                _tell(console, settings, results[run], len(results), len(runs))
            else:
                failures[run] = _last_words(event)
            start_what_is_ready()
    if failures:
        (arm, seed), words = next(iter(failures.items()))
        raise PruneOPDError(
            f"{len(failures)} of {len(runs)} runs of the study failed, the first being {arm} with seed {seed}; the command "
            f"takes up where it stopped. It said:\n{words}"
        )
    report = StudyReport.of(settings, [results[run] for run in runs])
    report.save(folder)
    figures = draw_study(report, [results[run] for run in runs], folder)
    notes = folder / NOTES_FILE
    page = study_page(
        report,
        command,
        {caption: path.name for caption, path in figures.items()},
        notes=notes.read_text(encoding="utf-8") if notes.is_file() else "",
    )
    write_text(folder / "README.md", page)
    return report


def result_path(folder: Path, arm: str, seed: int) -> Path:
    """Where a run leaves its result."""
    return folder / RUNS_FOLDER / f"{arm}-seed{seed}.json"


def _order(settings: StudySettings, arm: str, seed: int, length: float | None, folder: Path) -> dict:
    return {
        "study": settings.to_json(),
        "arm": arm,
        "seed": seed,
        "pruning_length": length,
        "result": os.path.abspath(result_path(folder, arm, seed)),
    }


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _tell(console: Console, settings: StudySettings, result: ArmResult, done: int, total: int) -> None:
    last = result.curve[-1]
    console.print(
        f"[{done}/{total}] {settings.arms[result.arm].label}, seed {result.seed}: {last.step} steps, "
        f"{last.generated_tokens:,} tokens, {last.cpu_seconds:.0f} CPU s, kept {result.mean_kept_length:.1f} a rollout, "
        f"accuracy {last.accuracy:.1%}",
        highlight=False,
        markup=False,
    )


def _last_words(event: WorkerEvent) -> str:
    words = "\n".join(event.errors.splitlines()[-12:])
    return words or f"nothing; exit code {event.exit_code}"


def _cores() -> int:
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on every system
        return max(1, os.cpu_count() or 1)
