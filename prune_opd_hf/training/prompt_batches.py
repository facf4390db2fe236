"""How prompts stand in a batch, and how they repeat: several rollouts of each, and several optimizer steps on the same ones."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler, SequentialSampler

from prune_opd_hf.errors import InputError
from prune_opd_hf.generation.prompts import left_padded
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.teachers import TEACHER_IDS, TEACHER_INDEX, TEACHER_MASK


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
