"""Trains one student of the demo in a process of its own: `python -m prune_opd_hf.study.demo.worker SETTINGS.json`.

It tells its parent how it goes in lines of JSON on standard output, and leaves the student, its training summary and its
learning curve in its folder. Two such processes side by side, one thread each, see the same machine at the same time, so
their seconds compare.
"""

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from prune_opd_hf.study.demo.settings import CAP_TOKENS, training_settings
from prune_opd_hf.study.learning_curve import BudgetedRun, CurvePoint, exact_match
from prune_opd_hf.study.worker_processes import say
from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer
from prune_opd_hf.training import PruneOPDConfig, PruneOPDTrainer

TRAINING_PROBLEMS = 16_384
CURVE_POINTS = 12
CURVE_FILE = "curve.json"


@dataclass(frozen=True)
class WorkerSettings:
    """What the parent hands to one worker, as JSON.

    Attributes:
        pruning: "drift" or "none".
        seconds: training seconds, evaluations left out.
        seed: of prompts and rollouts.
        device: "cpu" or "cuda".
        folder: where the student and its records go.
        curve_problems: problems of each point of the learning curve.
    """

    pruning: str
    seconds: float
    seed: int
    device: str
    folder: str
    curve_problems: int


def train_one(settings: WorkerSettings) -> None:
    """Train, evaluate along the way, and leave everything in the worker's folder."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if settings.device == "cpu":
        torch.set_num_threads(1)
    task, folder = ChainTask(), Path(settings.folder)
    clock = BudgetedRun({"seconds": settings.seconds}, CURVE_POINTS, tell=partial(_tell, settings))
    trainer = PruneOPDTrainer(
        model=load_student(),
        teacher_model=load_teacher(),
        args=PruneOPDConfig(
            **training_settings(settings.pruning, settings.seed, settings.device, str(folder / "trainer"))
        ),
        train_dataset=task.dataset(TRAINING_PROBLEMS, seed=settings.seed),
        eval_dataset=task.dataset(settings.curve_problems, seed=settings.seed + 1, split="evaluation"),
        processing_class=load_tokenizer(),
        compute_metrics=exact_match,
        callbacks=[clock],
    )
    curve = clock.run(trainer)
    trainer.save_model(str(folder / "student"))
    trainer.summary(
        dataset="embedded chain task",
        student_base="embedded student (cold start)",
        teacher="embedded teacher",
        command=f"prune-opd demo --seconds {settings.seconds:g} --seed {settings.seed}",
    ).save(folder)
    (folder / CURVE_FILE).write_text(json.dumps([asdict(point) for point in curve], indent=1), encoding="utf-8")


def _tell(settings: WorkerSettings, trainer: PruneOPDTrainer, spent: CurvePoint) -> None:
    """Tell the parent how it goes, after each step."""
    say(
        {
            "pruning": settings.pruning,
            "step": spent.step,
            "seconds": spent.seconds,
            "accuracy": spent.accuracy,
            "generated_tokens": spent.generated_tokens,
            "kept_tokens": spent.kept_tokens,
            "saved_tokens": trainer.counts.saved,
            "cap": trainer.budget.length if settings.pruning == "drift" else CAP_TOKENS,
        }
    )


if __name__ == "__main__":
    train_one(WorkerSettings(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
