"""Evaluation inside training: the student answers held-out prompts without pruning, the work shared by all processes.

It knows prompts, sampling and completions; `compute_metrics` decides what a right answer is.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.prompts import left_pad
from prune_opd_hf.training.rollout_generation import evaluation_mode, own_random_state, sample


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
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    rows: Sequence[Mapping[str, Any]],
    args: PruneOPDConfig,
    sampling: Mapping[str, Any],
) -> list[Completion]:
    """One completion for each row, in order, on every process.

    Args:
        model: the bare student.
        rows: with `input_ids`.
        args: settings of the run: seed, `per_device_eval_batch_size`, `max_completion_length`.
        sampling: as `sampling_arguments` returns it.
    """
    answered: list[tuple[int, Completion]] = []
    eos, size = torch.tensor(sampling["eos_token_id"], device=args.device), args.per_device_eval_batch_size
    # Every process answers equally many rows, some twice if need be: a sharded model is called by all together.
    with (
        accelerator.split_between_processes(list(enumerate(rows)), apply_padding=True) as mine,
        evaluation_mode(model),
        own_random_state(args.device, args.seed, 0, args.process_index, "evaluation"),
    ):
        for first in range(0, len(mine), size):
            some = mine[first : first + size]
            batch = left_pad([row["input_ids"] for _, row in some], sampling["pad_token_id"])
            batch = {name: values.to(args.device) for name, values in batch.items()}
            sequences = sample(model, batch, args.max_completion_length, sampling)
            responses = sequences[:, batch["input_ids"].shape[1] :]
            is_end = torch.isin(responses, eos)
            ended = is_end.any(dim=-1)
            lengths = torch.where(ended, is_end.long().argmax(dim=-1) + 1, responses.shape[1])
            for (number, _), ids, end, length in zip(some, responses, ended.tolist(), lengths.tolist(), strict=True):
                text = tokenizer.decode(ids[:length], skip_special_tokens=True)
                answered.append((number, Completion(text, end, length)))
    by_number = dict(reversed(gather_object(answered)))
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
