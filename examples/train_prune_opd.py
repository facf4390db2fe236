"""Distil a teacher into a student with Prune-OPD. `prune-opd train` does the same; this file is there to be copied and changed.

    python examples/train_prune_opd.py --config examples/configs/embedded.yaml
    accelerate launch examples/train_prune_opd.py --config examples/configs/embedded.yaml --learning_rate 1e-4

    python examples/train_prune_opd.py \
        --model_name_or_path Qwen/Qwen3-1.7B-Base \
        --teacher_model_name_or_path Qwen/Qwen3-4B \
        --dataset_name org/prompts \
        --max_completion_length 4096 \
        --output_dir runs/student \
        --push_to_hub

`--help` explains every field; any of them may stand in the YAML file, and the command line overrides the file.
"""

import sys

from prune_opd_hf import PruneOPDTrainer
from prune_opd_hf.cli.train import (
    checkpoint_to_resume,
    parse_arguments,
    repeatable_command,
    save_student,
)
from prune_opd_hf.tasks import resolve_embedded
from prune_opd_hf.training.prompt_sources import load_evaluation_prompts, load_prompts
from prune_opd_hf.training.run_output import PlainProgressLine


def main(arguments: list[str]) -> None:
    """Train, and leave the student with its training summary in `output_dir`."""
    script_args, training_args = parse_arguments(arguments)
    command = repeatable_command(
        arguments
    )  # for the record of the run; the config file may be another when training ends
    checkpoint = checkpoint_to_resume(training_args)

    # Prompts: any dataset with a column "prompt" (text, or a list of messages) will do.
    train_dataset = load_prompts(script_args)
    eval_dataset = load_evaluation_prompts(script_args) if training_args.eval_strategy != "no" else None

    # Models: Hub ids, folders, or models that you have loaded. "embedded" is the pair that the package carries.
    student = resolve_embedded(script_args.model_name_or_path, "student")
    teacher = resolve_embedded(training_args.teacher_model_name_or_path, "teacher")

    trainer = PruneOPDTrainer(
        model=student,
        teacher_model=teacher,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=script_args.peft_config(),
        # compute_metrics=...: takes an EvalPrediction of completions and dataset rows, returns a dict of metrics
    )
    if script_args.quiet:
        trainer.remove_callback(PlainProgressLine)
    trainer.train(resume_from_checkpoint=checkpoint)

    # Weights, tokenizer and training summary; with push_to_hub they are published in one commit with a model card.
    save_student(trainer, script_args, command)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
