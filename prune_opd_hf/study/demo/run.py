"""The demo from start to end: train both students side by side, evaluate, save, card, figures, table."""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from prune_opd_hf.errors import PruneOPDError
from prune_opd_hf.hub.card import License, build_card
from prune_opd_hf.hub.folder import StudentRecords, student_facts
from prune_opd_hf.records.evaluation_report import EvaluationReport
from prune_opd_hf.records.figures import Line, draw_heatmap, draw_lines
from prune_opd_hf.study.demo.report import embedded_report
from prune_opd_hf.study.demo.settings import ARMS, CAP_TOKENS, DemoArguments
from prune_opd_hf.study.demo.worker import CURVE_FILE, WorkerSettings
from prune_opd_hf.study.learning_curve import CurvePoint, point_from_json, spent_to_reach
from prune_opd_hf.study.worker_processes import WorkerProcesses
from prune_opd_hf.tasks import ChainTask
from prune_opd_hf.tasks.pair import WEIGHTS
from prune_opd_hf.training import TrainingSummary
from prune_opd_hf.training.metrics import bin_width

CURVE_PROBLEMS = 256
"""Problems of each point of the learning curves; the table has its own, more and fresh."""

STUDENT_FOLDERS = ("student-opd", "student")
"""Where the students of plain OPD and of Prune-OPD go."""


@dataclass(frozen=True)
class Arm:
    """One trained student: where it lies, how it was trained, its learning curve."""

    name: str
    folder: Path
    summary: TrainingSummary
    curve: list[CurvePoint]

    @property
    def student(self) -> Path:
        """The student's folder."""
        return self.folder / "student"


def run_demo(arguments: DemoArguments, console: Console | None = None) -> int:
    """Run the demo and print its table.

    Returns:
        The exit code, 0.

    Raises:
        PruneOPDError: a training process failed; the message ends with what it said.
    """
    console = Console(width=None if sys.stdout.isatty() else 110) if console is None else console
    transformers_logging.disable_progress_bar()
    final = Path(arguments.output)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-") as unfinished:
        output = Path(unfinished) / "demo"
        output.mkdir()
        console.print(
            f"Two students train for {arguments.seconds:g} s each, side by side on {arguments.device}, on the same prompts and "
            f"seeds: plain OPD and Prune-OPD. Evaluations along the way come on top."
        )
        arms = _train_both(arguments, output, console)
        reports = _evaluate_all(arguments, arms, console)
        _write_student(arms, reports, output)
        figures = _draw_figures(arms, output)
        _write_card(arms, reports, figures, output, arguments)
        _keep_records(arms, reports, output)
        output.rename(final)
    console.print()
    console.print(_table(arms, reports, arguments))
    console.print(_verdict(arms))
    _try_student(final / "student", arguments.seed, console)
    console.print("\nWhere everything lies:")
    for path, what in (
        ("student", "the Prune-OPD student in Hub form: safetensors, tokenizer, generation config, card"),
        ("student-opd", "the plain OPD student, likewise"),
        ("figures", "accuracy against tokens and seconds, overlap by position, budget (PNG, with CSV)"),
        ("results.json", "every number of the table"),
    ):
        console.print(f"  {final / path}  {what}", highlight=False, soft_wrap=True)
    return 0


# ---------------------------------------------------------------------- training


def _train_both(arguments: DemoArguments, output: Path, console: Console) -> list[Arm]:
    folders = {pruning: output / f"arm-{pruning}" for pruning in ARMS}
    with WorkerProcesses() as workers:
        for pruning, folder in folders.items():
            folder.mkdir()
            settings = WorkerSettings(
                pruning=pruning,
                seconds=arguments.seconds,
                seed=arguments.seed,
                device=arguments.device,
                folder=str(folder),
                curve_problems=min(CURVE_PROBLEMS, arguments.evaluation_problems),
            )
            (folder / "settings.json").write_text(json.dumps(asdict(settings)), encoding="utf-8")
            workers.start(pruning, "prune_opd_hf.study.demo.worker", folder / "settings.json")
        _show_progress(arguments, workers, console)
    return [
        Arm(
            name=ARMS[pruning],
            folder=folder,
            summary=TrainingSummary.load(folder),
            curve=[point_from_json(point) for point in json.loads((folder / CURVE_FILE).read_text(encoding="utf-8"))],
        )
        for pruning, folder in folders.items()
    ]


def _show_progress(arguments: DemoArguments, workers: WorkerProcesses, console: Console) -> None:
    """Two bars until both processes have closed their output; plain lines where there is no terminal."""
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.completed:5.1f}/{task.total:g} s"),
        TextColumn(
            "accuracy {task.fields[accuracy]:>5}  kept {task.fields[kept]:>7} tokens  budget {task.fields[budget]:>3}"
        ),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = {
            pruning: progress.add_task(name, total=arguments.seconds, accuracy="-", kept="-", budget=CAP_TOKENS)
            for pruning, name in ARMS.items()
        }
        told = dict.fromkeys(ARMS, 0.0)
        for said in workers.events():
            pruning, event = said.name, said.said
            if event is None:
                if said.exit_code != 0:
                    raise PruneOPDError(f"training {ARMS[pruning]} failed (exit code {said.exit_code}):\n{said.errors}")
                continue
            shown = {
                "accuracy": f"{event['accuracy']:.0%}",
                "kept": f"{event['kept_tokens']:,}",
                "budget": event["cap"],
            }
            progress.update(bars[pruning], completed=min(event["seconds"], arguments.seconds), **shown)
            if not console.is_terminal and event["seconds"] >= told[pruning]:
                told[pruning] += arguments.seconds / 5
                console.print(
                    f"{ARMS[pruning]:<9} {event['seconds']:6.1f} s  step {event['step']:4d}  accuracy {shown['accuracy']}  "
                    f"kept {shown['kept']} tokens  budget {shown['budget']}",
                    highlight=False,
                )


# ---------------------------------------------------------------------- evaluation


def _evaluate_all(arguments: DemoArguments, arms: list[Arm], console: Console) -> dict[str, EvaluationReport]:
    models = {
        "base student": WEIGHTS / "student",
        **{arm.name: arm.student for arm in arms},
        "teacher": WEIGHTS / "teacher",
    }
    task = ChainTask()
    problems = task.problems(arguments.evaluation_problems, seed=1_000_000 + arguments.seed, split="evaluation")
    reports = {}
    with console.status("evaluating") as status:
        for name, folder in models.items():
            status.update(f"evaluating {name} on {len(problems)} fresh problems")
            reports[name] = embedded_report(
                folder, name, problems, max_new_tokens=CAP_TOKENS, seed=arguments.seed, device=arguments.device
            )
    return reports


# ---------------------------------------------------------------------- what is left behind


def _write_student(arms: list[Arm], reports: dict[str, EvaluationReport], output: Path) -> None:
    """Both students in Hub form, with their records. The Trainer's own settings file is not part of a student."""
    for arm, name in zip(arms, STUDENT_FOLDERS, strict=True):
        target = output / name
        arm.student.rename(target)
        (target / "training_args.bin").unlink(missing_ok=True)
        others = {other: (report,) for other, report in reports.items() if other != arm.name}
        for path, content in StudentRecords(arm.summary, (reports[arm.name],), others).files().items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(content)


def _draw_figures(arms: list[Arm], output: Path) -> dict[str, Path]:
    folder = output / "figures"
    pruned = arms[1]
    history = [entry for entry in pruned.summary.history if "budget/cap" in entry]
    prefix = "prune/overlap_by_position/"
    positions = sorted({name for entry in history for name in entry if name.startswith(prefix)})
    steps = [entry["step"] for entry in history]
    return {
        "Accuracy against sampled tokens": draw_lines(
            folder / "accuracy_against_tokens.png",
            [Line(arm.name, [p.generated_tokens for p in arm.curve], [p.accuracy for p in arm.curve]) for arm in arms],
            title="Exact match on held-out problems",
            x_label="tokens sampled in training",
            y_label="accuracy",
            y_range=(0, 1),
        ),
        "Accuracy against training seconds": draw_lines(
            folder / "accuracy_against_seconds.png",
            [Line(arm.name, [p.seconds for p in arm.curve], [p.accuracy for p in arm.curve]) for arm in arms],
            title="Exact match on held-out problems",
            x_label="training seconds",
            y_label="accuracy",
            y_range=(0, 1),
        ),
        "Overlap by position over training": draw_heatmap(
            folder / "overlap_by_position.png",
            [[_number(entry.get(name)) for entry in history] for name in positions],
            x=steps,
            y=[int(name.removeprefix(prefix)) + (bin_width(CAP_TOKENS) - 1) / 2 for name in positions],
            title="Overlap of the kept tokens by position (Prune-OPD)",
            x_label="step",
            y_label="response position (middle of the bin)",
            value_label="overlap",
        ),
        "Response budget and effective length": draw_lines(
            folder / "budget.png",
            [
                Line("budget", steps, [entry["budget/cap"] for entry in history]),
                Line("mean kept length", steps, [entry["prune/response_length_mean"] for entry in history]),
                Line("mean effective length", steps, [entry["prune/effective_length_mean"] for entry in history]),
            ],
            title="Response budget over training (Prune-OPD)",
            x_label="step",
            y_label="tokens",
        ),
    }


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _write_card(
    arms: list[Arm],
    reports: dict[str, EvaluationReport],
    figures: dict[str, Path],
    output: Path,
    arguments: DemoArguments,
) -> None:
    for arm, name in zip(arms, STUDENT_FOLDERS, strict=True):
        target = output / name
        shown = {}
        if name == "student":
            (target / "figures").mkdir()
            for caption, path in figures.items():
                (target / "figures" / path.name).write_bytes(path.read_bytes())
                shown[caption] = f"figures/{path.name}"
        card = build_card(
            arm.summary,
            [reports[arm.name]],
            name=f"{arm.name} student of the embedded chain task",
            license=License("apache-2.0"),
            facts=student_facts(target),
            comparisons={other: [report] for other, report in reports.items() if other != arm.name},
            figures=shown,
            example_prompt=ChainTask().problems(1, seed=arguments.seed, split="evaluation")[0].prompt,
            max_new_tokens=CAP_TOKENS,
            limitations=("It solves one made-up task, chains of arithmetic modulo 10, and nothing else.",),
        )
        card.save(target / "README.md")


def _keep_records(arms: list[Arm], reports: dict[str, EvaluationReport], output: Path) -> None:
    results = {
        "models": {name: report["embedded"].metrics["avg@1"].__dict__ for name, report in reports.items()},
        "training": {
            arm.name: {
                "seconds": arm.summary.wall_seconds,
                "phase_seconds": dict(arm.summary.phase_seconds),
                "steps": arm.summary.steps,
                "generated_tokens": arm.summary.generated_tokens,
                "kept_tokens": arm.summary.kept_tokens,
                "curve": [asdict(point) for point in arm.curve],
            }
            for arm in arms
        },
        "versions": dict(arms[0].summary.versions),
        "hardware": arms[0].summary.hardware,
    }
    (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    for arm in arms:
        for leftover in sorted(arm.folder.rglob("*"), reverse=True):
            leftover.rmdir() if leftover.is_dir() else leftover.unlink()
        arm.folder.rmdir()


# ---------------------------------------------------------------------- what the user sees


def _table(arms: list[Arm], reports: dict[str, EvaluationReport], arguments: DemoArguments) -> Table:
    table = Table(title=f"Exact match on {arguments.evaluation_problems} fresh problems, sampled at temperature 1")
    for name, justify in (("model", "left"), ("accuracy [95%]", "right"), ("seconds", "right"), ("steps", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("tokens sampled", justify="right")
    table.add_column("tokens kept", justify="right")
    trained = {arm.name: arm.summary for arm in arms}
    for name, report in reports.items():
        cells = [name, f"{report['embedded'].metrics['avg@1']}"]
        if name in trained:
            summary = trained[name]
            cells += [f"{summary.wall_seconds:.1f}", f"{summary.steps}"]
            cells += [f"{summary.generated_tokens:,}", f"{summary.kept_tokens:,}"]
        table.add_row(*cells)
    return table


def first_reached(curve: list[CurvePoint], accuracy: float) -> float | None:
    """Seconds at which a learning curve first reaches an accuracy, on the straight line between two points; None if never.

    Example: half-way between 10 s and 20 s.
        >>> curve = [CurvePoint(0, 0.0, 0, 0.1), CurvePoint(5, 10.0, 0, 0.4), CurvePoint(9, 20.0, 0, 0.8)]
        >>> first_reached(curve, 0.6), first_reached(curve, 0.9)
        (15.0, None)
    """
    return spent_to_reach(curve, "seconds", accuracy)


def _verdict(arms: list[Arm]) -> str:
    plain, pruned = arms
    goal = plain.curve[-1].accuracy
    mine, other = first_reached(pruned.curve, goal), first_reached(plain.curve, goal)
    if not other:
        return "Plain OPD did not get beyond its first accuracy in these seconds, so there is nothing to compare: give --seconds."
    if mine is None:
        return (
            f"Prune-OPD did not reach plain OPD's final accuracy of {goal:.1%} in its {pruned.curve[-1].seconds:.0f} s: with "
            "these settings pruning did not win here."
        )
    return (
        f"Prune-OPD first reached plain OPD's final accuracy ({goal:.1%} on the learning curve's problems) after {mine:.1f} s, "
        f"plain OPD after {other:.1f} s: {mine / other:.2f} of its time."
    )


def _try_student(folder: Path, seed: int, console: Console) -> None:
    """Load the saved student as anybody would, and let it answer one fresh problem."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    problem = ChainTask().problems(1, seed=2_000_000 + seed, split="evaluation")[0]
    inputs = tokenizer(problem.prompt, return_tensors="pt")
    sequences = model.generate(**inputs, do_sample=False, max_new_tokens=CAP_TOKENS)
    response = tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :])
    console.print(
        f"\nLoaded back with AutoModelForCausalLM.from_pretrained. Asked:\n  {problem.prompt}\nIt answers (right: "
        f"{problem.answer}):\n  {response}",
        highlight=False,
        markup=False,
    )
