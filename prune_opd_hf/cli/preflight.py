"""The command line of preflight: `prune-opd preflight --student A --teacher B --dataset D --prompts 64`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.preflight.drawing import draw_preflight
from prune_opd_hf.preflight.run import preflight
from prune_opd_hf.tasks.pair import WEIGHTS
from prune_opd_hf.training.script import EMBEDDED, ScriptArguments, load_prompts


@dataclass(frozen=True)
class PreflightArguments:
    """Arguments of `prune-opd preflight`."""

    student: str = field(metadata={"help": "Hub id or folder of the student, or 'embedded'."})
    teacher: str = field(metadata={"help": "Hub id or folder of the teacher, or 'embedded'."})
    dataset: str = field(
        metadata={"help": "Prompts: a Hub id, a .json/.jsonl/.parquet/.csv file with a column 'prompt', or 'embedded'."}
    )
    prompts: int = field(default=64, metadata={"help": "How many of them to take, from the beginning."})
    rollouts_per_prompt: int = field(default=4, metadata={"help": "Responses sampled to each prompt."})
    max_new_tokens: int = field(default=4096, metadata={"help": "Cap on the response, that of the training."})
    max_prompt_length: int = field(default=1024, metadata={"help": "Prompts with more tokens are left out."})
    rows_at_once: int = field(default=64, metadata={"help": "Sequences generated together."})
    top_k: int = field(default=16, metadata={"help": "Candidates recorded at each position."})
    check_every: int = field(default=32, metadata={"help": "Tokens between two teacher passes."})
    min_length: int = field(default=0, metadata={"help": "No replayed setting stops a sequence before so many tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; 0 is greedy."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})
    dtype: str = field(default="auto", metadata={"help": "To load the weights with; auto takes the saved one."})
    output_dir: str = field(
        default="runs/preflight",
        metadata={"help": "preflight.json, the figures and rollouts.safetensors (for prune-opd view) go here."},
    )

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ConfigError(f"--prompts must be at least 1, got {self.prompts}")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ConfigError(f"--dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")


def run(arguments: PreflightArguments) -> int:
    """Look at the pair, print the report, and leave it with its figures and rollouts.

    Returns:
        0; 1 where the pair will not work.

    Raises:
        ConfigError, InputError, FileNotFoundError: as `preflight`.
    """
    console = Console(width=None if sys.stdout.isatty() else 150)
    prompts = _prompts(arguments)
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("rollouts", total=len(prompts) * arguments.rollouts_per_prompt)
        report = preflight(
            str(WEIGHTS / "student") if arguments.student == EMBEDDED else arguments.student,
            str(WEIGHTS / "teacher") if arguments.teacher == EMBEDDED else arguments.teacher,
            prompts,
            rollouts_per_prompt=arguments.rollouts_per_prompt,
            max_new_tokens=arguments.max_new_tokens,
            max_prompt_length=arguments.max_prompt_length,
            rows_at_once=arguments.rows_at_once,
            top_k=arguments.top_k,
            check_every=arguments.check_every,
            min_length=arguments.min_length,
            temperature=arguments.temperature,
            seed=arguments.seed,
            model_kwargs={"dtype": arguments.dtype},
            rollouts_path=output / "rollouts.safetensors",
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    report.save(output)
    draw_preflight(report, output)
    report.show(console)
    console.print(f"Report, figures and rollouts lie in {output}", highlight=False, markup=False, soft_wrap=True)
    return 0 if report.works else 1


def _prompts(arguments: PreflightArguments) -> list[Any]:
    dataset = load_prompts(ScriptArguments(dataset_name=arguments.dataset))
    if dataset.column_names is not None and "prompt" not in dataset.column_names:
        raise InputError(f"{arguments.dataset} needs a column 'prompt'; it has {', '.join(dataset.column_names)}")
    return [row["prompt"] for row, _ in zip(dataset, range(arguments.prompts), strict=False)]
