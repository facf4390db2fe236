"""From a dataset of prompts to the token ids of a run: checked, tokenized once, never silently truncated.

Whatever cannot be used is one line that names its row.
"""

import hashlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetsError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prune_opd_hf.errors import ConfigError, InputError, PruneOPDError
from prune_opd_hf.models.prompts import PromptEncoder
from prune_opd_hf.records.files import first_line
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.prompt_batches import repeat_rows
from prune_opd_hf.training.teachers import PROMPT_COLUMN, TeacherColumns, prompt_encoder

logger = logging.getLogger(__name__)

PROMPT_CHANGING_COLUMNS = (
    *("messages", "system", "system_prompt", "tools", "documents", "chat_template", "chat_template_kwargs"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
"""Columns that other trainers make prompts with; here they are not used."""


def check_datasets(**datasets: Any) -> None:
    """Refuse what is no dataset of prompts, before a model is loaded.

    Args:
        datasets: by the name of their argument. None is nothing to check; an eval_dataset may hold several by name.
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


def need_column(name: str, columns: Iterable[str] | None) -> None:
    """Refuse a dataset whose known columns lack this one."""
    if columns is not None and name not in columns:
        raise InputError(
            f"the dataset needs a column {name!r}; it has {', '.join(columns) or 'none'}: rename one (rename_column, or on the "
            "command line prompt_column)"
        )


@dataclass
class DroppedPrompts:
    """How many prompts were dropped as too long: known at once for a dataset, growing as it is read for a stream, where those that
    leave no room for a response are among them.

    A stream that begins anew counts them again.
    """

    count: int = 0


class AppliedToRows:
    """What `datasets` applies to rows. Its cache knows what was applied before by name and fields: here by the code as well. A
    nested function would be known by all that it refers to, at seconds for each."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "code": _code(type(self))}


def _code(applied: type) -> str:
    """A digest of the modules that decide what becomes of a prompt."""
    files = {inspect.getfile(part) for part in (applied, PromptEncoder, TeacherColumns)}
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in sorted(files))).hexdigest()


@dataclass
class _Tokenize(AppliedToRows):
    """Makes the columns of one row."""

    encode: PromptEncoder
    teacher_columns: TeacherColumns | None

    def __call__(self, example: Mapping[str, Any], row: int) -> dict[str, Any]:
        need_column(PROMPT_COLUMN, example)  # the columns of a stream may be unknown beforehand
        of_teacher = {} if self.teacher_columns is None else self.teacher_columns(example, row)
        return {"input_ids": self.encode(example[PROMPT_COLUMN], f"the prompt in row {row}"), **of_teacher}


@dataclass
class _Fits(AppliedToRows):
    """Whether a row is kept; counts those that are not. One that leaves no room for a response is refused; in a stream, whose run
    would end at a row in its middle, it is dropped like one above `max_prompt_length`."""

    max_prompt_length: int | None
    dropped: DroppedPrompts
    teacher_columns: TeacherColumns | None
    streamed: bool
    has_warned: bool = False

    def __call__(self, example: Mapping[str, Any], row: int) -> bool:
        ids = example["input_ids"]
        fitting = self.max_prompt_length is None or len(ids) <= self.max_prompt_length
        fault = self.teacher_columns.length_fault(ids, example, row) if fitting and self.teacher_columns else None
        if fault is not None and not self.streamed:
            raise InputError(fault)
        if fault is not None and not self.has_warned:
            logger.warning("%s. Such rows are dropped and counted (data/dropped_prompts)", fault)
            self.has_warned = True
        self.dropped.count += not fitting or fault is not None
        return fitting and fault is None


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
    need_column(PROMPT_COLUMN, dataset.column_names)
    if encode.chat_template_kwargs:  # a column holds either texts or conversations
        with errors_of_reading():
            encode.check_settings_act([row.get(PROMPT_COLUMN) for row in dataset.take(1)])
    streamed = isinstance(dataset, IterableDataset)
    tokenized = dataset.map(_Tokenize(encode, teacher_columns), with_indices=True)
    fits = _Fits(max_prompt_length, dropped, teacher_columns, streamed)
    if streamed:
        kept = tokenized.filter(fits, with_indices=True)
        with errors_of_reading():
            first = next(iter(kept), None)
        none_left, columns = first is None, list(first or ())
        read, dropped.count = dropped.count, 0
    else:
        kept, read = tokenized.filter(fits, with_indices=True), len(tokenized)
        none_left, columns = len(kept) == 0, dataset.column_names
        dropped.count = read - len(kept)  # what came out of a cache was not counted
    if none_left and read == 0:
        raise InputError("the dataset holds no prompts")
    if none_left:
        reasons = [] if max_prompt_length is None else [f"have more than max_prompt_length={max_prompt_length} tokens"]
        reasons += ["leave too little room for a response"] if fits.has_warned else []
        raise InputError(f"no prompt is left: all {read} {' or '.join(reasons)}")
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
    streamed = isinstance(dataset, IterableDataset)
    if streamed and args.max_steps <= 0:
        raise ConfigError("a streamed dataset has no length: set max_steps to say how long to train")
    if streamed and args.num_iterations > 1 and args.dataloader_num_workers > 1:
        raise ConfigError(
            "the workers of a stream take turns batch by batch, and with num_iterations above 1 steps would come apart: set "
            "dataloader_num_workers to 1 or 0"
        )
    if streamed:
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
    return repeat_rows(tokenized, args.num_generations, **args.reuse()) if streamed else tokenized


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


def next_batches(batches: Iterator[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """Up to `count` further batches; fewer where they end.

    Raises:
        InputError: there is none: a stream has fewer prompts than a step with `num_iterations` above 1 takes, or a dataset fewer
            than a batch that `dataloader_drop_last` keeps.
    """
    with errors_of_reading():
        found = list(islice(batches, count))
    if not found:
        raise InputError(
            "the prompts do not fill a batch: with num_iterations above 1 a stream must hold those of a whole step, with "
            "dataloader_drop_last those of a whole batch, not counting prompts above max_prompt_length; give more prompts or a "
            "smaller batch"
        )
    return found
