"""Evaluation inside training: the student answers held-out prompts without pruning, the work shared by all processes.

It knows prompts, sampling and completions; `compute_metrics` decides what a right answer is.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from prune_opd_hf.generation import Request, RolloutEngine
from prune_opd_hf.generation.engine import request_seed
from prune_opd_hf.training.rollout_generation import equal_forward_passes


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
    engine: RolloutEngine,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    rows: Sequence[Mapping[str, Any]],
    *,
    seed: int,
    step: int,
) -> list[Completion]:
    """One completion for each row, in order, on every process.

    Args:
        engine: samples.
        model: the bare student, with the weights to sample with.
        rows: with `input_ids`.
        seed: with the number of a row it decides what is sampled.
        step: optimizer steps done so far.
    """
    engine.update_weights(model, step)
    answered: list[tuple[int, Completion]] = []
    # Every process answers equally many rows, some twice if need be: a sharded model is called by all together.
    with accelerator.split_between_processes(list(enumerate(rows)), apply_padding=True) as mine:
        requests = [Request(tuple(row["input_ids"]), request_seed(seed, "evaluation", number)) for number, row in mine]
        with equal_forward_passes(model, accelerator.device):
            for index, token_ids, reason in engine.generate(requests):
                text = tokenizer.decode(token_ids, skip_special_tokens=True)
                answered.append((mine[index][0], Completion(text, reason != "length", len(token_ids))))
    by_number = dict(gather_object(answered))
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
