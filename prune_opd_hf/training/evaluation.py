"""Evaluation inside training: the student answers held-out prompts without pruning, the work shared by all processes.

It knows prompts, sampling and completions; `compute_metrics` decides what a right answer is.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import EvalPrediction, PreTrainedTokenizerBase

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


def measure_completions(
    engine: RolloutEngine,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    rows: Sequence[Mapping[str, Any]],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None,
    seed: int,
) -> dict[str, float]:
    """Mean length, the share that met the cap, seconds, and what `compute_metrics` finds in the completions."""
    started = time.perf_counter()
    completions = answer_prompts(engine, model, tokenizer, accelerator, rows, seed)
    return {
        "mean_tokens": float(np.mean([completion.tokens for completion in completions])),
        "truncated_share": float(np.mean([not completion.ended for completion in completions])),
        "runtime": time.perf_counter() - started,
        **(compute_metrics(EvalPrediction(completions, rows)) if compute_metrics is not None else {}),
    }


def answer_prompts(
    engine: RolloutEngine,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    rows: Sequence[Mapping[str, Any]],
    seed: int,
) -> list[Completion]:
    """One completion for each row, in order, on every process.

    Args:
        engine: samples with the weights that it was given last.
        model: the bare student.
        rows: with `input_ids`.
        seed: with the number of a row it decides what is sampled.
    """
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
