"""Trains one arm of a study with one seed, in a process of its own: `python -m prune_opd_hf.study.arm_training ORDER.json`.

It reports each step as one line of JSON on standard output, and leaves one file, written atomically: which run it was, its
learning curve and its training summary. Where the order names a folder, the student is saved there.
"""

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction
from transformers.utils import logging as transformers_logging

from prune_opd_hf.errors import FileFormatError, InputError, PruneOPDError
from prune_opd_hf.evaluation.grading import GradingPool
from prune_opd_hf.records.files import dump_record, first_line, load_record, parse_record, read_json, write_text
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.study.learning_curve import BudgetedTraining, CurvePoint
from prune_opd_hf.study.study_settings import StudySettings
from prune_opd_hf.tasks import EMBEDDED, ChainTask, is_correct, resolve_embedded
from prune_opd_hf.training import PruneOPDConfig, PruneOPDTrainer
from prune_opd_hf.training.prompts import PromptArguments, load_prompts

FILE_KIND = "prune_opd_hf.study_run"
FILE_VERSION = 1


@dataclass(frozen=True)
class ArmRun:
    """One finished run.

    Attributes:
        arm, seed: which.
        fingerprint: of the study's settings and the arm's; a finished run counts only for the same.
        pruning_length: mean length of the truncated responses, where the arm takes it from another arm.
        curve: its learning curve.
        summary: how it was trained, with the metrics of every step.
    """

    arm: str
    seed: int
    fingerprint: str
    pruning_length: float | None
    curve: tuple[CurvePoint, ...]
    summary: TrainingSummary

    @property
    def mean_kept_length(self) -> float:
        """Response tokens that each rollout kept, on average over the run."""
        return self.curve[-1].kept_tokens / max(self.curve[-1].rollouts, 1)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_text(path, dump_record(self, FILE_KIND, FILE_VERSION))

    @classmethod
    def load(cls, path: Path) -> "ArmRun":
        """Read what `save` wrote.

        Raises:
            FileFormatError: it is something else.
        """
        try:
            return load_record(cls, path, FILE_KIND, FILE_VERSION, "run of a study")
        except FileFormatError as error:
            raise FileFormatError(f"{error}: remove it") from error


@dataclass(frozen=True)
class TrainingOrder:
    """What a process is asked to train.

    Attributes:
        study: the settings.
        arm, seed: which of its runs.
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
    student: str | None = None
    command: str | None = None


def train_arm(order: TrainingOrder, work: Path) -> ArmRun:
    """Train, evaluate along the way, save the student where it is asked for, and return the run.

    Args:
        order: what to train.
        work: a folder for the trainer's own files.
    """
    study, seed = order.study, order.seed
    own = dict(study.arms[order.arm].training)
    if order.pruning_length is not None:
        own["pruning_length"] = order.pruning_length
    budget = BudgetedTraining(study.budgets, study.points, on_step=_print_progress)
    with contextlib.ExitStack() as stack:
        args = PruneOPDConfig(
            **{
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "dataloader_pin_memory": False,
                "use_cpu": not torch.cuda.is_available(),
                **study.training,
                **own,
                "output_dir": os.fspath(work),
                "seed": seed,
                "data_seed": seed,
                "max_steps": 10_000_000,  # the budgets end the run
            }
        )
        trainer = PruneOPDTrainer(
            model=resolve_embedded(study.model_name_or_path, "student"),
            teacher_model=resolve_embedded(study.teacher_model_name_or_path, "teacher"),
            args=args,
            callbacks=[budget],
            **_datasets(study, seed, stack),
        )
        curve = budget.train(trainer)
    summary = trainer.summary(
        dataset=study.dataset_name,
        student_base=study.model_name_or_path,
        teacher=study.teacher_model_name_or_path,
        command=order.command,
    )
    if order.student is not None:
        trainer.save_model(order.student)
        summary.save(order.student)
    return ArmRun(order.arm, seed, study.fingerprint(order.arm), order.pruning_length, tuple(curve), summary)


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
    if "answer" not in (problems.column_names or ()):
        raise InputError(
            f"{study.eval_dataset_name} needs a column answer, got {', '.join(problems.column_names or ())}"
        )
    pool = stack.enter_context(GradingPool())

    def share_of_right_answers(prediction: EvalPrediction) -> dict[str, float]:
        verdicts = pool.grade(
            [completion.text for completion in prediction.predictions],
            [str(row["answer"]) for row in prediction.label_ids],
        )
        return {"accuracy": sum(verdict.correct for verdict in verdicts) / len(verdicts)}

    return {
        "train_dataset": load_prompts(PromptArguments(dataset_name=study.dataset_name)),
        "eval_dataset": problems.select(range(min(study.evaluation_problems, len(problems)))),
        "compute_metrics": share_of_right_answers,
    }


def _print_progress(point: CurvePoint, share: float) -> None:
    print(json.dumps({"share": share, **asdict(point)}), flush=True)


def main(order_file: str) -> int:
    """Entry point of the process: 0, or 2 with one line on standard error."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    order = parse_record(TrainingOrder, read_json(Path(order_file), "order"), "the order")
    try:
        with tempfile.TemporaryDirectory() as work:
            run = train_arm(order, Path(work))
    except BrokenPipeError:  # the process that started this run is gone
        return 1
    except (PruneOPDError, OSError) as error:
        print(first_line(error), file=sys.stderr)
        return 2
    run.save(Path(order.result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
