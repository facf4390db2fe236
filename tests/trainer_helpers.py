"""A trainer on a short embedded task: what several test files start from."""

from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer
from prune_opd_hf.training import PruneOPDConfig, PruneOPDTrainer

TASK = ChainTask(operations=3)


def settings(tmp_path, **changes):
    return PruneOPDConfig(
        **{
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 2,
            "max_completion_length": 14,
            "drift_metric": "overlap",
            "drift_top_k": 2,
            "drift_threshold": 0.5,
            "drift_weight_drop": 0.25,
            "drift_min_length": 0,
            "budget_minimum": 4,
            "budget_step": 2,
            "budget_margin": 2,
            "check_every": 4,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            **changes,
        }
    )


def make_trainer(tmp_path, student=None, teacher=None, problems=32, callbacks=None, **changes):
    return PruneOPDTrainer(
        model=load_student() if student is None else student,
        teacher_model=load_teacher() if teacher is None else teacher,
        args=settings(tmp_path, **changes),
        train_dataset=TASK.dataset(problems, seed=0),
        eval_dataset=TASK.dataset(8, seed=1, split="evaluation"),
        processing_class=load_tokenizer(),
        callbacks=callbacks,
    )


def prompts_of(trainer, count):
    return trainer._collate([trainer.train_dataset[index] for index in range(count)])
