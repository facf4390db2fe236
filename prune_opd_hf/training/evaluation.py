"""Evaluation inside training: the student answers held-out prompts without pruning, the work shared by all processes.

It knows prompts, sampling and completions; what a right answer is, `compute_metrics` says.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from prune_opd_hf.training.data import left_pad
from prune_opd_hf.training.sampling import StudentSampler


class Completion(NamedTuple):
    """One response of an evaluation, as `compute_metrics` sees it.

    Attributes:
        text: decoded without special tokens.
        ended: whether it ended by itself, rather than at the cap.
        tokens: its length, the end token included.
    """

    text: str
    ended: bool
    tokens: int


def answer_prompts(
    model: nn.Module,
    sampler: StudentSampler,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    max_new_tokens: int,
    device: torch.device,
) -> list[Completion]:
    """One completion for each row, in order, on every process.

    Args:
        model: the bare student.
        rows: with `input_ids`.
        batch_size: rows answered at once on each process.
    """
    numbered = list(enumerate(rows))
    answered: list[tuple[int, Completion]] = []
    eos = torch.tensor(sampler.eos_token_ids, device=device)
    # Every process answers equally many rows, some twice if need be: a sharded model is called by all together.
    with (
        accelerator.split_between_processes(numbered, apply_padding=True) as mine,
        sampler.mode(model, "evaluation", 0),
    ):
        for first in range(0, len(mine), batch_size):
            some = mine[first : first + batch_size]
            batch = left_pad([list(row["input_ids"]) for _, row in some], sampler.pad_token_id)
            batch = {name: values.to(device) for name, values in batch.items()}
            sequences = sampler.generate(model, batch, max_new_tokens)
            responses = sequences[:, batch["input_ids"].shape[1] :]
            is_end = torch.isin(responses, eos)
            ended = is_end.any(dim=-1)
            lengths = torch.where(ended, is_end.long().argmax(dim=-1) + 1, responses.shape[1])
            for (number, _), ids, end, length in zip(some, responses, ended.tolist(), lengths.tolist(), strict=True):
                text = tokenizer.decode(ids[:length], skip_special_tokens=True)
                answered.append((number, Completion(text, end, length)))
    everyone = gather_object(answered) if accelerator.num_processes > 1 else answered
    by_number = dict(reversed(everyone))
    return [by_number[number] for number in range(len(rows))]


def length_metrics(completions: Sequence[Completion], prefix: str) -> dict[str, float]:
    """Mean length, and the share that met the cap.

    Example:
        >>> length_metrics([Completion("a", True, 3), Completion("b", False, 5)], "eval")
        {'eval_mean_tokens': 4.0, 'eval_truncated_share': 0.5}
    """
    return {
        f"{prefix}_mean_tokens": float(np.mean([completion.tokens for completion in completions])),
        f"{prefix}_truncated_share": float(np.mean([not completion.ended for completion in completions])),
    }
