"""The parser of every command: the fields of frozen dataclasses are the options, with hyphens or underscores.

It knows neither models nor commands, and imports neither torch nor a model.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from types import NoneType
from typing import Any, NoReturn, get_args

from prune_opd_hf.records.files import printable, read_yaml
from prune_opd_hf.records.settings import setting, typed

NULL = object()
"""What `null` on a command line is until the record is made: the parser has None for what nobody set."""


@dataclass(frozen=True, kw_only=True)
class QuietArguments:
    """For commands that take long."""

    quiet: bool = setting(
        False, "Show no progress: neither bars nor lines on the way, only results, warnings and errors."
    )


@dataclass(frozen=True, kw_only=True)
class SourceArguments:
    """Where a command takes a model, or its tokenizer, from."""

    revision: str | None = setting(None, "Branch, tag or commit of the model, where it comes from the Hub.")
    trust_remote_code: bool = setting(False, "Run the code that comes with a model that Transformers has none for.")

    def loading(self) -> dict[str, Any]:
        """The same as arguments of `from_pretrained`, those that were set."""
        given = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return {name: value for name, value in given.items() if value}


@dataclass(frozen=True, kw_only=True)
class LoadingArguments(SourceArguments, QuietArguments):
    """How a command loads the models that it is given by name."""

    dtype: str | None = setting(
        None,
        "Of every model that is loaded (in training the teacher too, unless teacher_model_init_kwargs has its own): "
        "auto (as saved), float32, bfloat16 or float16. Default: auto; float32 for weights to be trained.",
    )

    def loading(self) -> dict[str, Any]:
        """With the dtype, where it was set."""
        return super().loading() | ({} if self.dtype is None else {"dtype": self.dtype})


@dataclass(frozen=True, kw_only=True)
class VLLMArguments:
    """Where vLLM runs, for commands whose engine it may be."""

    vllm_mode: str = setting("colocate", "server: at vllm_server_base_url; colocate: in this process.")
    vllm_server_base_url: str | None = setting(
        None, "Of vLLM, started with the folder of the model that samples; several URLs separated by commas."
    )


def parse(
    records: Sequence[type],
    arguments: Sequence[str],
    command: str,
    *,
    description: str | None = None,
    positional: Sequence[str] = (),
    config: bool = False,
) -> tuple[Any, ...]:
    """Arguments of one command as its records.

    Args:
        records: dataclasses; their fields are the options, and no two of them share one.
        arguments: what follows the command.
        command: its name.
        description: what `--help` says of it.
        positional: fields that the leading words without a name stand for; a list takes all that are left.
        config: whether `--config FILE.yaml` gives values that the command line overrides; of several files the later ones override
            the earlier.

    Raises:
        ConfigError: a value that a record refuses; a config file that is not there, is not YAML or has an unknown field.
        SystemExit: code 2, with one line on standard error, for arguments that do not fit; code 0 after `--help`.

    Example:
        >>> from dataclasses import dataclass, field
        >>> @dataclass(frozen=True)
        ... class Arguments:
        ...     model: str
        ...     max_prompt_length: int = 8
        >>> parse([Arguments], ["org/model", "--max-prompt-length", "9"], "mine", positional=["model"])
        (Arguments(model='org/model', max_prompt_length=9),)
    """
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            sys.exit(fail(f"{message} (see {self.prog} --help)"))

    hints = [(item, item.type) for record in records for item in fields(record)]
    parser = Parser(tuple(records), prog=f"prune-opd {command}", allow_abbrev=False, description=description)
    for item, hint in hints:  # it leaves out their None, and records share fields
        item.type = hint
    null_means = [item.name for item, _ in hints if may_be_null(item)]
    for action in parser._actions:
        if action.dest in null_means:
            action.type = _or_null(action.type)
    needed = {action.dest: action.required for action in parser._actions}
    places = [name.upper() if needed[name] else f"[{name.upper()}]" for name in positional]
    parser.usage = " ".join([parser.prog, *places, "[OPTIONS]"])
    from_file: dict[str, Any] = {}
    if config:
        help_text = (
            "YAML file with any of these fields; the command line overrides it. Of several files the later ones win"
        )
        parser.add_argument("--config", action="append", help=help_text)
        known = [item.name for record in records for item in fields(record) if item.init]
        from_file = read_configs(split_configs(arguments)[0], known)
        for record in records:
            from_file = typed(record, from_file)
        for action in parser._actions:
            action.required = action.required and action.dest not in from_file
        parser.set_defaults(**from_file)
    parsed = vars(parser.parse_args(_with_names(arguments, positional)))
    made = []
    for record in records:
        # The parser has None for what nobody set; a file can mean it, and so can a field's own default.
        values = {
            item.name: None if parsed[item.name] is NULL else parsed[item.name]
            for item in fields(record)
            if item.init and (parsed[item.name] is not None or item.name in from_file or item.default is MISSING)
        }
        made.append(record(**values))
    if parsed.get("quiet"):
        silence_bars()
    return tuple(made)


def may_be_null(item: Any) -> bool:
    """Whether None is a value of this field and not its default, so that a command line must say it: `--max_prompt_length null`."""
    return NoneType in get_args(item.type) and item.default not in (None, MISSING)


def _or_null(read: Callable[[str], Any]) -> Callable[[str], Any]:
    @wraps(read)  # for the parser's error, which names the type
    def read_or_null(text: str) -> Any:
        return NULL if text == "null" else read(text)

    return read_or_null


def silence_bars() -> None:
    """Switch off the progress bars of the libraries that load models and data."""
    from datasets import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()  # with those of the Hub's client


def fail(message: str) -> int:
    """Print what is wrong on standard error, in one line but for the output of a failed process, and return the exit code, 2."""
    print(f"prune-opd: error: {printable(message, lines=True)}", file=sys.stderr)
    return 2


def _with_names(arguments: Sequence[str], positional: Sequence[str]) -> list[str]:
    """Leading words get the names of the fields that they stand for; those of the last field stay together."""
    words = list(arguments)
    count = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    named: list[str] = []
    for index, word in enumerate(words[:count]):
        named += [f"--{positional[index]}", word] if index < len(positional) else [word]
    return named + words[count:]


def split_configs(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that `--config` names, and the other arguments."""
    paths, rest, words = [], [], list(arguments)
    while words:
        word = words.pop(0)
        if word == "--config" and words:
            paths.append(words.pop(0))
        elif word.startswith("--config="):
            paths.append(word.partition("=")[2])
        else:
            rest.append(word)
    return paths, rest


def read_configs(paths: Sequence[str], known: Sequence[str] | None = None) -> dict[str, Any]:
    """The fields of YAML files, those of the later ones over the earlier."""
    return {name: value for path in paths for name, value in read_yaml(path, known).items()}
