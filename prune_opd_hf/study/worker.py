"""Trains one arm of a study with one seed: `python -m prune_opd_hf.study.worker SETTINGS.json`.

It leaves one file, whole or not at all: what it was asked, what it spent, its learning curve, what it logged.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction
from transformers.utils import logging as transformers_logging

from prune_opd_hf.errors import FileFormatError, InputError, PruneOPDError
from prune_opd_hf.evaluation.grading import GradingPool
from prune_opd_hf.study.learning_curve import BudgetedRun, CurvePoint, exact_match, point_from_json
from prune_opd_hf.study.settings import EMBEDDED, StudySettings
from prune_opd_hf.study.worker_processes import say
from prune_opd_hf.tasks import ChainTask, load_tokenizer
from prune_opd_hf.tasks.pair import WEIGHTS
from prune_opd_hf.training import PruneOPDConfig, PruneOPDTrainer
from prune_opd_hf.training.script import ScriptArguments, load_prompts

LOGGED = ("budget/", "prune/", "kl/", "student/", "reward/", "grad_norm", "time/", "step", "loss")
"""What of a run's log is kept."""


@dataclass(frozen=True)
class ArmResult:
    """One finished run.

    Attributes:
        arm, seed: which.
        fingerprint: of the study's settings and the arm's; a finished run counts only for the same.
        pruning_length: mean length of the cuts, where the arm has one.
        curve: its learning curve.
        phase_seconds: wall seconds by phase.
        history: what was logged, one mapping a step.
        hardware, versions: what it ran on.
    """

    arm: str
    seed: int
    fingerprint: str
    pruning_length: float | None
    curve: list[CurvePoint]
    phase_seconds: dict[str, float]
    history: list[dict[str, float]]
    hardware: str | None
    versions: dict[str, str]

    @property
    def mean_kept_length(self) -> float:
        """Response tokens that each rollout kept, on average over the run."""
        return self.curve[-1].kept_tokens / max(self.curve[-1].rollouts, 1)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(asdict(self), file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's files are for their owner alone
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> "ArmResult":
        """Read what `save` wrote.

        Raises:
            FileFormatError: it is something else.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**values, "curve": [point_from_json(point) for point in values["curve"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise FileFormatError(f"{path} is not the result of a study's run: remove it ({error})") from error


def train_arm(study: StudySettings, arm: str, seed: int, pruning_length: float | None, work: Path) -> ArmResult:
    """Train, evaluate along the way, and return the result.

    Args:
        study: the settings.
        arm, seed: which of its runs.
        pruning_length: mean length of the cuts, for an arm that takes it from another.
        work: a folder for the trainer's own files.
    """
    own = dict(study.arms[arm].training)
    if pruning_length is not None:
        own["pruning_length"] = pruning_length
    clock = BudgetedRun(study.budgets, study.points, tell=lambda trainer, spent: say(_event(arm, seed, spent)))
    with contextlib.ExitStack() as stack:
        data = _prepare(study, seed, stack)
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
        trainer = PruneOPDTrainer(args=args, callbacks=[clock], **data)
        curve = clock.run(trainer)
    summary = trainer.summary(dataset=study.dataset)
    return ArmResult(
        arm=arm,
        seed=seed,
        fingerprint=run_fingerprint(study, arm),
        pruning_length=pruning_length,
        curve=curve,
        phase_seconds={name: float(seconds) for name, seconds in trainer.phase_seconds.items()},
        history=[_logged(entry) for entry in summary.history if "loss" in entry],
        hardware=summary.hardware,
        versions=dict(summary.versions),
    )


def run_fingerprint(study: StudySettings, arm: str) -> str:
    """What a run of this arm depends on, besides its seed and the length it takes from another arm."""
    return json.dumps(
        [study.fingerprint(), dict(study.arms[arm].training), study.arms[arm].length_from], sort_keys=True
    )


def _prepare(study: StudySettings, seed: int, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Models, data and grading, as keyword arguments of the trainer."""
    if study.student == EMBEDDED:
        task = ChainTask()
        return {
            "model": os.fspath(WEIGHTS / "student"),
            "teacher_model": os.fspath(WEIGHTS / "teacher"),
            "processing_class": load_tokenizer(),
            "train_dataset": task.dataset(study.training_prompts, seed=seed),
            "eval_dataset": task.dataset(study.evaluation_problems, seed=seed + 1, split="evaluation"),
            "compute_metrics": exact_match,
        }
    assert study.evaluation_dataset is not None  # the settings have seen to it
    problems = load_prompts(ScriptArguments(dataset_name=study.evaluation_dataset))
    if "answer" not in (problems.column_names or ()):
        raise InputError(
            f"{study.evaluation_dataset} needs a column answer, got {', '.join(problems.column_names or ())}"
        )
    pool = stack.enter_context(GradingPool())
    return {
        "model": study.student,
        "teacher_model": study.teacher,
        "train_dataset": load_prompts(ScriptArguments(dataset_name=study.dataset)),
        "eval_dataset": problems.select(range(min(study.evaluation_problems, len(problems)))),
        "compute_metrics": graded_by(pool),
    }


def graded_by(pool: GradingPool) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` by math-verify: the share of right answers."""

    def grade(prediction: EvalPrediction) -> dict[str, float]:
        verdicts = pool.grade(
            [completion.text for completion in prediction.predictions],
            [str(row["answer"]) for row in prediction.label_ids],
        )
        return {"accuracy": sum(verdict.correct for verdict in verdicts) / len(verdicts)}

    return grade


def _logged(entry: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: round(float(value), 6)
        for name, value in entry.items()
        if name.startswith(LOGGED) and isinstance(value, (int, float))
    }


def _event(arm: str, seed: int, spent: CurvePoint) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, **asdict(spent)}


def main(settings_file: str) -> int:
    """Entry point of the process: 0, or 2 with one line on standard error."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    asked = json.loads(Path(settings_file).read_text(encoding="utf-8"))
    study = StudySettings.from_json(asked["study"])
    try:
        with tempfile.TemporaryDirectory() as work:
            result = train_arm(study, asked["arm"], asked["seed"], asked["pruning_length"], Path(work))
    except BrokenPipeError:  # whoever started this run is gone, and so is the reason for it
        return 1
    except (PruneOPDError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    result.save(Path(asked["result"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
