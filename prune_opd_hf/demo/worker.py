"""Trains one student of the demo in a process of its own: `python -m prune_opd_hf.demo.worker SETTINGS.json`.

It tells its parent how it goes in lines of JSON on standard output, and leaves the student, its training summary and its
learning curve in its folder. Two such processes side by side, one thread each, see the same machine at the same time, so
their seconds compare.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction, TrainerCallback
from transformers.utils import logging as transformers_logging

from prune_opd_hf.demo.settings import CAP_TOKENS, training_settings
from prune_opd_hf.tasks import ChainTask, is_correct, load_student, load_teacher, load_tokenizer
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


@dataclass(frozen=True)
class CurvePoint:
    """One point of a learning curve.

    Attributes:
        step, seconds, generated_tokens: what had been spent, evaluations left out.
        accuracy: exact match on held-out problems, sampled at temperature 1.
    """

    step: int
    seconds: float
    generated_tokens: int
    accuracy: float


class _Clock(TrainerCallback):
    """Evaluates along the way and ends the run when its seconds are spent."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.curve: list[CurvePoint] = []
        self.trainer: PruneOPDTrainer | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        spent = self._spent()
        self._tell(state.global_step)
        control.should_training_stop = spent >= self.settings.seconds
        due = len(self.curve) * self.settings.seconds / CURVE_POINTS
        control.should_evaluate = spent >= min(due, self.settings.seconds)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        assert self.trainer is not None
        generated = self.trainer.counts.generated
        self.curve.append(CurvePoint(state.global_step, self._spent(), generated, metrics["eval_accuracy"]))

    def _spent(self) -> float:
        assert self.trainer is not None
        return sum(self.trainer.phase_seconds.values())

    def _tell(self, step: int) -> None:
        assert self.trainer is not None
        event = {
            "pruning": self.settings.pruning,
            "step": step,
            "seconds": self._spent(),
            "accuracy": self.curve[-1].accuracy,
            "generated_tokens": self.trainer.counts.generated,
            "kept_tokens": self.trainer.counts.kept,
            "saved_tokens": self.trainer.counts.saved,
            "cap": self.trainer.budget.length if self.settings.pruning == "drift" else CAP_TOKENS,
        }
        print(json.dumps(event), flush=True)


def exact_match(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of the embedded task."""
    pairs = list(zip(prediction.predictions, prediction.label_ids, strict=True))
    right = [is_correct(completion.text, row["answer"], ended=completion.ended) for completion, row in pairs]
    return {"accuracy": sum(right) / len(right)}


def train_one(settings: WorkerSettings) -> None:
    """Train, evaluate along the way, and leave everything in the worker's folder."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if settings.device == "cpu":
        torch.set_num_threads(1)
    task, folder = ChainTask(), Path(settings.folder)
    clock = _Clock(settings)
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
    clock.trainer = trainer
    # The log lines of the Trainer go to nobody here: standard output carries the events.
    trainer.remove_callback(
        next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback")
    )
    trainer.train()
    trainer.save_model(str(folder / "student"))
    trainer.summary(
        dataset="embedded chain task",
        student_base="embedded student (cold start)",
        teacher="embedded teacher",
        command=f"prune-opd demo --seconds {settings.seconds:g} --seed {settings.seed}",
    ).save(folder)
    (folder / CURVE_FILE).write_text(json.dumps([asdict(point) for point in clock.curve], indent=1), encoding="utf-8")


if __name__ == "__main__":
    train_one(WorkerSettings(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
