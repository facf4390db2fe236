"""Prompts as token ids: plain or conversational, tokenized once, never silently cut.

It knows datasets and tokenizers; it does not know the trainer.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from prune_opd_hf.errors import InputError

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


def tokenize_prompts(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None,
    chat_template_kwargs: dict[str, Any],
) -> Dataset | IterableDataset:
    """Add a column `input_ids` and drop prompts that are too long, saying how many.

    Raises:
        InputError: no column `prompt`, or no prompt is left.
    """
    columns = dataset.column_names
    if columns is not None and PROMPT_COLUMN not in columns:
        raise InputError(f"the dataset needs a column {PROMPT_COLUMN!r}; it has {', '.join(columns)}")

    def tokenize(example: Mapping[str, Any]) -> dict[str, Any]:
        return {"input_ids": prompt_token_ids(example[PROMPT_COLUMN], tokenizer, chat_template_kwargs)}

    def fits(example: Mapping[str, Any]) -> bool:
        return max_prompt_length is None or len(example["input_ids"]) <= max_prompt_length

    tokenized = dataset.map(tokenize)
    if isinstance(dataset, IterableDataset):
        return tokenized.filter(fits)
    kept = tokenized.filter(fits)
    dropped = len(tokenized) - len(kept)
    if dropped:
        logger.warning(
            "%d of %d prompts have more than max_prompt_length=%s tokens and were dropped",
            dropped,
            len(tokenized),
            max_prompt_length,
        )
    if len(kept) == 0:
        raise InputError(
            f"no prompt is left: all {len(tokenized)} have more than max_prompt_length={max_prompt_length} tokens"
            if len(tokenized)
            else "the dataset holds no prompts"
        )
    return kept


def repeat_rows(dataset: IterableDataset, repeats: int) -> IterableDataset:
    """A stream with each row several times in a row: a prompt and its further rollouts.

    Example:
        >>> stream = Dataset.from_dict({"x": [4, 2]}).to_iterable_dataset()
        >>> [row["x"] for row in repeat_rows(stream, 2)]
        [4, 4, 2, 2]
    """

    def repeat(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: [value for value in values for _ in range(repeats)] for name, values in batch.items()}

    return dataset.map(repeat, batched=True)


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
    """Each index of another sampler several times in a row: a prompt and its further rollouts.

    Example:
        >>> list(RepeatSampler([4, 2], repeats=3))
        [4, 4, 4, 2, 2, 2]
    """

    def __init__(self, sampler: Any, repeats: int) -> None:
        self.sampler, self.repeats = sampler, repeats

    def __iter__(self):
        for index in self.sampler:
            yield from [index] * self.repeats

    def __len__(self) -> int:
        return len(self.sampler) * self.repeats

    def set_epoch(self, epoch: int) -> None:
        """Passed on, so that each epoch is shuffled anew."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
