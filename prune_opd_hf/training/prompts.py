"""Prompts: where they come from, their token ids, and how they repeat and stand in a batch.

A Hub name, a local file or the embedded task, streamed or not, plain or conversational. Prompts are tokenized once and never
silently truncated. Whatever cannot be read is one line that names the file and, where that can be found, the line in it.
"""

import hashlib
import inspect
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase

from prune_opd_hf.errors import ConfigError, InputError, PruneOPDError
from prune_opd_hf.generation.prompts import left_padded
from prune_opd_hf.models.prompts import PromptEncoder, messages_of
from prune_opd_hf.records.files import first_line
from prune_opd_hf.tasks import EMBEDDED, ChainTask
from prune_opd_hf.training.config import PruneOPDConfig, setting
from prune_opd_hf.training.teachers import (
    PROMPT_COLUMN,
    TEACHER_IDS,
    TEACHER_INDEX,
    TEACHER_MASK,
    TeacherColumns,
    prompt_encoder,
)

logger = logging.getLogger(__name__)

PROMPT_CHANGING_COLUMNS = (
    *("messages", "system", "system_prompt", "tools", "documents", "chat_template", "chat_template_kwargs"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
"""Columns that other trainers make prompts with; here they are not used."""

FILE_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
EMBEDDED_TRAINING_PROMPTS, EMBEDDED_EVALUATION_PROMPTS = 16_384, 256


# ---------------------------------------------------------------------- sources


@dataclass(frozen=True)
class PromptArguments:
    """Which prompts a script trains on, and evaluates on."""

    dataset_name: str = setting(
        "", "Prompts: a Hub id, a .json/.jsonl/.parquet/.csv file with a column 'prompt', or 'embedded'."
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
        _need_column(arguments.prompt_column, columns)
        if columns is not None and PROMPT_COLUMN in columns:
            dataset = dataset.remove_columns(PROMPT_COLUMN)
        dataset = dataset.rename_column(arguments.prompt_column, PROMPT_COLUMN)
    if arguments.prompt_suffix or arguments.prompt_as_chat:
        _need_column(PROMPT_COLUMN, dataset.column_names)
        rows = dataset.map(
            lambda row: {"shaped": shaped_prompt(row[PROMPT_COLUMN], arguments.prompt_suffix, arguments.prompt_as_chat)}
        )
        dataset = rows.remove_columns(PROMPT_COLUMN).rename_column("shaped", PROMPT_COLUMN)
    return dataset


def _need_column(name: str, columns: Iterable[str] | None) -> None:
    if columns is not None and name not in columns:
        raise InputError(
            f"the dataset needs a column {name!r}; it has {', '.join(columns) or 'none'}: rename one (rename_column, or on the "
            "command line prompt_column)"
        )


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
            return load_dataset(FILE_KINDS[suffix], data_files=name, split="train", streaming=streaming)
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


# ---------------------------------------------------------------------- token ids


def check_datasets(**datasets: Any) -> None:
    """Refuse what is no dataset of prompts, before a model is loaded.

    Args:
        datasets: by the name of their argument. None is nothing to check; an eval_dataset may hold several by name.

    Raises:
        InputError: names what was passed and what to pass.
    """
    for name, dataset in datasets.items():
        if isinstance(dataset, Mapping) and name == "eval_dataset":
            check_datasets(**{f"eval_dataset[{key!r}]": part for key, part in dataset.items()})
        elif isinstance(dataset, DatasetDict | IterableDatasetDict):
            raise InputError(
                f"{name} is a {type(dataset).__name__} with the splits {', '.join(dataset)}: pass one of them, as "
                f"{name}=dataset[{next(iter(dataset), 'train')!r}]"
            )
        elif dataset is not None and not isinstance(dataset, Dataset | IterableDataset):
            raise InputError(
                f"{name} must be a Dataset or an IterableDataset of the package datasets, got {type(dataset).__name__}: "
                "datasets.Dataset.from_list([{'prompt': ...}, ...]) makes one"
            )
        elif isinstance(dataset, Dataset) and not len(dataset):
            raise InputError(f"{name} holds no prompts: is it the right split?")


@dataclass
class DroppedPrompts:
    """How many prompts were dropped as too long: known at once for a dataset, growing as it is read for a stream.

    A stream that begins anew counts them again.
    """

    count: int = 0


@cache
def _code() -> str:
    """Of what tokenizes prompts: `datasets` knows classes by name alone, and would take columns of older code from its cache."""
    files = {inspect.getfile(part) for part in (PromptEncoder, TeacherColumns, DroppedPrompts)}
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in sorted(files))).hexdigest()


@dataclass
class _Tokenize:
    """Makes the columns of one row. A class: `datasets` hashes what it applies, and of a nested function all that it knows."""

    encode: PromptEncoder
    max_prompt_length: int | None
    teacher_columns: TeacherColumns | None
    code: str = field(default_factory=lambda: _code())

    def __call__(self, example: Mapping[str, Any], row: int) -> dict[str, Any]:
        _need_column(PROMPT_COLUMN, example)  # the columns of a stream may be unknown beforehand
        of_teacher = {} if self.teacher_columns is None else self.teacher_columns(example, row)
        ids = self.encode(example[PROMPT_COLUMN], f"the prompt in row {row}")
        if self.teacher_columns is not None and _is_short(ids, self.max_prompt_length):  # others are dropped
            self.teacher_columns.check_length(of_teacher, row)
        return {"input_ids": ids, **of_teacher}


@dataclass
class _Fits:
    """Whether a row is kept; counts those that are not."""

    max_prompt_length: int | None
    dropped: DroppedPrompts
    code: str = field(default_factory=lambda: _code())

    def __call__(self, example: Mapping[str, Any]) -> bool:
        fitting = _is_short(example["input_ids"], self.max_prompt_length)
        self.dropped.count += not fitting
        return fitting


def _is_short(ids: Sequence[int], max_prompt_length: int | None) -> bool:
    return max_prompt_length is None or len(ids) <= max_prompt_length


def tokenize_prompts(
    dataset: Dataset | IterableDataset,
    encode: PromptEncoder,
    *,
    max_prompt_length: int | None,
    dropped: DroppedPrompts | None = None,
    teacher_columns: TeacherColumns | None = None,
) -> Dataset | IterableDataset:
    """Add a column `input_ids` and drop prompts that are too long; a line in the log says how many.

    Args:
        dataset: with a column `prompt`.
        encode: makes the token ids of a prompt.
        max_prompt_length: in tokens; None keeps all.
        teacher_columns: makes what the teacher of a row is given.
        dropped: gets the count. A stream is read as far as its first prompt that fits, to be sure that there is one.

    Raises:
        InputError: no column `prompt`, a prompt that cannot be used (names its row), or no prompt is left.
    """
    dropped = DroppedPrompts() if dropped is None else dropped
    _need_column(PROMPT_COLUMN, dataset.column_names)

    if encode.chat_template_kwargs:  # a column holds either texts or conversations
        with errors_of_reading():
            encode.check_settings_act([row.get(PROMPT_COLUMN) for row in dataset.take(1)])
    tokenized = dataset.map(_Tokenize(encode, max_prompt_length, teacher_columns), with_indices=True)
    fits = _Fits(max_prompt_length, dropped)
    if isinstance(dataset, IterableDataset):
        kept = tokenized.filter(fits)
        with errors_of_reading():
            first = next(iter(kept), None)
        none_left, columns = first is None, list(first or ())
        read, dropped.count = dropped.count, 0
    else:
        kept, read = tokenized.filter(fits), len(tokenized)
        none_left, columns = len(kept) == 0, dataset.column_names
        dropped.count = read - len(kept)  # what came out of a cache was not counted
    if none_left and read == 0:
        raise InputError("the dataset holds no prompts")
    if none_left:
        raise InputError(f"no prompt is left: all {read} have more than max_prompt_length={max_prompt_length} tokens")
    if dropped.count:
        limit = f"max_prompt_length={max_prompt_length}"
        logger.warning("%d of %d prompts have more than %s tokens and were dropped", dropped.count, read, limit)
    if unused := [column for column in columns if column in PROMPT_CHANGING_COLUMNS]:
        logger.warning("prompts are made of the column 'prompt' alone; not used: %s", ", ".join(unused))
    return kept


def training_prompts(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: PruneOPDConfig,
    dropped: DroppedPrompts,
    teacher_columns: TeacherColumns,
) -> Dataset | IterableDataset:
    """The tokenized prompts of a run; a stream with its repetitions, for it has no sampler that could repeat them."""
    if isinstance(dataset, IterableDataset) and args.max_steps <= 0:
        raise ConfigError("a streamed dataset has no length: set max_steps to say how long to train")
    if isinstance(dataset, IterableDataset):
        # Every process reads the stream and takes its share. Otherwise one process reads for all, and cannot put batches of
        # different width together (huggingface/accelerate#2023, huggingface/transformers#26548).
        args.accelerator_config.dispatch_batches = False
    tokenized = tokenize_prompts(
        dataset,
        prompt_encoder(tokenizer, args),
        max_prompt_length=args.max_prompt_length,
        dropped=dropped,
        teacher_columns=teacher_columns,
    )
    if isinstance(tokenized, IterableDataset):
        return repeat_rows(tokenized, args.num_generations, **args.reuse())
    return tokenized


def evaluation_prompts(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: PruneOPDConfig,
    teacher_columns: TeacherColumns,
) -> Any:
    """A dataset, or each of several by name, with the token ids of its prompts as the settings of a run make them."""
    if isinstance(dataset, Mapping):
        parts = dataset.items()
        return {name: evaluation_prompts(part, tokenizer, args, teacher_columns) for name, part in parts}
    columns, encode = teacher_columns.for_evaluation(args), prompt_encoder(tokenizer, args)
    return tokenize_prompts(dataset, encode, max_prompt_length=args.max_prompt_length, teacher_columns=columns)


@contextmanager
def errors_of_reading() -> Iterator[None]:
    """Turn what readers raise about broken rows of a stream into an `InputError` of one line."""
    try:
        yield
    except PruneOPDError:
        raise
    except (DatasetsError, ValueError, OSError) as error:
        raise InputError(f"the prompts cannot be read: {first_line(error.__cause__ or error)}") from error


# ---------------------------------------------------------------------- batches


def next_batches(batches: Iterator[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """Up to `count` further batches; fewer where they end."""
    with errors_of_reading():
        return list(islice(batches, count))


def collate(examples: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Prompts as one batch, padded on the left, with what their teachers are given."""
    ids, mask = left_padded([example["input_ids"] for example in examples], pad_token_id)
    batch = {"input_ids": ids, "attention_mask": mask}
    if TEACHER_IDS in examples[0]:
        read = left_padded([example[TEACHER_IDS] for example in examples], pad_token_id)
        batch |= dict(zip((TEACHER_IDS, TEACHER_MASK), read, strict=True))
    if TEACHER_INDEX in examples[0]:
        batch[TEACHER_INDEX] = torch.tensor([example[TEACHER_INDEX] for example in examples])
    return batch


def unpadded_rows(batches: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """The rows of such batches, without padding."""
    rows: list[dict[str, Any]] = []
    for batch in batches:
        columns: dict[str, list[Any]] = {}
        for name, mask in (("input_ids", "attention_mask"), (TEACHER_IDS, TEACHER_MASK)):
            if name in batch:
                lines = zip(batch[name], batch[mask], strict=True)
                columns[name] = [tuple(ids[inside.bool()].tolist()) for ids, inside in lines]
        if TEACHER_INDEX in batch:
            columns[TEACHER_INDEX] = batch[TEACHER_INDEX].tolist()
        rows += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return rows


class RepeatSampler(Sampler[int]):
    """Each index of another sampler several times in a row (a prompt and its further rollouts), and the indices of a step
    again for each optimizer step on the same rollouts.

    Args:
        sampler: of the prompts.
        repeats: rollouts of each prompt.
        rows_of_step: prompts of one optimizer step, over all processes.
        steps: optimizer steps on the same rollouts. With more than one, prompts that do not fill a step are left out.
    """

    def __init__(self, sampler: Any, repeats: int, *, rows_of_step: int = 1, steps: int = 1) -> None:
        self.sampler, self.repeats, self.rows_of_step, self.steps = sampler, repeats, rows_of_step, steps
        if steps > 1 and len(sampler) < rows_of_step:
            raise InputError(
                f"the dataset has {len(sampler)} prompts and one step takes {rows_of_step}: with num_iterations above 1 only "
                "whole steps are made; give more prompts or a smaller batch"
            )

    def __iter__(self) -> Iterator[int]:
        step: list[int] = []
        for index in self.sampler:
            step += [index] * self.repeats
            if self.steps == 1 or len(step) == self.rows_of_step * self.repeats:
                yield from step * self.steps
                step = []

    def __len__(self) -> int:
        rest = 0 if self.steps == 1 else len(self.sampler) % self.rows_of_step
        return (len(self.sampler) - rest) * self.repeats * self.steps

    def set_epoch(self, epoch: int) -> None:
        """Passed on, so that each epoch is shuffled anew."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def repeating_sampler(sampler: Any, dataset: Dataset, args: PruneOPDConfig) -> RepeatSampler | None:
    """The Trainer's sampler with the repetitions of a run; None where it has none."""
    if isinstance(sampler, RandomSampler) and not args.shuffle_dataset:
        sampler = SequentialSampler(dataset)
    elif isinstance(sampler, RandomSampler):
        # Accelerate makes a bare random sampler repeatable by epoch; inside ours it would not see it.
        sampler = SeedableRandomSampler(dataset, data_seed=args.seed if args.data_seed is None else args.data_seed)
    return None if sampler is None else RepeatSampler(sampler, args.num_generations, **args.reuse())


def repeat_rows(dataset: IterableDataset, repeats: int, *, rows_of_step: int = 1, steps: int = 1) -> IterableDataset:
    """What `RepeatSampler` does, for a stream, which has no sampler: a stream without end. When `dataset` ends it begins anew."""

    def repeat(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: [value for value in values for _ in range(repeats)] * steps for name, values in batch.items()}

    return dataset.map(repeat, batched=True, batch_size=rows_of_step, drop_last_batch=steps > 1).repeat(None)
