"""An evaluation inside training: the student answers prompts without pruning, and the teacher scores the answers.

It has its own sampling settings, and what it measures is there to choose a checkpoint by: the loss of training with every token
at weight 1, the KL, the overlap, lengths, and whatever `compute_metrics` finds in the answers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import EvalPrediction, PreTrainedTokenizerBase
from transformers.trainer_utils import denumpify_detensorize

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.generation import Request, RolloutEngine, Sampling
from prune_opd_hf.generation.engine import request_seed
from prune_opd_hf.models.lm_head import evaluating
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.base import TeacherContext
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.metrics import MetricMeans, agreement_metrics
from prune_opd_hf.training.objective import Objective
from prune_opd_hf.training.pair import make_monitor
from prune_opd_hf.training.pruning import NoPruning
from prune_opd_hf.training.rollout_generation import generate_rollouts
from prune_opd_hf.training.teachers import contexts_of

METRICS = ("loss", "kl", "teacher_log_prob", "overlap", "entropy", "mean_tokens", "truncated_share", "runtime")
"""What every evaluation measures, under `eval_NAME`."""

TOKENS_AT_ONCE = 2**20
"""The record of at most so many response tokens is held at a time."""


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


class StudentEvaluation:
    """What the evaluations of a run have in common: the engine of the rollouts under another sampling, a monitor that stops no row,
    and the loss of training. The seed of the run with the number of a row decides what is sampled."""

    def __init__(
        self,
        args: PruneOPDConfig,
        model: nn.Module,
        engine: RolloutEngine,
        sampling: Sampling,
        objective: Objective,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
    ) -> None:
        rows, cap, teacher = args.per_device_eval_batch_size, sampling.max_completion_length, objective.teacher
        self.args, self.objective, self.tokenizer, self.accelerator = args, objective, tokenizer, accelerator
        self.engine = engine.with_sampling(sampling, slots=rows)
        every = NoPruning(cap).check_every(args.check_every, rows, teacher.block_tokens)
        self.monitor = make_monitor(args, model, teacher, self.engine, sampling, every, truncate=False)
        self.at_once = max(rows, TOKENS_AT_ONCE // cap)

    def measure(
        self,
        model: nn.Module,
        wrapped: nn.Module,
        *,
        step: int,
        rows: Sequence[Mapping[str, Any]],
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None,
    ) -> dict[str, float]:
        """Answer every row, which has its prompt as `input_ids`, and measure `METRICS` and what `compute_metrics` returns.

        Args:
            model, wrapped: the bare student, and as the trainer wraps it.
            step: optimizer steps done so far.
        """
        started = time.perf_counter()
        args, asked = self.args, list(product(range(len(rows)), range(self.args.num_generations_eval)))
        count, index = self.accelerator.num_processes, self.accelerator.process_index
        mine = asked[index::count]
        own = len(mine)
        # Every process answers equally many, for a sharded model is called by all together; the last one may count nowhere.
        mine += asked[:1] * (-(-len(asked) // count) - own)
        self.engine.update_weights(model, step)
        means, answered = MetricMeans(), []
        for first in range(0, len(mine), self.at_once):
            part = mine[first : first + self.at_once]
            rollouts, completions = self._answer(
                model,
                [
                    Request(tuple(rows[number]["input_ids"]), request_seed(args.seed, "evaluation", number, sample))
                    for number, sample in part
                ],
                contexts_of((rows[number] for number, _ in part), self.objective.teacher),
            )
            counted, places = min(len(part), own - first), torch.arange(len(part), device=rollouts.lengths.device)
            answered += list(zip(part, completions, strict=True))[:counted]
            if counted > 0:
                means.add_all(agreement_metrics(rollouts.select(places[:counted])))
            for batch in places.split(args.per_device_eval_batch_size):
                inside = batch[batch < counted]
                losses = self._losses(wrapped, rollouts.select(inside if len(inside) else batch[:1]))
                means.add_all(losses if len(inside) else {})
        by_key = dict(gather_object(answered))
        every = [by_key[key] for key in asked]
        measured = {
            **means.take(gather_object([means])),
            "mean_tokens": float(np.mean([completion.tokens for completion in every])),
            "truncated_share": float(np.mean([not completion.ended for completion in every])),
            "runtime": time.perf_counter() - started,
        }
        if compute_metrics is not None:
            repeated = [rows[number] for number, _ in asked]
            measured |= denumpify_detensorize(compute_metrics(EvalPrediction(every, repeated)))
        return measured

    def _answer(
        self, model: nn.Module, requests: list[Request], contexts: list[TeacherContext]
    ) -> tuple[Rollouts, list[Completion]]:
        bar = not self.args.disable_tqdm and self.accelerator.is_main_process
        rollouts, sampled = generate_rollouts(
            self.engine, self.monitor, model, requests, contexts, name="evaluation", progress=bar
        )
        completions = [
            Completion(self.tokenizer.decode(ids, skip_special_tokens=True), reason != "length", len(ids))
            for _, ids, reason in sampled
        ]
        return rollouts, completions

    def _losses(self, model: nn.Module, rollouts: Rollouts) -> dict[str, tuple[float, float]]:
        with evaluating(model), torch.no_grad(), self.accelerator.autocast():
            losses = self.objective.measure(model, rollouts)
        if isinstance(model, FSDPModule):
            model.reshard()  # no backward pass does it, and the next forward pass must gather weights anew
        return losses


def check_best_metric(args: PruneOPDConfig, eval_dataset: Any, computes_more: bool) -> None:
    """Refuse a `metric_for_best_model` that no evaluation measures, where nothing else is computed."""
    chosen = args.metric_for_best_model
    if chosen is None or computes_more or eval_dataset is None:
        return
    names = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, Mapping) else [""]
    known = [f"{name}{metric}" for name in names for metric in METRICS]
    if chosen.removeprefix("eval_") not in known:
        raise ConfigError(f"metric_for_best_model must be one of {', '.join(known)}, got {chosen!r}")
