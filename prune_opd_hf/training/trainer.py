"""`PruneOPDTrainer`: on-policy distillation with drift pruning, on `transformers.Trainer`.

One optimizer step: the prompts of all its micro-batches are answered in one `generate` call while the teacher watches
(`collecting.py`); the record of that generation already holds the teacher's scores and the student's candidates, so there is
no second teacher pass and no pass for old log-probabilities. Micro-batches are cut from it by length, and their losses
(`objective.py`) add up to one mean over the response tokens of the whole step, over accumulation and processes.

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
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from prune_opd_hf.algorithm.budget import ResponseBudget
from prune_opd_hf.errors import ConfigError, InputError, NonFiniteLogitsError
from prune_opd_hf.hub.trainer_push import PublishesStudents
from prune_opd_hf.models.lm_head import base_causal_lm
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.training.checkpoints import (
    last_complete_checkpoint,
    load_state,
    save_state,
)
from prune_opd_hf.training.clock import RunHooks, StepClock
from prune_opd_hf.training.collecting import RolloutCollector
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.data import (
    DroppedPrompts,
    RepeatSampler,
    left_pad,
    readable,
    repeat_rows,
    tokenize_prompts,
)
from prune_opd_hf.training.evaluation import answer_prompts, length_metrics
from prune_opd_hf.training.metrics import MetricMeans, TokenCounts, without_nan
from prune_opd_hf.training.objective import Objective
from prune_opd_hf.training.record import summary_of
from prune_opd_hf.training.reporting import RolloutReports, show_readable_lines
from prune_opd_hf.training.safeguards import Safeguards
from prune_opd_hf.training.sampling import StudentSampler, ids_beyond
from prune_opd_hf.training.saving import AtomicSavingTrainer
from prune_opd_hf.training.setup import check_context, end_token_ids, load_pair, warn_of_rounding
from prune_opd_hf.training.step_batch import StepBatch


class PruneOPDTrainer(AtomicSavingTrainer, PublishesStudents):
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

    Attributes:
        teacher: the `Teacher` that watches.
        counts: tokens and rollouts so far, over all processes.
        budget: the response budget.

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
        step 1/1 | loss ...
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
        pair = load_pair(model, teacher_model, args, processing_class, teacher_processing_class)
        self.student_name, self.teacher_name = pair.student_name, pair.teacher_name
        model, processing_class = pair.student, pair.tokenizer
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        self._tokenize = partial(
            tokenize_prompts,
            tokenizer=processing_class,
            max_prompt_length=args.max_prompt_length,
            chat_template_kwargs=args.dictionary("chat_template_kwargs"),
        )
        self.dropped_prompts = DroppedPrompts()
        tokenized_train = None
        if train_dataset is not None:
            if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
                raise ConfigError("a streamed dataset has no length: set max_steps to say how long to train")
            tokenized_train = self._tokenize(train_dataset, dropped=self.dropped_prompts)
        if isinstance(tokenized_train, IterableDataset):  # it has no sampler that could repeat prompts
            tokenized_train = repeat_rows(tokenized_train, args.num_generations, **args.reuse())
        if isinstance(eval_dataset, Mapping):
            tokenized_eval: Any = {name: self._tokenize(part) for name, part in eval_dataset.items()}
        else:
            tokenized_eval = None if eval_dataset is None else self._tokenize(eval_dataset)
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
        warn_of_rounding(model, args.learning_rate)
        self.teacher = pair.make_teacher(model, self.args.device, max(args.drift_top_k, args.loss_top_k))
        student_rows = base_causal_lm(model).get_output_embeddings().weight.shape[0]
        self.teacher.restrict_vocabulary(student_rows)
        self.sampler = StudentSampler(
            args,
            processing_class,
            end_token_ids(model, processing_class, self.teacher.vocab_size),
            ids_beyond(student_rows, self.teacher.vocab_size),
        )
        self.collector = RolloutCollector(args, self.sampler, self.teacher, self.accelerator)
        self.objective = Objective(args, model, self.teacher)
        self.clock = StepClock()
        # First, so that what other callbacks do at the end of a step is not booked as training.
        self.callback_handler.callbacks.insert(0, self.clock)
        self.safeguards = Safeguards(args.max_skipped_steps, args.length_explosion)
        self._means = MetricMeans()
        self.batch = StepBatch(args, self.objective, self.accelerator, processing_class.pad_token_id)
        self._resumed: dict[str, Any] | None = None
        self.add_callback(RunHooks(self.on_train_begin, lambda: self.safeguards.stop_reason is not None))
        show_readable_lines(self)
        self.add_callback(RolloutReports(args, processing_class, lambda: self.batch.rollouts))
        longest_prompt = args.max_prompt_length or 0
        if isinstance(self.train_dataset, Dataset):
            longest_prompt = max(len(ids) for ids in self.train_dataset["input_ids"])
        check_context(model, self.teacher.model, longest_prompt, args.max_completion_length)

    @property
    def counts(self) -> TokenCounts:
        """Totals so far, over all processes."""
        return self.collector.counts

    @property
    def budget(self) -> ResponseBudget:
        """The response budget; it moves only with `pruning="drift"`."""
        return self.collector.budget

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds of this process so far in generate, teacher and update."""
        return self.clock.phase_seconds

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
        return sampler if sampler is None else RepeatSampler(sampler, self.args.num_generations, **self.args.reuse())

    # ------------------------------------------------------------------ one step

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Answer the prompts of one optimizer step, and cut the record into micro-batches by length.

        Returns:
            The micro-batches, and the response tokens of the whole step over all processes.
        """
        if (
            0 < self.state.max_steps <= self.state.global_step
        ):  # resumed at its end; the Trainer would make one step more
            self.control.should_training_stop = True
            return [], None
        batches = []
        for _ in range(num_batches):
            try:
                with readable():
                    batches.append(next(epoch_iterator))
            except StopIteration:
                break
        if not batches:
            return [], None
        if self.batch.is_reused(self.state.global_step):
            self.clock.prepared()
        else:
            self.batch.fill(self.generate_rollouts, batches)
            self.safeguards.watch_rollouts(self.state.global_step + 1, *self.batch.ends)
        return self.batch.samples, self.batch.token_count

    def generate_rollouts(self, prompts: Mapping[str, Tensor]) -> Rollouts:
        """Sample one response to each prompt of a left-padded batch while the teacher watches, update the budget, and note
        what there is to log."""
        model = self.accelerator.unwrap_model(self.model)
        collected = self.collector.collect(model, prompts, self.state.global_step, self._means)
        self.clock.prepared(collected.generate_seconds, collected.teacher_seconds)
        return collected.rollouts

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm; where the step must be skipped the gradient is thrown away, so that no weight moves."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        number, scaler = float(norm), getattr(self.accelerator, "scaler", None)
        if scaler is not None and not math.isfinite(number):
            return norm  # with fp16 the loss scaler skips such a step itself
        if self.safeguards.judge(self.state.global_step + 1, number, self.batch.weight_sum):
            model.zero_grad(set_to_none=True)
        return norm

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
        token_count = rollouts.response_mask.sum().float() if num_items_in_batch is None else num_items_in_batch
        old = inputs.get("old", {})
        with self.accelerator.autocast():  # the LM head is projected outside of the model's own forward pass
            value = self.objective(model, rollouts, token_count, old.get("log_probs"))
        if self.args.num_iterations > 1:
            old["log_probs"] = value.old_log_probs
        self._means.add_all(value.metrics)
        loss = value.loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

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
            dataset = self._tokenize(dataset)
        started = time.perf_counter()
        rows = list(dataset)
        completions = answer_prompts(
            self.accelerator.unwrap_model(self.model),
            self.sampler,
            self.processing_class,
            self.accelerator,
            rows,
            batch_size=self.args.per_device_eval_batch_size,
            max_new_tokens=self.args.max_completion_length,
            device=self.args.device,
        )
        metrics = length_metrics(completions, metric_key_prefix)
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - started
        if self.compute_metrics is not None:
            computed = self.compute_metrics(EvalPrediction(predictions=completions, label_ids=rows))
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in computed.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics

    # ------------------------------------------------------------------ logging, saving, resuming

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's means, phase times and token counts to what the Trainer logs."""
        if "loss" in logs:
            several = self.accelerator.num_processes > 1
            logs = {**logs, **self._means.take((lambda mine: gather_object([mine])) if several else None)}
            self.safeguards.watch_mass(logs.get("student/topk_mass"))
            logs |= {**self.clock.take(), **self.safeguards.metrics()}
            if self.dropped_prompts.count:
                logs["data/dropped_prompts"] = float(self.dropped_prompts.count)
            logs |= {f"tokens/{name}": count for name, count in self.counts.as_dict().items()}
        super().log(without_nan(logs), start_time)

    def summary(self, **known: Any) -> TrainingSummary:
        """The publishable record of the run so far: settings, tokens, seconds, metrics.

        Args:
            known: fields of `TrainingSummary` that the trainer cannot know or that should read otherwise: `dataset`, a
                better `student_base` or `teacher`, the `command` that repeats the run.
        """
        names = {"student_base": self.student_name, "teacher": self.teacher_name}
        return summary_of(self.args, self.state, self.counts, self.phase_seconds, **{**names, **known})

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; True resumes from the last complete checkpoint, and half-written ones are passed over.

        Raises:
            ConfigError: there is no complete checkpoint.
            TrainingStoppedError: the run could not go on; see `safeguards.py`. Where there was something to save, a checkpoint
                was saved.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ConfigError(
                    f"no complete checkpoint in {self.args.output_dir}: train without resume_from_checkpoint"
                )
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        except NonFiniteLogitsError as error:
            if self.accelerator.num_processes == 1 and self.state.global_step:
                self._save_checkpoint(self.model, None)
            self.safeguards.stop_reason = str(error)
            self.safeguards.raise_if_stopped(last_complete_checkpoint(self.args.output_dir))
        self.safeguards.raise_if_stopped(last_complete_checkpoint(self.args.output_dir))
        return output

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        mine = {"means": self._means.state_dict(), "loss_since_log": float(self._tr_loss)}
        processes = gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]
        if self.args.should_save:
            save_state(
                output_dir,
                {
                    **self.collector.state_dict(),
                    "safeguards": self.safeguards.state_dict(),
                    "weight_sum": self.batch.weight_sum,
                    "phase_seconds": self.phase_seconds,
                    "processes": processes,
                    "last_logged_step": self._globalstep_last_logged,
                },
            )
        if self.state.global_step % self.args.num_iterations:
            self.batch.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._resumed = state = load_state(checkpoint)
        self.collector.load_state_dict(state)
        self.safeguards.load_state_dict(state["safeguards"])
        if self.state.global_step % self.args.num_iterations:
            self.batch.load(checkpoint, state["weight_sum"])

    def on_train_begin(self) -> None:
        """Restore what the Trainer resets when a run begins: what has been measured since the last log line."""
        state, self._resumed = self._resumed, None
        if state is None:
            return
        processes = state["processes"]
        if len(processes) != self.accelerator.num_processes:
            return  # resumed on another number of processes: the next log line begins at the checkpoint
        mine = processes[self.args.process_index]
        self._means.load_state_dict(mine["means"])
        self._tr_loss += mine["loss_since_log"]
        self._globalstep_last_logged = state["last_logged_step"]
