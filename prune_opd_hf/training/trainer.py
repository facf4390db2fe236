"""`PruneOPDTrainer`: on-policy distillation with drift pruning, on `transformers.Trainer`.

One optimizer step is `get_batch_samples`, then `compute_loss` for each micro-batch: prompts -> rollouts -> weights -> loss ->
metrics. The prompts of all its micro-batches are answered together while the teacher watches. The record of that generation holds
the teacher's scores and the student's candidates, so there is no second teacher pass and no pass for old log-probabilities.
The losses of micro-batches add up to one mean over the response tokens of the whole step, over accumulation and processes.

Departures from the paper
1. Sequences are stopped while they are generated, at their exhausted token; the reference only caps the next step's length.
2. The default reward is centred (`loss_centered`): the literal one lets probability mass leak out of the candidate set.
3. Old log-probabilities are those of the first update's own forward pass, made with the weights that generated. With one
   update for each batch the ratio is exactly 1, and the reward's log p is free of the rounding between cached decoding and
   the full pass.
4. A step that would do harm or nothing (a gradient that is not finite, no token with a weight) is skipped and counted; see
   `safeguards.py`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from prune_opd_hf.errors import ConfigError, InputError, NonFiniteLogitsError, ServingError
from prune_opd_hf.generation import Request, make_engine, resolve_engine
from prune_opd_hf.generation.engine import request_seed
from prune_opd_hf.models.generation_config import warping_settings
from prune_opd_hf.models.loading import check_adapter_config
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.teachers.base import Teacher
from prune_opd_hf.training.checkpoints import complete_checkpoint, how_to_resume, last_complete_checkpoint
from prune_opd_hf.training.completions import log_completions
from prune_opd_hf.training.config import PruneOPDConfig, settings_of
from prune_opd_hf.training.evaluate_student import StudentEvaluation, check_best_metric
from prune_opd_hf.training.launch import check_launch
from prune_opd_hf.training.metrics import MetricMeans, StepClock, StepTotals, TokenCounts, rollout_metrics, without_nan
from prune_opd_hf.training.micro_batches import OldLogProbs, StepRollouts, as_counted, split_by_length, split_by_tokens
from prune_opd_hf.training.objective import Objective
from prune_opd_hf.training.opening_lines import opening_lines, warn_of_settings
from prune_opd_hf.training.pair import (
    freeze_unread_parts,
    load_pair,
    load_tokenizers,
    make_monitor,
    make_teacher,
    samplings,
    settle_end_tokens,
    warn_of_rotary_switch,
    warn_of_rounding,
)
from prune_opd_hf.training.prompt_batches import collate, repeating_sampler, unpadded_rows
from prune_opd_hf.training.prompts import (
    DroppedPrompts,
    check_datasets,
    evaluation_prompts,
    next_batches,
    training_prompts,
)
from prune_opd_hf.training.publishing import PublishingTrainer
from prune_opd_hf.training.rollout_generation import generate_rollouts
from prune_opd_hf.training.run_output import save_rollouts, summary_of, use_readable_lines
from prune_opd_hf.training.safeguards import Safeguards
from prune_opd_hf.training.saved_student import SavedForm
from prune_opd_hf.training.teachers import (
    TeacherColumns,
    asked_teachers,
    contexts_of,
    describe_teachers,
    refuse_sharded_self,
    tokenizer_by_name,
)


class PruneOPDTrainer(PublishingTrainer):
    """Distils a teacher into a student on the student's own rollouts, pruned where the two drift apart.

    Args:
        model: the student: a causal LM, a PEFT model, or a Hub id or folder of either. Weights that are trained are loaded in
            float32 unless `model_init_kwargs` says otherwise: bfloat16 ones round updates of a learning rate of 1e-6 to nothing.
        teacher_model: likewise, or a `Teacher`, or several of these by name; what `args` names otherwise. May be `model` itself,
            without its adapter.
        args: the settings.
        train_dataset, eval_dataset: with a column `prompt`, text or a list of messages; `teacher_prompt` likewise, where the
            teacher reads another; and `teacher`, the name of each row's, where there are several.
        processing_class: the student's tokenizer, or a processor that holds it; loaded beside the student if that is given by name.
        teacher_processing_class: the teacher's, to be compared with the student's; loaded beside a teacher given by name.
        callbacks, optimizers: as for `transformers.Trainer`.
        peft_config: trains an adapter of this kind instead of all weights.
        compute_metrics: takes an `EvalPrediction` whose `predictions` are `Completion`s and whose `label_ids` are the rows
            of the evaluation dataset, and returns a dict of metrics.

    Attributes:
        teacher: scores what the student samples.
        end_tokens: the tokens that end a response, and who names them.
        pruning: how rollouts are pruned, with what it has learned so far; its `cap` is the next step's.
        counts: tokens and rollouts so far, over all processes.
        step: the rollouts of the last step on this process; None before the first.

    Raises:
        ConfigError, InputError: settings or data that cannot be worked with.
        VocabularyMismatchError: the two tokenizers differ; names the first differing token.

    Example: see examples/train_prune_opd.py; on the embedded task:
        >>> from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer
        >>> args = PruneOPDConfig(output_dir="unused", max_completion_length=16, drift_top_k=2, drift_threshold=0.5,
        ...     drift_weight_drop=0.25, per_device_train_batch_size=4, num_generations=1, max_steps=1,
        ...     report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True)
        >>> trainer = PruneOPDTrainer(load_student(), load_teacher(), args, ChainTask().dataset(8, seed=0),
        ...     processing_class=load_tokenizer())
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        end tokens: ...
        1
    """

    _tag_names = ["prune-opd", "on-policy-distillation"]  # noqa: RUF012 - the name and type are Transformers'

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        teacher_model: str | nn.Module | Teacher | Mapping[str, Any] | None = None,
        args: PruneOPDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin | Mapping[str, Any] | None = None,
    ) -> None:
        args = settings_of(args)
        check_datasets(train_dataset=train_dataset, eval_dataset=eval_dataset)
        check_launch(args, model)
        check_adapter_config(peft_config)
        if eval_dataset is None and args.eval_strategy != "no":
            raise ConfigError("eval_strategy needs an eval_dataset: pass one, or set eval_strategy='no'")
        teachers = asked_teachers(teacher_model, args)
        given = tokenizer_by_name(teacher_processing_class, teachers)
        tokenizers = load_tokenizers(model, teachers, args, processing_class, given)
        tokenizer, columns = tokenizers.student, TeacherColumns.of(args, teachers, model, tokenizers)
        self.dropped_prompts = DroppedPrompts()
        if train_dataset is not None:
            train_dataset = training_prompts(train_dataset, tokenizer, args, self.dropped_prompts, columns)
        if eval_dataset is not None:
            eval_dataset = evaluation_prompts(eval_dataset, tokenizer, args, teacher_columns=columns)
        pair = load_pair(model, teachers, args, tokenizers, peft_config)  # once all prompts were found to be such
        self.student_name, self._teacher_names = pair.student_name, pair.teacher_names
        model = pair.student
        freeze_unread_parts(model)
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
        )
        model.config.use_cache = use_cache  # the Trainer switches it off, in the saved student as well
        # The loss below is the mean over the whole step already. Older and newer Trainers ask for it under either name.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        warn_of_rounding(model, args.learning_rate)
        self._teacher_columns, self._average = columns, pair.average
        self.teacher = make_teacher(pair, args.device, args)
        left_out = warping_settings(model.generation_config)
        self.end_tokens = settle_end_tokens(pair, model, self.teacher, args)
        self.saved_form = SavedForm(self.end_tokens, getattr(torch, args.save_dtype) if args.save_dtype else None)
        sampling, eval_sampling = samplings(pair, model, self.teacher, self.end_tokens, args)
        slots = args.generation_batch_size or args.per_device_train_batch_size * args.gradient_accumulation_steps
        args.rollout_engine = resolve_engine(args.rollout_engine, model, self.teacher, sampling)  # for the records
        # Not closed at the end of a run: evaluate() or a further train() may follow. What it holds goes with the trainer.
        self.engine = make_engine(
            args.rollout_engine,
            model,
            sampling,
            slots=slots,
            teacher=self.teacher,
            vllm=args.vllm_settings(),
            dtype=args.rollout_dtype,
            compile_decoding=args.compile_decoding,
        )
        self.pruning = args.make_pruning()
        every = self.pruning.check_every(args.check_every, slots, self.teacher.block_tokens)
        self.monitor = make_monitor(args, model, self.teacher, self.engine, sampling, every, self.pruning.truncates)
        self.objective = Objective(args, model, self.teacher)
        self.evaluation = StudentEvaluation(
            args, model, self.engine, eval_sampling, self.objective, tokenizer, self.accelerator
        )
        self.counts = TokenCounts()
        self.step: StepRollouts | None = None
        self._means = MetricMeans()
        self.clock = StepClock()
        self.safeguards = Safeguards(args.max_skipped_steps, args.length_explosion)
        # The clock comes first, so that what other callbacks do at the end of a step is not counted as training.
        self.callback_handler.callbacks.insert(0, self.clock)
        self.add_callback(self.safeguards)
        refuse_sharded_self(pair, args, fsdp=self.is_fsdp_enabled, deepspeed=self.is_deepspeed_enabled)
        if self._average is not None:
            self.add_callback(self._average)
        warn_of_settings(args, sampling, self.pruning, self.teacher.vocab_size)
        use_readable_lines(
            self,
            opening_lines(args, self.end_tokens, sampling, left_out, self.pruning, self.objective.packs, tokenizer),
        )
        self.described_teachers = describe_teachers(self.teacher, teachers, pair.teacher_names, args, train_dataset)
        warn_of_rotary_switch(model, self.teacher, train_dataset, args)

    @property
    def teacher_name(self) -> str | None:
        """What a published record may call the teacher, several with the names that rows call them by."""
        named = {key: name for key, name in self._teacher_names.items() if name}
        return "; ".join(f"{key}: {name}" if key else name for key, name in named.items()) or None

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds of this process so far in generate, teacher and update."""
        return self.clock.phase_seconds

    # ------------------------------------------------------------------ one step

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The first part of an optimizer step: prompts -> rollouts -> weights -> metrics, as micro-batches for `compute_loss`.

        Returns:
            The micro-batches, and the response tokens of the whole step over all processes.
        """
        args, done = self.args, self.state.global_step
        self._restore_since_last_log()
        if 0 < self.state.max_steps <= done:  # resumed at its end; the Trainer would make one step more
            self.control.should_training_stop = True
            return [], None

        # 1. Prompts: those of all micro-batches.
        batches = next_batches(epoch_iterator, num_batches)

        if self.step is not None and done % args.num_iterations != 0:  # a further update on the same rollouts
            self.clock.prepared()
        else:
            # 2. Rollouts: the student answers, the teacher scores, pruning decides how long each row may get.
            self.step = None  # those of the last step are not held beside them
            cap, started, teacher_seconds = self.pruning.cap, time.perf_counter(), self.teacher.wall_seconds
            rollouts = self.generate_rollouts(*batches)
            teacher_seconds = self.teacher.wall_seconds - teacher_seconds
            self.clock.prepared(time.perf_counter() - started - teacher_seconds, teacher_seconds)

            # 3. Weights: how much each token counts in the loss.
            weights = self.objective.weights(rollouts)

            # 4. Totals over all processes, and metrics.
            stopped, longest = self.pruning.stopped(rollouts, cap), args.max_completion_length
            discarded = self.monitor.watch.progress.discarded_tokens
            mine = StepTotals.of(rollouts, weights, stopped, cap=cap, longest=longest, discarded=discarded)
            totals = mine.over_processes(self.accelerator)
            self.counts = self.counts.plus(totals.tokens)
            self.safeguards.watch_rollouts(done + 1, totals)
            names = self._teacher_names
            self._means.add_all(rollout_metrics(rollouts, stopped, cap=cap, longest=longest, teachers=names))
            self._means.add_all({"prune/kept_tokens": totals.tokens.kept, "prune/saved_tokens": totals.tokens.saved})
            self._means.add_max("prune/effective_length_max", float(rollouts.effective_lengths.max()))

            # 5. Pruning learns how long the next rollouts may be.
            ends = rollouts.lengths, rollouts.effective_lengths, rollouts.ended_naturally.long()
            lengths, effective, ended = self.accelerator.gather(torch.stack(ends, dim=1)).unbind(dim=1)
            self._means.add_all(self.pruning.update(lengths, effective, ended.bool()))

            # 6. Micro-batches: of so many rows, or of so many tokens.
            limit = args.max_tokens_per_micro_batch
            if limit is None:
                parts = split_by_length(rollouts, [len(batch["input_ids"]) for batch in batches])
            else:
                parts = split_by_tokens(rollouts, limit, packed=self.objective.packs, accelerator=self.accelerator)
            token_count = torch.tensor(float(totals.tokens.kept), device=args.device)
            self.step = StepRollouts(rollouts, parts, token_count, totals.weight_sum)

        if args.save_rollouts_steps and (done + 1) % args.save_rollouts_steps == 0:
            process = args.process_index if args.world_size > 1 else None
            save_rollouts(self.step.rollouts, args.output_dir, done + 1, process)
        by_rows, parts = args.max_tokens_per_micro_batch is None, self.step.micro_batches
        return parts if by_rows else as_counted(parts, num_batches), self.step.token_count

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """One micro-batch, or all those of a step where their number is not the Trainer's; the last one adds up gradients."""
        if "parts" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        total = torch.zeros((), device=self.args.device)
        for number, part in enumerate(inputs["parts"], start=1):
            # FSDP2 would keep gradients of full size until the last one.
            meets = number == len(inputs["parts"]) or self.accelerator.is_fsdp2
            with nullcontext() if meets else self.accelerator.no_sync(model):
                total += super().training_step(model, part, num_items_in_batch)
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The second part: the loss of one micro-batch, its share of the mean over all response tokens of the step.

        Distributed training averages gradients over processes, so the share is multiplied by their number.
        """
        rollouts: Rollouts = inputs["rollouts"]
        token_count = rollouts.response_mask.sum().float() if num_items_in_batch is None else num_items_in_batch
        old = inputs.get("old", OldLogProbs())
        with self.accelerator.autocast():  # the LM head is projected outside of the model's own forward pass
            value = self.objective(model, rollouts, token_count, old.values)
        if self.args.num_iterations > 1:
            old.values = value.old_log_probs
        self._means.add_all(value.metrics)
        loss = value.loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm; where the step must be skipped the gradient is thrown away, so that no weight moves."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        number, scaler = float(norm), getattr(self.accelerator, "scaler", None)
        if scaler is not None and not math.isfinite(number):
            return norm  # with fp16 the loss scaler skips such a step itself
        assert self.step is not None
        if self.safeguards.judge(self.state.global_step + 1, number, self.step.weight_sum):
            model.zero_grad(set_to_none=True)
        return norm

    def generate_rollouts(self, *batches: Mapping[str, Tensor]) -> Rollouts:
        """Sample one response to each prompt of left-padded batches as the next step would; nothing is counted or learned."""
        model, rows = self.accelerator.unwrap_model(self.model), unpadded_rows(batches)
        args, step, process = self.args, self.state.global_step, self.args.process_index
        limits = self.pruning.row_limits(len(rows), step=step, process=process).tolist()
        seeds = [request_seed(args.seed, "rollouts", step, process, number) for number in range(len(rows))]
        prompts = [row["input_ids"] for row in rows]
        requests = [Request(*each) for each in zip(prompts, seeds, limits, strict=True)]
        self.engine.update_weights(model, step)
        contexts, bar = contexts_of(rows, self.teacher), not args.disable_tqdm and self.is_world_process_zero()
        name = f"rollouts of step {step + 1}"
        return generate_rollouts(self.engine, self.monitor, model, requests, contexts, name=name, progress=bar)[0]

    # ------------------------------------------------------------------ data

    def _collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return collate(examples, self.processing_class.pad_token_id)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return repeating_sampler(super()._get_train_sampler(dataset), dataset, self.args)

    # ------------------------------------------------------------------ evaluation

    def evaluate(
        self,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Answer the evaluation prompts without pruning; measure loss, KL, overlap, lengths, and what `compute_metrics` finds."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise InputError("evaluate needs an eval_dataset")
        check_datasets(eval_dataset=dataset)
        if isinstance(dataset, Mapping):
            parts = (self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items())
            return {name: value for part in parts for name, value in part.items()}
        if "input_ids" not in (dataset.column_names or ()):
            dataset = evaluation_prompts(dataset, self.processing_class, self.args, self._teacher_columns)
        model = self.accelerator.unwrap_model(self.model)
        measured = self.evaluation.measure(
            model,
            self.model_wrapped,
            step=self.state.global_step,
            rows=list(dataset),
            compute_metrics=self.compute_metrics,
        )
        prefix = f"{metric_key_prefix}_"
        metrics = {prefix + name.removeprefix(prefix): value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: answers are sampled."""
        raise InputError("predict makes no sampled answers: evaluate(dataset) does, and compute_metrics sees them")

    # ------------------------------------------------------------------ logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last line, phase times and token counts to what the Trainer logs."""
        args, is_training_line = self.args, "loss" in logs
        if is_training_line:
            logs = {**logs, **self._means.take(gather_object([self._means]))}
            self.safeguards.watch_mass(logs.get("student/topk_mass"))
            logs |= {**self.clock.take(), **self.safeguards.metrics()}
            if self.dropped_prompts.count:
                logs["data/dropped_prompts"] = float(self.dropped_prompts.count)
            logs |= {f"tokens/{name}": count for name, count in asdict(self.counts).items()}
        super().log(without_nan(logs), start_time)
        if is_training_line and args.log_completions and self.step is not None and self.is_world_process_zero():
            log_completions(self.step.rollouts, self.processing_class, args, step=self.state.global_step)

    def summary(self, **known: Any) -> TrainingSummary:
        """The publishable record of the run so far: settings, tokens, seconds, metrics.

        Args:
            known: fields of `TrainingSummary` that the trainer cannot know or that should read otherwise: `dataset`, a
                better `student_base` or `teacher`, the `command` that repeats the run.
        """
        names = {"student_base": self.student_name, "teacher": self.teacher_name, "teachers": self.described_teachers}
        return summary_of(self.args, self.state, self.counts, self.phase_seconds, **{**names, **known})

    # ------------------------------------------------------------------ saving and resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; True resumes from the last complete checkpoint, and half-written ones are passed over.

        Raises:
            ConfigError: there is no complete checkpoint, or `metric_for_best_model` is not measured.
            TrainingStoppedError: the run could not go on; see `safeguards.py`. What there was to save is in a checkpoint.
        """
        check_best_metric(self.args, self.eval_dataset, self.compute_metrics is not None)
        named, output = resume_from_checkpoint, None
        self.safeguards.stop_reason = None  # that of an earlier call
        checkpoint = complete_checkpoint(named, self.args.output_dir, self._unchanging) if named else None
        try:
            output = super().train(checkpoint, *args, **kwargs)
        except (NonFiniteLogitsError, ServingError) as error:
            if self.accelerator.num_processes == 1 and self.state.global_step:
                self._save_checkpoint(self.model, None)
            self.safeguards.stop_reason = str(error)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(how_to_resume(self.args.output_dir)) from None
        self.safeguards.raise_if_stopped(last_complete_checkpoint(self.args.output_dir))
        return output
