"""Where a script's prompts come from: a Hub name, a local file, or the embedded task, streamed or not, in any usual shape.

Whatever cannot be read is one line that names the file and, where it can be told, the line in it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.tasks import ChainTask
from prune_opd_hf.training.data import PROMPT_COLUMN

EMBEDDED = "embedded"
"""Name of the embedded task's student, teacher and data, which need no download."""

FILE_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class PromptArguments:
    """Which prompts a script trains on."""

    dataset_name: str = field(
        default="",
        metadata={
            "help": "Prompts: a Hub id, a .json/.jsonl/.parquet/.csv file with a column 'prompt', or 'embedded'."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Stream instead of downloading; needs max_steps."})
    prompt_column: str = field(
        default=PROMPT_COLUMN, metadata={"help": "Column with the prompts: text, or lists of messages."}
    )
    prompt_suffix: str = field(
        default="", metadata={"help": "Put behind each prompt's text, or behind its last message."}
    )
    prompt_as_chat: bool = field(
        default=False, metadata={"help": "Make each plain text a user's message, for the chat template."}
    )


def load_prompts(arguments: PromptArguments) -> Dataset | IterableDataset:
    """The prompts to train on, in the column `prompt`.

    Raises:
        FileNotFoundError: a local file that is not there.
        InputError: a file, column or data set that cannot be read.
    """
    dataset = _load(arguments)
    columns = dataset.column_names
    if arguments.prompt_column != PROMPT_COLUMN:
        if columns is not None and arguments.prompt_column not in columns:
            raise InputError(f"the dataset has no column {arguments.prompt_column!r}; it has {', '.join(columns)}")
        if columns is not None and PROMPT_COLUMN in columns:
            dataset = dataset.remove_columns(PROMPT_COLUMN)
        dataset = dataset.rename_column(arguments.prompt_column, PROMPT_COLUMN)
    if arguments.prompt_suffix or arguments.prompt_as_chat:
        if columns is not None and PROMPT_COLUMN not in (dataset.column_names or columns):
            raise InputError(f"the dataset needs a column {PROMPT_COLUMN!r}; it has {', '.join(columns)}")
        rows = dataset.map(
            lambda row: {"shaped": shaped_prompt(row[PROMPT_COLUMN], arguments.prompt_suffix, arguments.prompt_as_chat)}
        )
        dataset = rows.remove_columns(PROMPT_COLUMN).rename_column("shaped", PROMPT_COLUMN)
    return dataset


def shaped_prompt(prompt: Any, suffix: str, as_chat: bool) -> Any:
    """A prompt with its suffix, and as a conversation where wanted.

    Example:
        >>> shaped_prompt("1 + 1?", " Think.", as_chat=True)
        [{'role': 'user', 'content': '1 + 1? Think.'}]
        >>> shaped_prompt([{"role": "user", "content": "1 + 1?"}], " Think.", as_chat=False)
        [{'role': 'user', 'content': '1 + 1? Think.'}]
    """
    if isinstance(prompt, str):
        text = prompt + suffix
        return [{"role": "user", "content": text}] if as_chat else text
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], Mapping) and "content" in prompt[-1]:
        last = {**prompt[-1], "content": f"{prompt[-1]['content']}{suffix}"}
        return [*prompt[:-1], {key: last[key] for key in ("role", "content") if key in last}]
    return prompt


def _load(arguments: PromptArguments) -> Dataset | IterableDataset:
    name, streaming = arguments.dataset_name, arguments.dataset_streaming
    if name == EMBEDDED:
        dataset = ChainTask().dataset(16_384, seed=0)
        return dataset.to_iterable_dataset() if streaming else dataset
    suffix, path = Path(name).suffix.lower(), Path(name)
    if suffix in FILE_KINDS:
        if not path.is_file():
            raise FileNotFoundError(f"no prompts file at {name}")
        if not path.read_bytes()[:4096].strip():
            raise InputError(f"{name} is empty: it holds no prompts")
        try:
            return load_dataset(FILE_KINDS[suffix], data_files=name, split="train", streaming=streaming)
        except (DatasetsError, ValueError, OSError) as error:
            raise InputError(f"{name} cannot be read as {suffix[1:]}: {what_is_wrong(path, error)}") from error
    if path.exists():
        raise InputError(f"{name} is not a {', '.join(FILE_KINDS)} file")
    try:
        return load_dataset(name, arguments.dataset_config, split=arguments.dataset_split, streaming=streaming)
    except (DatasetsError, ValueError, OSError) as error:
        raise InputError(f"cannot load the data set {name!r} from the Hub: {_first_line(error)}") from error


def what_is_wrong(path: Path, error: BaseException) -> str:
    """Why a file cannot be read: its first broken line where it is JSON lines, else what the reader said."""
    if path.suffix.lower() == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                try:
                    whole = not line.strip() or isinstance(json.loads(line), dict)
                except ValueError as problem:
                    return f"line {number} is not JSON ({problem})"
                if not whole:
                    return f"line {number} is not a JSON object"
    return _first_line(error.__cause__ or error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def check_streaming(arguments: PromptArguments, max_steps: int) -> None:
    """A stream has no length, so the number of steps must be given.

    Raises:
        ConfigError: it is not.
    """
    if arguments.dataset_streaming and max_steps <= 0:
        raise ConfigError("dataset_streaming needs max_steps: a stream has no length that could say how long to train")
