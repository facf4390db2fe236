"""Prompts as token ids: plain or conversational, tokenized once, never silently cut.

It knows datasets and tokenizers; it does not know the trainer.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from prune_opd_hf.errors import InputError, PruneOPDError

logger = logging.getLogger(__name__)

PROMPT_COLUMN = "prompt"


def prompt_token_ids(
    prompt: Any, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]
) -> list[int]:
    """Token ids of one prompt: text as it stands, a conversation through the chat template with a generation prompt.

    Raises:
        InputError: neither text nor a list of messages, or no token comes out.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif isinstance(prompt, list) and all(isinstance(message, dict) and "role" in message for message in prompt):
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **chat_template_kwargs
        )["input_ids"]
    else:
        raise InputError(
            f"a prompt must be text or a list of messages with 'role' and 'content', got {type(prompt).__name__}"
        )
    if not ids:
        raise InputError(f"this prompt has no tokens: {prompt!r}")
    return list(ids)


class DroppedPrompts:
    """How many prompts were dropped as too long: known at once for a dataset, growing as it is read for a stream.

    Attributes:
        count: dropped so far; a stream that begins anew counts them again.
    """

    def __init__(self) -> None:
        self.count = 0


def tokenize_prompts(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None,
    chat_template_kwargs: dict[str, Any],
    dropped: DroppedPrompts | None = None,
) -> Dataset | IterableDataset:
    """Add a column `input_ids` and drop prompts that are too long, saying how many.

    Args:
        dataset: with a column `prompt`.
        tokenizer: the student's.
        max_prompt_length: in tokens; None keeps all.
        chat_template_kwargs: for conversations.
        dropped: gets the count. A stream is read as far as its first prompt that fits, to be sure that there is one.

    Raises:
        InputError: no column `prompt`, or no prompt is left.
    """
    dropped = DroppedPrompts() if dropped is None else dropped
    columns = dataset.column_names
    if columns is not None and PROMPT_COLUMN not in columns:
        raise InputError(f"the dataset needs a column {PROMPT_COLUMN!r}; it has {', '.join(columns)}")

    def tokenize(example: Mapping[str, Any]) -> dict[str, Any]:
        if PROMPT_COLUMN not in example:  # a stream may not tell its columns beforehand
            raise InputError(f"the dataset needs a column {PROMPT_COLUMN!r}; it has {', '.join(example)}")
        return {"input_ids": prompt_token_ids(example[PROMPT_COLUMN], tokenizer, chat_template_kwargs)}

    def fits(example: Mapping[str, Any]) -> bool:
        return max_prompt_length is None or len(example["input_ids"]) <= max_prompt_length

    def fits_or_is_counted(example: Mapping[str, Any]) -> bool:
        dropped.count += not fits(example)
        return fits(example)

    if isinstance(dataset, IterableDataset):
        stream = dataset.map(tokenize).filter(fits_or_is_counted)
        with readable():
            first = next(iter(stream), None)
        read, dropped.count = dropped.count, 0
        if first is None:
            raise InputError(_nothing_left(read, max_prompt_length))
        return stream
    tokenized = dataset.map(tokenize)
    kept = tokenized.filter(fits)
    dropped.count = len(tokenized) - len(kept)
    if dropped.count:
        logger.warning(
            "%d of %d prompts have more than max_prompt_length=%s tokens and were dropped",
            dropped.count,
            len(tokenized),
            max_prompt_length,
        )
    if len(kept) == 0:
        raise InputError(_nothing_left(len(tokenized), max_prompt_length))
    return kept


@contextmanager
def readable() -> Iterator[None]:
    """Turn what readers raise about broken rows of a stream into one line.

    Raises:
        InputError: in place of the reader's own error.
    """
    try:
        yield
    except PruneOPDError:
        raise
    except (DatasetsError, ValueError, OSError) as error:
        lines = str(error.__cause__ or error).strip().splitlines()
        raise InputError(f"the prompts cannot be read: {lines[0] if lines else type(error).__name__}") from error


def _nothing_left(read: int, max_prompt_length: int | None) -> str:
    if read == 0:
        return "the dataset holds no prompts"
    return f"no prompt is left: all {read} have more than max_prompt_length={max_prompt_length} tokens"


def repeat_rows(dataset: IterableDataset, repeats: int, *, rows_of_step: int = 1, steps: int = 1) -> IterableDataset:
    """A stream without end: each row several times in a row (a prompt and its further rollouts), and the rows of a step
    again for each optimizer step on the same rollouts.

    Args:
        dataset: a stream; when it ends it begins anew, and rows that do not fill a step are left out.
        repeats: rollouts of each prompt.
        rows_of_step: prompts of one optimizer step, over all processes.
        steps: optimizer steps on the same rollouts.

    Example:
        >>> stream = Dataset.from_dict({"x": [4, 2, 7]}).to_iterable_dataset()
        >>> [row["x"] for row in repeat_rows(stream, 2).take(8)]
        [4, 4, 2, 2, 7, 7, 4, 4]
        >>> [row["x"] for row in repeat_rows(stream, 1, rows_of_step=2, steps=2).take(6)]
        [4, 2, 4, 2, 4, 2]
    """

    def repeat(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: [value for value in values for _ in range(repeats)] * steps for name, values in batch.items()}

    if steps == 1:
        return dataset.repeat(None).map(repeat, batched=True)
    return dataset.map(repeat, batched=True, batch_size=rows_of_step, drop_last_batch=True).repeat(None)


def left_pad(sequences: list[list[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Prompts as one batch: `input_ids` and `attention_mask`, padded on the left.

    Example:
        >>> batch = left_pad([[5, 6, 7], [8]], pad_token_id=0)
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
    """
    width = max(len(sequence) for sequence in sequences)
    ids = [[pad_token_id] * (width - len(sequence)) + sequence for sequence in sequences]
    mask = [[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def merge_left_padded(batches: list[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Several left-padded batches as one."""
    rows = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            rows.append(ids[mask.bool()].tolist())
    merged = left_pad(rows, pad_token_id)
    device = batches[0]["input_ids"].device
    return {name: values.to(device) for name, values in merged.items()}


class RepeatSampler(Sampler[int]):
    """Each index of another sampler several times in a row (a prompt and its further rollouts), and the indices of a step
    again for each optimizer step on the same rollouts.

    Args:
        sampler: of the prompts.
        repeats: rollouts of each prompt.
        rows_of_step: prompts of one optimizer step, over all processes.
        steps: optimizer steps on the same rollouts. With more than one, prompts that do not fill a step are left out.

    Raises:
        InputError: with several steps on the same rollouts, fewer prompts than one step needs.

    Example:
        >>> list(RepeatSampler([4, 2], repeats=3))
        [4, 4, 4, 2, 2, 2]
        >>> list(RepeatSampler([4, 2, 7], repeats=1, rows_of_step=2, steps=2))
        [4, 2, 4, 2]
    """

    def __init__(self, sampler: Any, repeats: int, *, rows_of_step: int = 1, steps: int = 1) -> None:
        self.sampler, self.repeats, self.rows_of_step, self.steps = sampler, repeats, rows_of_step, steps
        if steps > 1 and len(sampler) < rows_of_step:
            raise InputError(
                f"the dataset has {len(sampler)} prompts and one step takes {rows_of_step}: with num_iterations above 1 only "
                "whole steps are made; give more prompts or a smaller batch"
            )

    def __iter__(self) -> Iterator[int]:
        if self.steps == 1:
            for index in self.sampler:
                yield from [index] * self.repeats
            return
        step: list[int] = []
        for index in self.sampler:
            step += [index] * self.repeats
            if len(step) == self.rows_of_step * self.repeats:
                for _ in range(self.steps):
                    yield from step
                step = []

    def __len__(self) -> int:
        if self.steps == 1:
            return len(self.sampler) * self.repeats
        return len(self.sampler) // self.rows_of_step * self.rows_of_step * self.repeats * self.steps

    def set_epoch(self, epoch: int) -> None:
        """Passed on, so that each epoch is shuffled anew."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
