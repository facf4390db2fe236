"""Trains one arm of a study with one seed, in a process of its own: `python -m prune_opd_hf.study.arm_training < ORDER.json`.

It reports each step as one line of JSON on standard output, and leaves one file, written atomically: which run it was, its
learning curve and its training summary. Where the order names a folder, the student is saved there.
"""

import contextlib
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from datasets import disable_progress_bars
from transformers import EvalPrediction, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from prune_opd_hf.errors import ConfigError, InputError, PruneOPDError
from prune_opd_hf.evaluation.grading import GradingPool
from prune_opd_hf.records.files import SavedRecord, first_line, parse_record
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.study.learning_curve import CurvePoint, spent
from prune_opd_hf.study.study_settings import StudySettings
from prune_opd_hf.tasks import EMBEDDED, ChainTask, is_correct, resolve_embedded
from prune_opd_hf.training import PruneOPDTrainer
from prune_opd_hf.training.prompt_sources import PromptArguments, load_prompts


@dataclass(frozen=True)
class ArmRun(SavedRecord):
    """One finished run.

    Attributes:
        fingerprint: of the study's settings and the arm's; a finished run counts only for the same.
        pruning_length: mean length of the truncated responses, where the arm takes it from another arm.
        summary: how it was trained, with the metrics of every step.
    """

    KIND: ClassVar[str] = "prune_opd_hf.study_run"
    FILE_NAME: ClassVar[str] = "run.json"

    arm: str
    seed: int
    fingerprint: str
    pruning_length: float | None
    curve: tuple[CurvePoint, ...]
    summary: TrainingSummary

    def __post_init__(self) -> None:
        if not self.curve:
            raise ConfigError("a run needs a learning curve of at least one point")

    @property
    def mean_kept_length(self) -> float:
        """Response tokens that each rollout kept, on average over the run."""
        return self.curve[-1].kept_tokens / max(self.curve[-1].rollouts, 1)


@dataclass(frozen=True)
class TrainingOrder:
    """What a process is asked to train.

    Attributes:
        pruning_length: mean length of the truncated responses, for an arm that takes it from another one.
        result: file for the `ArmRun`.
        student: folder for the student; None does not save it.
        command: what repeats the study, for the training summary.
    """

    study: StudySettings
    arm: str
    seed: int
    pruning_length: float | None
    result: str
    student: str | None
    command: str | None


def train_arm(order: TrainingOrder, work: str) -> ArmRun:
    """Train, evaluate along the way, save the student where it is asked for, and return the run; the trainer's own files go into
    the folder `work`."""
    study, seed = order.study, order.seed
    with contextlib.ExitStack() as stack:
        trainer = PruneOPDTrainer(
            model=resolve_embedded(study.model_name_or_path, "student"),
            args=study.config(order.arm, seed, order.pruning_length, work),
            **_datasets(study, seed, stack),
        )
        trainer.remove_callback(PrinterCallback)  # standard output is for messages
        budget = BudgetedTraining(trainer, study)
        trainer.add_callback(budget)
        trainer.train()
    summary = trainer.summary(
        dataset=study.dataset_name,
        student_base=study.model_name_or_path,
        teacher=study.teacher_model_name_or_path,
        command=order.command,
    )
    if order.student is not None:
        trainer.save_model(order.student)
        summary.save(order.student)
    return ArmRun(order.arm, seed, study.fingerprint(order.arm), order.pruning_length, tuple(budget.curve), summary)


class BudgetedTraining(TrainerCallback):
    """Evaluates along the way, and stops training once every one of the study's budgets is spent.

    Evaluations come at the start, at equal steps of the progress towards the slowest budget, and in the step in which any
    budget is spent, so that runs can be compared there without interpolating far. Each step is printed as one line of JSON:
    what was spent, the newest accuracy, and the share of the slowest budget.

    Attributes:
        curve: the points so far.
    """

    def __init__(self, trainer: PruneOPDTrainer, study: StudySettings) -> None:
        self.trainer, self.study = trainer, study
        self.curve: list[CurvePoint] = []
        self._reached: set[str] = set()
        self._cpu_seconds, self._cpu_mark = 0.0, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first point, before any step."""
        self.trainer.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step, and decide whether to evaluate and whether to stop."""
        now = time.process_time()
        self._cpu_seconds, self._cpu_mark = self._cpu_seconds + now - self._cpu_mark, now
        point = self._point(state.global_step, self.curve[-1].accuracy)
        progress = {axis: spent(point, axis) / amount for axis, amount in self.study.budgets.items()}
        reached = {axis for axis, share in progress.items() if share >= 1}
        slowest = min(progress.values())
        control.should_training_stop = slowest >= 1
        control.should_evaluate = len(self.curve) <= slowest * self.study.points or bool(reached - self._reached)
        self._reached = reached
        print(json.dumps({"share": slowest, **asdict(point)}), flush=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Add a point; the time of the evaluation is not counted."""
        self.curve.append(self._point(state.global_step, metrics["eval_accuracy"]))
        self._cpu_mark = time.process_time()

    def _point(self, step: int, accuracy: float) -> CurvePoint:
        counts, seconds = self.trainer.counts, sum(self.trainer.phase_seconds.values())
        return CurvePoint(step, seconds, counts.generated, accuracy, self._cpu_seconds, counts.kept, counts.rollouts)


def exact_match(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of the embedded task: the share of right answers."""
    pairs = zip(prediction.predictions, prediction.label_ids, strict=True)
    right = [is_correct(completion.text, row["answer"], ended=completion.ended) for completion, row in pairs]
    return {"accuracy": sum(right) / len(right)}


def _datasets(study: StudySettings, seed: int, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Prompts, evaluation problems and their grading, as keyword arguments of the trainer."""
    if study.model_name_or_path == EMBEDDED:
        task = ChainTask()
        return {
            "train_dataset": task.dataset(study.training_prompts, seed=seed),
            "eval_dataset": task.dataset(study.evaluation_problems, seed=seed + 1, split="evaluation"),
            "compute_metrics": exact_match,
        }
    assert study.eval_dataset_name is not None  # the settings have checked it
    problems = load_prompts(PromptArguments(dataset_name=study.eval_dataset_name))
    columns = problems.column_names or ()
    if "answer" not in columns:
        raise InputError(f"{study.eval_dataset_name} needs a column answer, got {', '.join(columns)}")
    datasets = {
        "train_dataset": load_prompts(PromptArguments(dataset_name=study.dataset_name)),
        "eval_dataset": problems.select(range(min(study.evaluation_problems, len(problems)))),
    }
    if study.answer_type == "chain":
        return {**datasets, "compute_metrics": exact_match}
    pool = stack.enter_context(GradingPool())

    def share_of_right_answers(prediction: EvalPrediction) -> dict[str, float]:
        responses = [completion.text for completion in prediction.predictions]
        verdicts = pool.grade(responses, [str(row["answer"]) for row in prediction.label_ids])
        return {"accuracy": sum(verdict.correct for verdict in verdicts) / len(verdicts)}

    return {**datasets, "compute_metrics": share_of_right_answers}


def main() -> int:
    """Entry point of the process: 0, or 2 with one line on standard error."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    order = parse_record(TrainingOrder, json.load(sys.stdin), "the order")
    try:
        with tempfile.TemporaryDirectory() as work:
            run = train_arm(order, work)
    except BrokenPipeError:  # the process that started this run is gone
        return 1
    except (PruneOPDError, OSError) as error:
        print(first_line(error), file=sys.stderr)
        return 2
    run.save(order.result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
