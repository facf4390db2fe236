"""Where the prompts of a script come from: a Hub name, a local file or the embedded task, streamed or not, plain or conversational.

Whatever cannot be read is one line that names the file and, where that can be found, the line in it.
"""

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.models.prompts import messages_of
from prune_opd_hf.records.files import first_line
from prune_opd_hf.records.settings import NEEDED, setting
from prune_opd_hf.tasks import EMBEDDED, ChainTask
from prune_opd_hf.training.prompts import AppliedToRows, need_column
from prune_opd_hf.training.teachers import PROMPT_COLUMN

FILE_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
EMBEDDED_TRAINING_PROMPTS, EMBEDDED_EVALUATION_PROMPTS = 16_384, 256


@dataclass(frozen=True)
class PromptArguments:
    """Which prompts a script trains on, and evaluates on."""

    dataset_name: str = setting(
        NEEDED, "Prompts: a Hub id, a .json/.jsonl/.parquet/.csv file with a column 'prompt', or 'embedded'."
    )
    dataset_config: str | None = setting(None, "Configuration of a Hub data set.")
    dataset_train_split: str = setting("train", "Split to train on.")
    dataset_test_split: str = setting("test", "Split to evaluate on, where eval_strategy asks for evaluations.")
    eval_dataset_name: str | None = setting(
        None, "Data set or file to evaluate on. None: dataset_test_split of dataset_name."
    )
    eval_dataset_config: str | None = setting(
        None, "Configuration of the data set to evaluate on. None: dataset_config, unless eval_dataset_name is another."
    )
    dataset_streaming: bool = setting(False, "Stream instead of downloading; needs max_steps.")
    prompt_column: str = setting(PROMPT_COLUMN, "Column with the prompts: text, or lists of messages.")
    prompt_suffix: str = setting("", "Appended to each prompt's text, or to the last user's message.")
    prompt_as_chat: bool = setting(False, "Make each plain text a user's message, for the chat template.")


def load_prompts(arguments: PromptArguments) -> Dataset | IterableDataset:
    """The prompts to train on, in the column `prompt`."""
    name, streaming = arguments.dataset_name, arguments.dataset_streaming
    if name == EMBEDDED:
        dataset = ChainTask().dataset(EMBEDDED_TRAINING_PROMPTS, seed=0)
        return dataset.to_iterable_dataset() if streaming else dataset
    return _shape(_read(name, arguments.dataset_config, arguments.dataset_train_split, streaming), arguments)


def load_evaluation_prompts(arguments: PromptArguments) -> Dataset:
    """The prompts to evaluate on, in the column `prompt`, with whatever other columns they have."""
    name = arguments.eval_dataset_name or arguments.dataset_name
    if name == EMBEDDED:
        return ChainTask().dataset(EMBEDDED_EVALUATION_PROMPTS, seed=1, split="evaluation")
    if arguments.eval_dataset_name is None and Path(name).suffix.lower() in FILE_KINDS:
        raise ConfigError(f"eval_strategy needs eval_dataset_name: {name} is a file and has no other split")
    config = arguments.eval_dataset_config
    if config is None and arguments.eval_dataset_name is None:
        config = arguments.dataset_config
    dataset = _shape(_read(name, config, arguments.dataset_test_split, streaming=False), arguments)
    assert isinstance(dataset, Dataset)
    return dataset


def _shape(dataset: Dataset | IterableDataset, arguments: PromptArguments) -> Dataset | IterableDataset:
    columns = dataset.column_names
    if arguments.prompt_column != PROMPT_COLUMN:
        need_column(arguments.prompt_column, columns)
        if columns is not None and PROMPT_COLUMN in columns:
            dataset = dataset.remove_columns(PROMPT_COLUMN)
        dataset = dataset.rename_column(arguments.prompt_column, PROMPT_COLUMN)
    if arguments.prompt_suffix or arguments.prompt_as_chat:
        need_column(PROMPT_COLUMN, dataset.column_names)
        rows = dataset.map(_Shaped(arguments.prompt_suffix, arguments.prompt_as_chat))
        dataset = rows.remove_columns(PROMPT_COLUMN).rename_column("shaped", PROMPT_COLUMN)
    return dataset


@dataclass
class _Shaped(AppliedToRows):
    """Makes a column of shaped prompts."""

    suffix: str
    as_chat: bool

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"shaped": shaped_prompt(row[PROMPT_COLUMN], self.suffix, self.as_chat)}


def shaped_prompt(prompt: Any, suffix: str, as_chat: bool) -> Any:
    """A prompt with its suffix, which the last user's message gets, and as a conversation where wanted.

    Example:
        >>> shaped_prompt("1 + 1?", " Think.", as_chat=True)
        [{'role': 'user', 'content': '1 + 1? Think.'}]
        >>> shaped_prompt([{"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}], " Think.", as_chat=True)
        [{'role': 'user', 'content': '1 + 1? Think.'}]
    """
    if isinstance(prompt, str):
        text = prompt + suffix
        return [{"role": "user", "content": text}] if as_chat else text
    try:
        messages = messages_of(prompt)
    except InputError:
        return prompt  # refused with its row when it is tokenized
    for message in reversed(messages):
        if message["role"] == "user":
            message["content"] += suffix
            break
    return messages


def _read(name: str, config: str | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    suffix, path = Path(name).suffix.lower(), Path(name)
    if suffix in FILE_KINDS:
        if not path.is_file():
            raise FileNotFoundError(f"no prompts file at {name}")
        if not path.read_bytes()[:4096].strip():
            raise InputError(f"{name} is empty: it holds no prompts")
        try:
            files = glob.escape(str(path.absolute()))  # which is a pattern there, the working folder included
            return load_dataset(FILE_KINDS[suffix], data_files=files, split="train", streaming=streaming)
        except (DatasetsError, ValueError, OSError) as error:
            raise InputError(f"{name} cannot be read as {suffix[1:]}: {_fault_of_file(path, error)}") from error
    if path.exists():
        raise InputError(f"{name} is not a {', '.join(FILE_KINDS)} file")
    try:
        return load_dataset(name, config, split=split, streaming=streaming)
    except (DatasetsError, ValueError, OSError) as error:
        raise InputError(f"cannot load the data set {name!r} from the Hub: {first_line(error)}") from error


def _fault_of_file(path: Path, error: BaseException) -> str:
    """Why a file cannot be read: its first broken line where it is JSON lines, else the reader's message."""
    if path.suffix.lower() == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                try:
                    is_object = not line.strip() or isinstance(json.loads(line), dict)
                except ValueError as problem:
                    return f"line {number} is not JSON ({problem})"
                if not is_object:
                    return f"line {number} is not a JSON object"
    return first_line(error.__cause__ or error)
