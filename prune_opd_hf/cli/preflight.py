"""`prune-opd preflight --model_name_or_path A --teacher_model_name_or_path B --dataset_name D --num_prompts 64`."""

import sys
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.records.files import read_json

NOT_OF_PREFLIGHT = "model_name_or_path teacher_model_name_or_path dataset_name num_prompts dtype output_dir".split()


@dataclass(frozen=True)
class PreflightArguments:
    """Arguments of `prune-opd preflight`; all but `NOT_OF_PREFLIGHT` are those of `preflight`."""

    model_name_or_path: str = field(metadata={"help": "Student: a Hub id, a folder, or 'embedded'."})
    teacher_model_name_or_path: str = field(metadata={"help": "Teacher: a Hub id, a folder, or 'embedded'."})
    dataset_name: str = field(
        metadata={"help": "Prompts: a Hub id, a .json/.jsonl/.parquet/.csv file with a column 'prompt', or 'embedded'."}
    )
    num_prompts: int = field(default=64, metadata={"help": "How many of them to take, from the beginning."})
    num_generations: int = field(default=4, metadata={"help": "Responses sampled to each prompt."})
    max_completion_length: int = field(default=4096, metadata={"help": "Cap on the response, that of the training."})
    max_prompt_length: int = field(default=1024, metadata={"help": "Prompts with more tokens are left out."})
    generation_batch_size: int = field(default=64, metadata={"help": "Sequences generated together."})
    drift_top_k: int = field(default=16, metadata={"help": "Candidates recorded at each position."})
    drift_min_length: int = field(
        default=0, metadata={"help": "No replayed setting stops a sequence before so many tokens."}
    )
    check_every: int = field(default=32, metadata={"help": "Tokens between two teacher passes."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; 0 is greedy."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})
    eos_token_id: list[int] | None = field(
        default=None,
        metadata={"help": "Tokens that end a response. Default: all that either model or its tokenizer names."},
    )
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": "For the chat template, as JSON: '{\"enable_thinking\": false}'."}
    )
    dtype: str = field(default="auto", metadata={"help": "To load the weights with; auto takes the saved one."})
    output_dir: str = field(
        default="runs/preflight",
        metadata={"help": "preflight.json, the figures and rollouts.safetensors (for prune-opd view) go here."},
    )

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ConfigError(f"--num_prompts must be at least 1, got {self.num_prompts}")


def run(arguments: PreflightArguments) -> int:
    """Look at the pair, print the report, and leave it with its figures and rollouts; 1 where the pair will not work, else 0."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from prune_opd_hf.preflight.preflight_report import draw_preflight
    from prune_opd_hf.preflight.run_preflight import preflight
    from prune_opd_hf.tasks.pair import resolve_embedded
    from prune_opd_hf.training.prompts import PromptArguments, load_prompts

    if arguments.dtype != "auto" and not isinstance(getattr(torch, arguments.dtype, None), torch.dtype):
        raise ConfigError(f"--dtype must be auto, float32, bfloat16 or float16, got {arguments.dtype!r}")
    settings = asdict(arguments)
    if arguments.chat_template_kwargs is not None:
        settings["chat_template_kwargs"] = read_json(arguments.chat_template_kwargs, "chat_template_kwargs")
    student, teacher, source, count, dtype, folder = (settings.pop(name) for name in NOT_OF_PREFLIGHT)
    dataset = load_prompts(PromptArguments(dataset_name=source))
    if dataset.column_names is not None and "prompt" not in dataset.column_names:
        raise InputError(f"{source} needs a column 'prompt'; it has {', '.join(dataset.column_names)}")
    prompts = [row["prompt"] for row in islice(dataset, count)]
    output = Path(folder)
    output.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 150)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("rollouts", total=len(prompts) * arguments.num_generations)
        report = preflight(
            resolve_embedded(student, "student"),
            resolve_embedded(teacher, "teacher"),
            prompts,
            model_init_kwargs={"dtype": dtype},
            rollouts_path=output / "rollouts.safetensors",
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
            **settings,
        )
    report.save(output)
    draw_preflight(report, output)
    report.show(console)
    console.print(f"Report, figures and rollouts lie in {output}", highlight=False, markup=False, soft_wrap=True)
    return 0 if report.works else 1
