"""`PruneOPDTrainer`: on-policy distillation with drift pruning, on `transformers.Trainer`.

One optimizer step: the prompts of all its micro-batches are answered in one `generate` call while the teacher watches; the
record of that generation already holds the teacher's scores and the student's candidates, so there is no second teacher
pass and no pass for old log-probabilities. Micro-batches are cut from it by length, and their losses add up to one mean over
the response tokens of the whole step, over accumulation and processes.

Departures from the paper
1. Sequences are stopped while they are generated, at their exhausted token; the reference only caps the next step's length.
2. The default reward is centred (`loss_centered`): the literal one lets probability mass leak out of the candidate set.
3. Old log-probabilities are those of the update's own forward pass. With one update for each batch the ratio is exactly 1,
   and the reward's log p is free of the rounding between cached decoding and the full pass.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.generation import DriftMonitor, DriftProgress, pruned_generate
from prune_opd_hf.lm_head import base_causal_lm, text_config
from prune_opd_hf.losses import reverse_kl_loss, topk_policy_gradient_loss
from prune_opd_hf.rewards import choose_candidates, topk_rewards
from prune_opd_hf.rollouts import Rollouts
from prune_opd_hf.teacher import Teacher
from prune_opd_hf.training.checkpoints import last_complete_checkpoint, load_state, save_state
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.data import RepeatSampler, left_pad, merge_left_padded, repeat_rows, tokenize_prompts
from prune_opd_hf.training.environment import describe_hardware, package_versions
from prune_opd_hf.training.metrics import MetricMeans, TokenCounts, rollout_metrics
from prune_opd_hf.training.summary import TrainingSummary
from prune_opd_hf.vocabulary import shared_vocabulary_size

logger = logging.getLogger(__name__)

HYPERPARAMETERS = (
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "temperature",
    "top_p",
    "max_prompt_length",
    "max_completion_length",
    "check_every",
    "loss_top_k",
    "loss_centered",
    "loss_weighting",
    "loss_support",
    "bf16",
    "fp16",
)
"""Settings that a training summary shows, beside those of drift and budget."""


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


class _StepClock(TrainerCallback):
    """Books the time from the end of a generation to the end of its optimizer step as the phase "update"."""

    def __init__(self, phase_seconds: dict[str, float]) -> None:
        self.phase_seconds = phase_seconds
        self.update_started = 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.phase_seconds["update"] += time.perf_counter() - self.update_started


class PruneOPDTrainer(Trainer):
    """Distils a teacher into a student on the student's own rollouts, pruned where the two drift apart.

    Args:
        model: the student: a causal LM, or a Hub id or folder to load it from (in float32 unless `model_init_kwargs` says
            otherwise: bfloat16 weights round updates of a learning rate of 1e-6 to nothing).
        teacher_model: a causal LM, Hub id or folder; `args.teacher_model_name_or_path` otherwise. May be `model` itself.
        args: the settings.
        train_dataset, eval_dataset: with a column `prompt`, text or a list of messages.
        processing_class: the student's tokenizer; loaded beside the student if that is given by name.
        teacher_processing_class: the teacher's, to be compared with the student's; loaded beside a teacher given by name.
        callbacks, optimizers: as for `transformers.Trainer`.
        peft_config: trains an adapter of this kind instead of all weights.
        compute_metrics: takes an `EvalPrediction` whose `predictions` are `Completion`s and whose `label_ids` are the rows
            of the evaluation dataset, and returns a dict of metrics.

    Raises:
        ConfigError, InputError: settings or data that cannot be worked with.
        VocabularyMismatchError: the two tokenizers differ; names the first differing token.

    Example: see examples/train_prune_opd.py; on the embedded task:
        >>> from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer
        >>> args = PruneOPDConfig(output_dir="unused", max_completion_length=16, drift_top_k=2, drift_threshold=0.5,
        ...     per_device_train_batch_size=4, num_generations=1, max_steps=1, report_to="none", save_strategy="no",
        ...     use_cpu=True, disable_tqdm=True)
        >>> trainer = PruneOPDTrainer(load_student(), load_teacher(), args, ChainTask().dataset(8, seed=0),
        ...     processing_class=load_tokenizer())
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'loss': ...
        1
    """

    _tag_names = ["prune-opd", "on-policy-distillation"]  # noqa: RUF012 - the name and type are Transformers'

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        teacher_model: str | PreTrainedModel | nn.Module | None = None,
        args: PruneOPDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
    ) -> None:
        args = PruneOPDConfig(output_dir="prune_opd_output") if args is None else args
        named_teacher = args.teacher_model_name_or_path if teacher_model is None else teacher_model
        if named_teacher is None:
            raise ConfigError("a teacher is needed: teacher_model, or teacher_model_name_or_path in the settings")
        self.student_name, self.teacher_name = _name_of(model), _name_of(named_teacher)
        model, tokenizer = _loaded("student", model, {"dtype": torch.float32, **args.dictionary("model_init_kwargs")})
        processing_class = tokenizer if processing_class is None else processing_class
        if processing_class is None:
            raise ConfigError("processing_class is needed: the student's tokenizer")
        teacher, tokenizer = _loaded(
            "teacher", named_teacher, {"dtype": "auto", **args.dictionary("teacher_model_init_kwargs")}
        )
        teacher_processing_class = tokenizer if teacher_processing_class is None else teacher_processing_class
        shared = None
        if teacher_processing_class is not None:
            shared = shared_vocabulary_size(processing_class, teacher_processing_class)
        if processing_class.pad_token_id is None:
            processing_class.pad_token = processing_class.eos_token
        if processing_class.pad_token_id is None:
            raise ConfigError("the tokenizer has neither a padding nor an EOS token: set tokenizer.pad_token")
        if peft_config is not None:
            from peft import get_peft_model

            if teacher is model:
                teacher = copy.deepcopy(model)  # the adapter goes into the student's own layers
            model = get_peft_model(model, peft_config)
        tokenize = partial(
            tokenize_prompts,
            tokenizer=processing_class,
            max_prompt_length=args.max_prompt_length,
            chat_template_kwargs=args.dictionary("chat_template_kwargs"),
        )
        tokenized_train = None if train_dataset is None else tokenize(train_dataset)
        if isinstance(tokenized_train, IterableDataset):  # it has no sampler that could repeat prompts
            tokenized_train = repeat_rows(tokenized_train, args.num_generations)
        if isinstance(eval_dataset, Mapping):
            tokenized_eval: Any = {name: tokenize(part) for name, part in eval_dataset.items()}
        else:
            tokenized_eval = None if eval_dataset is None else tokenize(eval_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=tokenized_train,
            eval_dataset=tokenized_eval,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
        )
        # The loss below is the mean over the whole step already. Older and newer Trainers ask for it under either name.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        if teacher is not model:
            teacher.requires_grad_(False)
            if not hasattr(teacher, "hf_device_map"):
                teacher.to(self.args.device)
        self.drift = args.drift_config()
        self.teacher = Teacher(teacher, top_k=max(args.drift_top_k, args.loss_top_k), vocab_size=shared)
        self.teacher.restrict_vocabulary(base_causal_lm(model).get_output_embeddings().weight.shape[0])
        self.budget = args.make_budget()
        self.counts = TokenCounts()
        self.phase_seconds = {"generate": 0.0, "teacher": 0.0, "update": 0.0}
        self._clock = _StepClock(self.phase_seconds)
        # First, so that what other callbacks do at the end of a step is not booked as training.
        self.callback_handler.callbacks.insert(0, self._clock)
        self._means = MetricMeans()
        self._check_context()

    # ------------------------------------------------------------------ data

    def _collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return left_pad([list(example["input_ids"]) for example in examples], self.processing_class.pad_token_id)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = super()._get_train_sampler(dataset)
        if isinstance(sampler, RandomSampler):
            # Accelerate makes a bare random sampler repeatable by epoch; inside ours it would not see it.
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = SeedableRandomSampler(dataset, data_seed=seed)
        return sampler if sampler is None else RepeatSampler(sampler, self.args.num_generations)

    def _check_context(self) -> None:
        prompt = self.args.max_prompt_length or 0
        if isinstance(self.train_dataset, Dataset):
            prompt = max(len(ids) for ids in self.train_dataset["input_ids"])
        longest = prompt + self.args.max_completion_length
        for role, config in (
            ("student", text_config(base_causal_lm(self.model))),
            ("teacher", text_config(self.teacher.model)),
        ):
            context = getattr(config, "max_position_embeddings", None)
            if context is not None and self.args.max_completion_length >= context:
                raise ConfigError(
                    f"max_completion_length {self.args.max_completion_length} does not fit the {role}'s context of {context} "
                    "tokens: lower it"
                )
            if context is not None and longest > context:
                logger.warning(
                    "the longest prompt and max_completion_length make %d tokens, above the %s's context of %d: a "
                    "long response to it will stop the run",
                    longest,
                    role,
                    context,
                )

    # ------------------------------------------------------------------ one step

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Answer the prompts of one optimizer step, and cut the record into micro-batches by length.

        Returns:
            The micro-batches, and the response tokens of the whole step over all processes.
        """
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        if not batches:
            return [], None
        rollouts = self.generate_rollouts(merge_left_padded(batches, self.processing_class.pad_token_id))
        order = rollouts.lengths.argsort(descending=True, stable=True)
        samples = []
        for rows in order.split([len(batch["input_ids"]) for batch in batches]):
            part = rollouts.select(rows)
            samples.append({"input_ids": part.sequences, "rollouts": part})
        token_count = self.accelerator.reduce(rollouts.response_mask.sum().float().to(device), reduction="sum")
        return samples, token_count

    def generate_rollouts(self, prompts: Mapping[str, Tensor]) -> Rollouts:
        """Sample one response to each prompt of a left-padded batch while the teacher watches, update the budget, and note
        what there is to log."""
        args, started = self.args, time.perf_counter()
        cap = self.budget.length if args.pruning == "drift" else args.max_completion_length
        teacher_seconds = self.teacher.wall_seconds
        rows, at_once = len(prompts["input_ids"]), args.generation_batch_size or len(prompts["input_ids"])
        parts, discarded = [], 0
        with self._sampling_mode("rollouts", self.state.global_step) as model:
            for first in range(0, rows, at_once):
                last_seen: list[DriftProgress] = []
                monitor = DriftMonitor(
                    self.teacher,
                    self.drift,
                    check_every=args.check_every,
                    truncate=args.pruning == "drift",
                    pad_token_id=self.processing_class.pad_token_id,
                    eos_token_id=self._eos_token_ids(),
                    on_check=last_seen.append,
                )
                sequences = self._generate(
                    model,
                    {name: values[first : first + at_once] for name, values in prompts.items()},
                    cap,
                    drift_monitor=monitor,
                )
                parts.append(monitor.finish(sequences))
                discarded += last_seen[-1].discarded_tokens
        rollouts = Rollouts.cat(parts)
        teacher_seconds = self.teacher.wall_seconds - teacher_seconds
        self._note_rollouts(rollouts, cap, discarded)
        self.phase_seconds["teacher"] += teacher_seconds
        self._clock.update_started = time.perf_counter()
        self.phase_seconds["generate"] += self._clock.update_started - started - teacher_seconds
        return rollouts

    def _note_rollouts(self, rollouts: Rollouts, cap: int, discarded: int) -> None:
        if self.args.pruning == "drift":
            judged = torch.stack([rollouts.effective_lengths, rollouts.ended_naturally.long()], dim=1)
            judged = self.accelerator.gather(judged)
            self._means.add_all(self.budget.update(judged[:, 0], judged[:, 1].bool()))
        counts = TokenCounts.of(rollouts, cap, discarded)
        totals = self.accelerator.reduce(
            torch.tensor(counts.as_list(), device=rollouts.response_ids.device), reduction="sum"
        )
        self.counts = self.counts.plus(TokenCounts.from_list(totals.tolist()))
        self._means.add_all(rollout_metrics(rollouts, cap, self.args.max_completion_length))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The loss of one micro-batch: its share of the mean over all response tokens of the step.

        Distributed training averages gradients over processes, so the share is multiplied by their number.
        """
        rollouts: Rollouts = inputs["rollouts"]
        mask = rollouts.response_mask
        token_count = mask.sum().float() if num_items_in_batch is None else num_items_in_batch
        weights = rollouts.loss_weights if self.args.pruning == "drift" else mask.float()
        logits = self._response_logits(model, rollouts)
        if self.args.loss_type == "topk_policy_gradient":
            loss = self._topk_loss(logits, rollouts, weights, token_count)
        else:
            with torch.no_grad():
                teacher_logits = self._response_logits(self.teacher.model, rollouts)
            loss = reverse_kl_loss(logits, teacher_logits, weights, mask, token_count=token_count)
        with torch.no_grad():
            log_probs = logits.detach().log_softmax(dim=-1)
            entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
            self._means.add("student/entropy", float(entropy[mask].mean()), weight=int(mask.sum()))
        loss = loss * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss

    def _response_logits(self, model: nn.Module, rollouts: Rollouts) -> Float[Tensor, "batch time vocab"]:
        """float32 logits for every response token, over the vocabulary that both models share."""
        mask = rollouts.sequence_mask.long()
        time_steps = rollouts.response_ids.shape[1]
        outputs = model(
            input_ids=rollouts.sequences,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=time_steps + 1,
        )
        return outputs.logits[:, -time_steps - 1 : -1, : self.teacher.vocab_size].float()

    def _topk_loss(self, logits: Tensor, rollouts: Rollouts, weights: Tensor, token_count: Tensor) -> Tensor:
        args, k, mask = self.args, self.args.loss_top_k, rollouts.response_mask
        assert rollouts.student_topk_ids is not None  # the rollouts of this trainer always watch the student
        assert rollouts.teacher_log_probs is not None
        candidates = choose_candidates(
            rollouts.student_topk_ids[..., :k],
            rollouts.teacher_log_probs[..., :k],
            rollouts.teacher_topk_ids[..., :k],
            rollouts.teacher_topk_log_probs[..., :k],
            args.loss_support,
        )
        log_probs = logits.gather(-1, candidates.ids) - logits.logsumexp(dim=-1, keepdim=True)
        old_log_probs = log_probs.detach()
        rewards = topk_rewards(
            old_log_probs,
            candidates.teacher_log_probs,
            mask,
            support=candidates.support,
            weighting=args.loss_weighting,
            centered=args.loss_centered,
        )
        rewards = rewards * weights.unsqueeze(-1)
        loss, clip_share = topk_policy_gradient_loss(
            log_probs,
            old_log_probs,
            rewards,
            mask,
            clip_low=args.clip_low,
            clip_high=args.clip_high,
            dual_clip=args.dual_clip,
            token_count=token_count,
        )
        tokens = int(mask.sum())
        in_set = (old_log_probs.exp() * candidates.support).sum(dim=-1)
        divergence = (old_log_probs.exp() * (old_log_probs - candidates.teacher_log_probs) * candidates.support).sum(
            dim=-1
        )
        self._means.add("student/topk_mass", float(in_set[mask].mean()), weight=tokens)
        self._means.add("kl/topk", float(divergence[mask].mean()), weight=tokens)
        self._means.add("reward/mean", float(rewards.sum(dim=-1)[mask].mean()), weight=tokens)
        self._means.add("clip_share", float(clip_share), weight=tokens)
        return loss

    # ------------------------------------------------------------------ generation

    def _eos_token_ids(self) -> list[int]:
        ids = self.model.generation_config.eos_token_id if hasattr(self.model, "generation_config") else None
        ids = self.processing_class.eos_token_id if ids is None else ids
        return [ids] if isinstance(ids, int) else list(ids or [])

    def _generate(self, model: nn.Module, prompts: Mapping[str, Tensor], max_new_tokens: int, **kwargs: Any) -> Tensor:
        sampling = (
            {"do_sample": False}
            if self.args.temperature == 0
            else {
                "do_sample": True,
                "temperature": self.args.temperature,
                "top_p": self.args.top_p,
                "top_k": 0,
            }
        )
        return model.generate(
            **prompts,
            **{
                **sampling,
                "max_new_tokens": max_new_tokens,
                "pad_token_id": self.processing_class.pad_token_id,
                "eos_token_id": self._eos_token_ids(),
                "custom_generate": pruned_generate,
                **self.args.dictionary("generation_kwargs"),
                **kwargs,
            },
        )

    @contextmanager
    def _sampling_mode(self, purpose: str, step: int) -> Any:
        """The bare student in evaluation mode, under a random state of its own: the same for the same seed, step and
        process, whatever happened before. A resumed run therefore samples what the uninterrupted one did."""
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        key = [self.args.seed, step, self.args.process_index, sum(purpose.encode())]
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
        device = self.args.device
        model.eval()
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                yield model
        finally:
            model.train(training)

    # ------------------------------------------------------------------ evaluation

    def evaluate(
        self,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Answer the evaluation prompts without pruning, and measure lengths and whatever `compute_metrics` returns.

        Raises:
            InputError: there is no evaluation dataset.
        """
        given = eval_dataset is not None
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise InputError("evaluate needs an eval_dataset")
        if isinstance(dataset, Mapping):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if given and "input_ids" not in (dataset.column_names or ()):
            dataset = tokenize_prompts(
                dataset,
                self.processing_class,
                max_prompt_length=self.args.max_prompt_length,
                chat_template_kwargs=self.args.dictionary("chat_template_kwargs"),
            )
        started = time.perf_counter()
        rows = list(dataset)
        completions = self._answer(rows)
        metrics = {
            f"{metric_key_prefix}_mean_tokens": float(np.mean([completion.tokens for completion in completions])),
            f"{metric_key_prefix}_truncated_share": float(
                np.mean([not completion.ended for completion in completions])
            ),
            f"{metric_key_prefix}_runtime": time.perf_counter() - started,
        }
        if self.compute_metrics is not None:
            computed = self.compute_metrics(EvalPrediction(predictions=completions, label_ids=rows))
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in computed.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics

    def _answer(self, rows: list[dict[str, Any]]) -> list[Completion]:
        """One completion for each row, the work shared by all processes."""
        numbered = list(enumerate(rows))
        answered: list[tuple[int, Completion]] = []
        eos = torch.tensor(self._eos_token_ids(), device=self.args.device)
        with self.accelerator.split_between_processes(numbered) as mine, self._sampling_mode("evaluation", 0) as model:
            for first in range(0, len(mine), self.args.per_device_eval_batch_size):
                some = mine[first : first + self.args.per_device_eval_batch_size]
                batch = left_pad([list(row["input_ids"]) for _, row in some], self.processing_class.pad_token_id)
                batch = {name: values.to(self.args.device) for name, values in batch.items()}
                sequences = self._generate(model, batch, self.args.max_completion_length)
                responses = sequences[:, batch["input_ids"].shape[1] :]
                is_end = torch.isin(responses, eos)
                ended = is_end.any(dim=-1)
                lengths = torch.where(ended, is_end.long().argmax(dim=-1) + 1, responses.shape[1])
                for (number, _), ids, end, length in zip(
                    some, responses, ended.tolist(), lengths.tolist(), strict=True
                ):
                    text = self.processing_class.decode(ids[:length], skip_special_tokens=True)
                    answered.append((number, Completion(text, end, length)))
        everyone = gather_object(answered) if self.accelerator.num_processes > 1 else answered
        return [completion for _, completion in sorted(everyone, key=lambda item: item[0])]

    # ------------------------------------------------------------------ logging, saving, resuming

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's means, phase times and token counts to what the Trainer logs."""
        if "loss" in logs:
            logs = {**logs, **self._means.take()}
            logs |= {f"time/{phase}": seconds for phase, seconds in self.phase_seconds.items()}
            logs |= {f"tokens/{name}": count for name, count in self.counts.as_dict().items()}
        super().log({name: value for name, value in logs.items() if not _is_nan(value)}, start_time)

    def summary(self, **known: Any) -> TrainingSummary:
        """The publishable record of the run so far: settings, tokens, seconds, metrics.

        Args:
            known: fields of `TrainingSummary` that the trainer cannot know or that should read otherwise: `dataset`, a
                better `student_base` or `teacher`, the `command` that repeats the run.
        """
        settings = self.args.to_dict()
        shown = {name: settings[name] for name in HYPERPARAMETERS if name in settings}
        return TrainingSummary(
            **{
                "dataset": "unnamed dataset",
                "student_base": self.student_name,
                "teacher": self.teacher_name,
                "loss": self.args.loss_type,
                "pruning": self.args.pruning,
                "steps": self.state.global_step,
                "rollouts": self.counts.rollouts,
                "generated_tokens": self.counts.generated,
                "kept_tokens": self.counts.kept,
                "saved_tokens": self.counts.saved,
                "wall_seconds": sum(self.phase_seconds.values()),
                "phase_seconds": self.phase_seconds,
                "drift": asdict(self.drift),
                "budget": {name: settings[name] for name in settings if name.startswith("budget_")},
                "hyperparameters": {**shown, "optimizer": str(settings["optim"])},
                "hardware": describe_hardware(),
                "versions": package_versions(),
                "seeds": {"seed": self.args.seed, "data_seed": self.args.data_seed or self.args.seed},
                "history": [entry for entry in self.state.log_history if "loss" in entry or "eval_runtime" in entry],
                "created": date.today().isoformat(),
                **known,
            }
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; True resumes from the last complete checkpoint, and half-written ones are passed over.

        Raises:
            ConfigError: there is no complete checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ConfigError(
                    f"no complete checkpoint in {self.args.output_dir}: train without resume_from_checkpoint"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            save_state(
                output_dir,
                {
                    "budget": self.budget.state_dict(),
                    "counts": self.counts.as_dict(),
                    "phase_seconds": self.phase_seconds,
                },
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = load_state(checkpoint)
            self.budget.load_state_dict(state["budget"])
            self.counts = TokenCounts(**state["counts"])
            self.phase_seconds.update(state["phase_seconds"])


def _loaded(role: str, model: Any, arguments: dict[str, Any]) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """A model given by Hub id or folder, with its tokenizer; one given as an object as it is, without."""
    if not isinstance(model, str):
        return model, None
    try:
        return AutoModelForCausalLM.from_pretrained(model, **arguments), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the {role} {model!r}: {str(error).strip().splitlines()[0]}") from error


def _name_of(model: Any) -> str | None:
    """Hub id or folder of a model, where it has one."""
    if isinstance(model, str):
        return model
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
