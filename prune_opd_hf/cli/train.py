"""`prune-opd train`: settings from YAML and the command line, then a run that leaves a student with its training summary.

examples/train_prune_opd.py is the same in plain sight, to copy and change; both are made of the functions here.
"""

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from prune_opd_hf.cli.adapters import AdapterArguments
from prune_opd_hf.cli.parser import LoadingArguments, may_be_null, parse, read_configs, split_configs
from prune_opd_hf.errors import ConfigError
from prune_opd_hf.models.loading import published_name
from prune_opd_hf.records.files import publishable
from prune_opd_hf.records.folders import refuse_used_folder
from prune_opd_hf.records.settings import NEEDED, setting
from prune_opd_hf.tasks import resolve_embedded
from prune_opd_hf.training.checkpoints import last_complete_checkpoint
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.prompt_sources import PromptArguments, load_evaluation_prompts, load_prompts
from prune_opd_hf.training.run_output import PlainProgressLine
from prune_opd_hf.training.trainer import PruneOPDTrainer


@dataclass(frozen=True, kw_only=True)
class ScriptArguments(PromptArguments, LoadingArguments, AdapterArguments):
    """What to train on what. `embedded` stands for the task, student and teacher that the package carries."""

    model_name_or_path: str = setting(
        NEEDED, "Student: a Hub id or a folder, of whole weights or of an adapter to train further, or 'embedded'."
    )
    teacher_revision: str | None = setting(None, "Branch, tag or commit of the teacher.")


RECORDS = (ScriptArguments, PruneOPDConfig)


def main(arguments: list[str]) -> int:
    """Train as the arguments say, and return the exit code, 0."""
    script, args = parse_arguments(arguments)
    command = repeatable_command(arguments)  # now: the config file may be another when training ends
    checkpoint = checkpoint_to_resume(args)
    trainer = PruneOPDTrainer(
        model=resolve_embedded(script.model_name_or_path, "student"),
        args=args,
        train_dataset=load_prompts(script),
        eval_dataset=load_evaluation_prompts(script) if args.eval_strategy != "no" else None,
        peft_config=script.peft_config(),
    )
    if script.quiet:
        trainer.remove_callback(PlainProgressLine)
    trainer.train(resume_from_checkpoint=checkpoint)
    save_student(trainer, script, command)
    trainer.accelerator.end_training()  # a process group left to the interpreter's end may abort it
    return 0


def save_student(trainer: PruneOPDTrainer, script: ScriptArguments, command: str) -> None:
    """Leave the student with its training summary in `output_dir`; with `push_to_hub` both are published in one commit."""
    folder, student = Path(trainer.args.output_dir), script.model_name_or_path
    if published_name(resolve_embedded(student, "student")) != trainer.student_name:
        student = trainer.student_name or student  # the base of an adapter that was trained further
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        trainer.summary(
            dataset=script.dataset_name,
            student_base=student,
            teacher=trainer.args.teacher_model_name_or_path or trainer.teacher_name,
            command=command,
        ).save(folder)
    trainer.save_model()  # after the summary, which the card needs
    if trainer.is_world_process_zero():
        print(f"The student lies in {folder}")


def checkpoint_to_resume(args: PruneOPDConfig) -> str | None:
    """What `resume_from_checkpoint` names: a folder, or with "true" the last complete checkpoint in `output_dir`. Without one yet
    the run begins anew, so that one command may be repeated until it ends. A folder in use is refused otherwise.
    """
    chosen, output = args.resume_from_checkpoint, Path(args.output_dir)
    if chosen is not None and str(chosen).lower() == "true":
        return last_complete_checkpoint(output)
    if chosen is not None and str(chosen).lower() != "false":
        return chosen
    refuse_used_folder(output, "choose another output_dir, or go on with --resume_from_checkpoint true")
    return None


def parse_arguments(arguments: Sequence[str]) -> tuple[ScriptArguments, PruneOPDConfig]:
    """Settings from `--config FILE.yaml` with the rest of the command line over them; see `cli/parser.py: parse`."""
    script, config = parse(RECORDS, arguments, "train", description=__doc__.splitlines()[0], config=True)
    script.check_adapter()
    theirs = replace(script, revision=script.teacher_revision)
    for name, of_model in (("model_init_kwargs", script), ("teacher_model_init_kwargs", theirs)):
        setattr(config, name, {**of_model.loading(), **config.dictionary(name)})
    if settings := script.quantization(script.dtype):
        config.model_init_kwargs = {
            "quantization_config": settings,
            **config.dictionary("model_init_kwargs"),
        }
    config.disable_tqdm = config.disable_tqdm or script.quiet
    for name in ("eval_dataset_name", "eval_dataset_config"):
        if getattr(script, name) is not None and config.eval_strategy == "no":
            raise ConfigError(f"{name} has no effect without evaluations: set eval_strategy to steps or epoch")
    if script.dataset_streaming and config.max_steps < 0:
        raise ConfigError("dataset_streaming needs max_steps, for a stream has no length")
    return script, config


def written_out(arguments: Sequence[str]) -> list[str]:
    """The arguments with the fields of their config files before all others, which override them."""
    paths, rest = split_configs(arguments)
    words: list[str] = []
    no_default = [item.name for record in RECORDS for item in fields(record) if may_be_null(item)]
    for name, value in read_configs(paths).items():
        values = value if isinstance(value, list) else [value] if value is not None or name in no_default else []
        texts = [each if isinstance(each, str) else json.dumps(each) for each in values]
        words += [f"--{name}", *texts] if texts else []
    return words + rest


def repeatable_command(arguments: Sequence[str]) -> str:
    """The command as it may be published, for anybody: with what stands in its config file, without secrets, the author's place on
    the Hub and addresses of servers, and with this machine's paths cut to their last part.

    Example:
        >>> repeatable_command(["--hub-token", "hf_x", "--output_dir=/home/me/runs/a", "--push_to_hub", "--top_p", "0.9"])
        "prune-opd train '--output_dir=a (local)' --top_p 0.9"
    """
    kept: list[str] = []
    left_out = False
    for word in written_out(arguments):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            setting = name[2:].replace("-", "_")
            left_out = setting.startswith(("hub_", "push_to_hub")) or not publishable({setting: ""})
        if not left_out:
            whole = not equals or word.startswith("{")
            kept.append(_public(word) if whole else f"{name}={_public(value)}")
    return shlex.join(["prune-opd", "train", *kept])


def _public(word: str) -> str:
    """A word of a command, or what stands in it as JSON, as it may be published."""
    value: Any = word
    if word.startswith("{"):
        with suppress(ValueError):
            value = json.loads(word)
    value = publishable(value)
    return re.sub(r"https?://[^\s\"',]+", "URL", value if isinstance(value, str) else json.dumps(value))
