"""`prune-opd preflight --model_name_or_path A --teacher_model_name_or_path B --dataset_name D --num_prompts 64`."""

import sys
from dataclasses import asdict, dataclass, fields, replace
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

from prune_opd_hf.cli.parser import LoadingArguments, VLLMArguments
from prune_opd_hf.errors import ConfigError
from prune_opd_hf.records.files import read_json
from prune_opd_hf.records.folders import refuse_used_folder
from prune_opd_hf.records.settings import NEEDED, setting


@dataclass(frozen=True)
class PreflightArguments(LoadingArguments, VLLMArguments):
    """Arguments of `prune-opd preflight`; those of `preflight` and of `PromptArguments` have their names."""

    model_name_or_path: str = setting(
        NEEDED, "Student: a Hub id or folder, of whole weights or of an adapter, or 'embedded'."
    )
    teacher_model_name_or_path: str = setting(
        NEEDED, "Teacher, likewise; its tokenizer alone with teacher_model_server_url."
    )
    dataset_name: str = setting(
        NEEDED, "Prompts: a Hub id, a .json/.jsonl/.parquet/.csv file with a column 'prompt', or 'embedded'."
    )
    dataset_config: str | None = setting(None, "Configuration of a Hub data set.")
    dataset_train_split: str = setting("train", "Split of a Hub data set.")
    prompt_column: str = setting("prompt", "Column with the prompts: text, or lists of messages.")
    prompt_suffix: str = setting("", "Appended to each prompt's text, or to the last user's message.")
    prompt_as_chat: bool = setting(False, "Make each plain text a user's message, for the chat template.")
    chat_template_kwargs: str | None = setting(None, "For the chat template, as JSON: '{\"enable_thinking\": false}'.")
    final_assistant_message: str = setting(
        "refuse", "A prompt that ends with the assistant's message: refuse, drop or prefill."
    )
    num_prompts: int = setting(64, "How many of them to take, from the beginning.")
    num_generations: int = setting(4, "Responses sampled to each prompt.")
    max_completion_length: int = setting(4096, "Cap on the response, that of the training.")
    max_prompt_length: int = setting(1024, "Prompts with more tokens are left out.")
    generation_batch_size: int = setting(64, "Sequences generated together: the most of a training, evaluations too.")
    drift_top_k: int = setting(16, "Candidates recorded at each position.")
    drift_min_length: int = setting(0, "No replayed setting stops a sequence before so many tokens.")
    check_every: int = setting(32, "Tokens between two teacher passes.")
    temperature: float = setting(1.0, "Of the sampling; 0 is greedy.")
    seed: int = setting(0, "Of the sampling.")
    engine: str = setting("loop", "Who samples: loop, continuous_batching or vllm, as rollout_engine in training.")
    eos_token_id: list[int] | None = setting(
        None, "Tokens that end a response. Default: all that either model or its tokenizer names."
    )
    teacher_model_server_url: str | None = setting(
        None, "Of vLLM servers that have the teacher, several separated by commas."
    )
    teacher_quantization_config: str | None = setting(None, "Load the teacher quantized, as in training; JSON.")
    teacher_revision: str | None = setting(None, "Branch, tag or commit of the teacher.")
    allow_renamed_special_tokens: bool = setting(
        False, "Let special tokens of different names pass; they are neither sampled nor compared."
    )
    max_tokens_per_micro_batch: int | None = setting(
        None, "Of the training: what an update then holds in memory. None: one row in a pass."
    )
    bf16: bool = setting(False, "Of the training: memory of an update under autocast.")
    gradient_checkpointing: bool = setting(False, "Of the training: memory of an update.")
    rollout_dtype: str | None = setting(None, "Of the training: 'bfloat16' holds a copy of the student to sample with.")
    compile_decoding: bool = setting(False, "Of the training: the student's KV cache stays in memory between steps.")
    output_dir: str = setting(
        "runs/preflight", "preflight.json, the figures and rollouts.safetensors (for prune-opd view) go here."
    )

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ConfigError(f"--num_prompts must be at least 1, got {self.num_prompts}")


def run(arguments: PreflightArguments) -> int:
    """Look at the pair, print the report, and leave it with its figures and rollouts; 1 where the pair will not work, else 0."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from prune_opd_hf.generation import VLLMSettings
    from prune_opd_hf.models.loading import load_tokenizer, quantized
    from prune_opd_hf.preflight.preflight_report import draw_preflight
    from prune_opd_hf.preflight.run_preflight import preflight
    from prune_opd_hf.tasks.pair import resolve_embedded
    from prune_opd_hf.teachers.served import ServedTeacher
    from prune_opd_hf.training.prompt_sources import PromptArguments, load_prompts
    from prune_opd_hf.training.prompts import need_column
    from prune_opd_hf.training.setting_rules import refuse_beside_server
    from prune_opd_hf.training.teachers import PROMPT_COLUMN

    how = arguments.teacher_quantization_config
    refuse_beside_server(arguments.teacher_model_server_url, teacher_quantization_config=how)
    refuse_used_folder(arguments.output_dir, "remove it, or choose another output_dir")
    given, known = asdict(arguments), signature(preflight).parameters
    settings = {name: value for name, value in given.items() if name in known}
    if arguments.chat_template_kwargs is not None:
        settings["chat_template_kwargs"] = read_json(arguments.chat_template_kwargs, "chat_template_kwargs")
    names = [item.name for item in fields(PromptArguments)]
    dataset = load_prompts(PromptArguments(**{name: given[name] for name in given.keys() & names}))
    need_column(PROMPT_COLUMN, dataset.column_names)
    prompts = [row[PROMPT_COLUMN] for row in islice(dataset, arguments.num_prompts)]
    theirs = replace(arguments, revision=arguments.teacher_revision).loading()
    teacher: Any = resolve_embedded(arguments.teacher_model_name_or_path, "teacher")
    if how is not None:
        asked = read_json(how, "teacher_quantization_config")
        theirs = quantized(theirs, asked, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.teacher_model_server_url is not None:
        settings["teacher_processing_class"] = load_tokenizer(teacher, "teacher", **theirs)
        teacher = ServedTeacher(arguments.teacher_model_server_url, top_k=arguments.drift_top_k)
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 150)
    with Progress(console=console, transient=True, disable=arguments.quiet or not console.is_terminal) as progress:
        bar = progress.add_task("rollouts", total=len(prompts) * arguments.num_generations)
        report = preflight(
            resolve_embedded(arguments.model_name_or_path, "student"),
            teacher,
            prompts,
            model_init_kwargs=arguments.loading(),
            teacher_model_init_kwargs=theirs,
            vllm=VLLMSettings.of(mode=arguments.vllm_mode, server_base_url=arguments.vllm_server_base_url),
            rollouts_path=output / "rollouts.safetensors",
            on_progress=lambda done, total, tokens: progress.update(
                bar,
                completed=done,
                description=f"rollouts, {tokens:,} tokens" if done < total else "trying settings on the rollouts",
            ),
            **settings,
        )
    report.show(console)
    report.save(output)
    draw_preflight(report, output)
    console.print(f"The report and its rollouts lie in {output}", highlight=False, markup=False, soft_wrap=True)
    return 0 if report.works else 1
