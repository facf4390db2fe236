"""The demo: a study of two arms, plain OPD and Prune-OPD, on the embedded task, in minutes and without a download.

Both students train side by side for the same seconds. Then the first student, both trained ones and the teacher answer fresh
problems, and both students are written as one would publish them: weights, tokenizer, records and card.
"""

import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Column
from rich.table import Table as TerminalTable
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from prune_opd_hf.evaluation import Estimate, EvaluationReport, evaluate_model
from prune_opd_hf.evaluation.benchmarks import chain_benchmark
from prune_opd_hf.hub import CardOptions, License, StudentRecords, build_bundle
from prune_opd_hf.hub.markdown import table
from prune_opd_hf.records.files import write_json
from prune_opd_hf.records.weights import weights_hash
from prune_opd_hf.study.arm_training import ArmRun
from prune_opd_hf.study.learning_curve import CurvePoint, spent_to_reach
from prune_opd_hf.study.run_study import STUDENTS_FOLDER, run_arms, student_path
from prune_opd_hf.study.study_page import write_study
from prune_opd_hf.study.study_settings import DEFAULT_ARMS, StudySettings
from prune_opd_hf.tasks import EMBEDDED, WEIGHTS, ChainTask, Problem

ARMS = {name: DEFAULT_ARMS[name] for name in ("none", "drift")}
STUDENT_FOLDERS = {"none": "student-opd", "drift": "student"}

CURVE_PROBLEMS = 256
"""Problems of each point of the learning curves; the table has its own, fresh ones."""

MAX_COMPLETION_LENGTH = 112
"""The task's longest trace, rounded up."""

TRAINING = {
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "num_generations": 1,
    "max_prompt_length": ChainTask().prompt_tokens,
    "max_completion_length": MAX_COMPLETION_LENGTH,
    "budget_initial": MAX_COMPLETION_LENGTH,
    "budget_minimum": 16,
    "budget_step": 16,
    "budget_margin": 16,
    "drift_metric": "overlap",
    "drift_top_k": 2,
    "drift_threshold": 0.5,
    "drift_weight_drop": 0.25,
    "drift_min_length": 0,
    "check_every": 8,
    "loss_top_k": 16,
}
"""Settings of both arms. The drift settings suit a vocabulary of 64, where a large top-k is mostly noise, and responses of a
hundred tokens."""


def demo_settings(seconds: float, seed: int, device: str, evaluation_problems: int) -> StudySettings:
    return StudySettings(
        model_name_or_path=EMBEDDED,
        teacher_model_name_or_path=EMBEDDED,
        dataset_name=EMBEDDED,
        seeds=(seed,),
        budgets={"seconds": seconds},
        training={**TRAINING, "use_cpu": device == "cpu"},
        arms=ARMS,
        evaluation_problems=min(CURVE_PROBLEMS, evaluation_problems),
        processes=len(ARMS),
    )


def run_demo(
    output_dir: str,
    *,
    seconds: float,
    seed: int,
    device: str,
    evaluation_problems: int,
    console: Console | None = None,
) -> None:
    """Train, evaluate, write everything into `output_dir` at once, and print the table; for the arguments see `prune-opd demo`.

    Raises:
        PruneOPDError: a training process failed; the message ends with its output.
    """
    console = Console(width=None if sys.stdout.isatty() else 110) if console is None else console
    transformers_logging.disable_progress_bar()
    settings = demo_settings(seconds, seed, device, evaluation_problems)
    command = f"prune-opd demo --seconds {seconds:g} --seed {seed} --device {device} --evaluation_problems {evaluation_problems}"
    final = Path(output_dir)
    final.parent.mkdir(parents=True, exist_ok=True)
    console.print(
        f"Two students train for {seconds:g} s each, side by side on {device}, on the same prompts and seeds: plain OPD and "
        "Prune-OPD. Evaluation time is not counted."
    )
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-") as unfinished:
        folder = Path(unfinished) / final.name
        trained_runs = run_arms(settings, folder, command=command, console=console, keep_students=True)
        runs = {run.arm: run for run in trained_runs}
        trained = {ARMS[arm].label: student_path(folder, arm, seed) for arm in runs}
        models = {"base student": WEIGHTS / "student", **trained, "teacher": WEIGHTS / "teacher"}
        problems = ChainTask().problems(evaluation_problems, seed=1_000_000 + seed, split="evaluation")
        with console.status("evaluating") as status:
            reports = {}
            for name, path in models.items():
                status.update(f"evaluating {name} on {len(problems)} fresh problems")
                reports[name] = _evaluate(path, name, problems, seed=seed, device=device)
        verdict = time_to_equal_accuracy(runs["none"].curve, runs["drift"].curve)
        rows = _rows(runs, reports)
        notes = f"On {len(problems)} fresh problems, sampled at temperature 1:\n\n{table(HEAD, rows)}\n\n{verdict}"
        write_study(settings, trained_runs, folder, command=command, notes=notes)
        write_json(folder / "results.json", {name: asdict(_accuracy(report)) for name, report in reports.items()})
        for arm, run in runs.items():
            _write_student(student_path(folder, arm, seed), folder / STUDENT_FOLDERS[arm], run, reports, problems[0])
        shutil.rmtree(folder / STUDENTS_FOLDER)
        folder.rename(final)
    console.print()
    columns = [Column(name, justify="right" if index else "left") for index, name in enumerate(HEAD)]
    shown = TerminalTable(*columns, title=f"Exact match on {len(problems)} fresh problems, sampled at temperature 1")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    console.print(verdict, highlight=False)
    _ask_student(final / STUDENT_FOLDERS["drift"], seed, console)
    console.print("\nWritten:")
    for name, what in {
        "student": "the Prune-OPD student as on the Hub: safetensors, tokenizer, generation config, records, card with figures of "
        "its training",
        "student-opd": "the plain OPD student, likewise",
        "README.md": "the comparison, with its figures",
        "figures": "accuracy against seconds and tokens, seconds by phase (PNG and CSV)",
        "report.json": "every number of the comparison; results.json has those of the table",
    }.items():
        if (final / name).exists():  # figures are left out where they cannot be drawn
            console.print(f"  {final / name}  {what}", highlight=False, soft_wrap=True)


def time_to_equal_accuracy(plain: Sequence[CurvePoint], pruned: Sequence[CurvePoint]) -> str:
    """A sentence: when did Prune-OPD reach the final accuracy of plain OPD?"""
    goal = plain[-1].accuracy
    mine, other = spent_to_reach(pruned, "seconds", goal), spent_to_reach(plain, "seconds", goal)
    if not other:
        return "Plain OPD did not get beyond its first accuracy in these seconds, so there is nothing to compare: raise --seconds."
    if mine is None:
        return (
            f"Prune-OPD did not reach plain OPD's final accuracy of {goal:.1%} in its {pruned[-1].seconds:.0f} s: with these "
            "settings pruning did not win here."
        )
    return (
        f"Prune-OPD first reached plain OPD's final accuracy ({goal:.1%} on the learning curve's problems) after {mine:.1f} s, "
        f"plain OPD after {other:.1f} s: {mine / other:.2f} of its time."
    )


def _evaluate(folder: Path, name: str, problems: Sequence[Problem], *, seed: int, device: str) -> EvaluationReport:
    return evaluate_model(
        AutoModelForCausalLM.from_pretrained(folder).to(device),
        [chain_benchmark(problems)],
        processing_class=AutoTokenizer.from_pretrained(folder),
        num_generations=1,
        temperature=1.0,
        top_p=1.0,
        max_completion_length=MAX_COMPLETION_LENGTH,
        seed=seed,
        slots=256,
        model_name=name,
        model_hash=weights_hash(folder),
        progress=False,
    )


def _accuracy(report: EvaluationReport) -> Estimate:
    return report["chain"].metrics["avg@1"]


def _write_student(
    trained: Path, target: Path, run: ArmRun, reports: Mapping[str, EvaluationReport], problem: Problem
) -> None:
    """Save a trained student with its records and its card, as it would be published."""
    label = ARMS[run.arm].label
    comparisons = {name: (report,) for name, report in reports.items() if name != label}
    build_bundle(
        trained,
        name=f"{label} student of the embedded chain task",
        records=StudentRecords(run.summary, (reports[label],), comparisons),
        options=CardOptions(
            license=License("apache-2.0"),
            example_prompt=problem.prompt,
            limitations=("It solves one made-up task, chains of arithmetic modulo 10, and nothing else.",),
        ),
    ).save(target)


HEAD = ("model", "accuracy [95%]", "seconds", "steps", "tokens sampled", "tokens kept")


def _rows(runs: Mapping[str, ArmRun], reports: Mapping[str, EvaluationReport]) -> list[list[str]]:
    costs = {
        ARMS[arm].label: [f"{end.seconds:.1f}", f"{end.step}", f"{end.generated_tokens:,}", f"{end.kept_tokens:,}"]
        for arm, end in ((arm, run.curve[-1]) for arm, run in runs.items())
    }
    return [[name, str(_accuracy(report)), *costs.get(name, [""] * 4)] for name, report in reports.items()]


def _ask_student(folder: Path, seed: int, console: Console) -> None:
    """Load the saved student as anybody would, and let it answer one fresh problem."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    problem = ChainTask().problems(1, seed=2_000_000 + seed, split="evaluation")[0]
    inputs = tokenizer(problem.prompt, return_tensors="pt")
    sequences = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_COMPLETION_LENGTH)
    response = tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :])
    console.print(
        "\nLoaded with AutoModelForCausalLM.from_pretrained. Asked for the last digit of this chain from the digit behind "
        f"the =:\n  {problem.prompt}\nIt answers (right: {problem.answer}):\n  {response}",
        highlight=False,
        markup=False,
    )
