"""The drift monitor: settings to keep and use for many generations, and its two hooks beside plain `model.generate`.

The hooks are thin adapters between Transformers' interfaces and a `SequencesWatch`, which holds the state of one generation. Every
`generate` call begins a fresh one.

Departures
1. The reference stops nothing while it generates: it only caps the length of the next step's rollouts. Here a sequence ends
   at its exhausted token, the first with R_t <= 1e-8 at or beyond `min_length`.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria

from prune_opd_hf.algorithm.drift import METRICS, DriftConfig
from prune_opd_hf.errors import ConfigError, InputError, MonitorStateError, warn_once
from prune_opd_hf.generation.generate_call import (
    describe_earlier_processors,
    describe_ignored_end_tokens,
    eos_token_ids,
    finished_rows,
    generate_call,
    pad_token_id,
    refuse_other_modes,
)
from prune_opd_hf.generation.prompts import mask_from_padding, repeat_for_sequences
from prune_opd_hf.generation.ragged_watch import RaggedDriftWatch
from prune_opd_hf.generation.sequences_watch import SequencesWatch
from prune_opd_hf.generation.teacher_contexts import TeacherContexts
from prune_opd_hf.generation.watch import CHANGED_TOKENS
from prune_opd_hf.generation.watch_settings import DriftProgress, WatchSettings
from prune_opd_hf.models.compatibility import as_ids, check_left_padding
from prune_opd_hf.models.vocabulary import shared_vocabulary
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.base import Teacher, TeacherContext, require, unshared_ids
from prune_opd_hf.teachers.local import LocalTeacher

logger = logging.getLogger(__name__)

NEEDS_STUDENT = (
    "the metric {metric!r} needs the student's side: pass monitor.logits_processor of a DriftMonitor to generate as well, or "
    'student=model to DriftStoppingCriteria, or choose metric="tail"'
)


class DriftMonitor:
    """Watches generations: what the student predicts, what the teacher predicts, and which rows have drifted too far.

    Args:
        teacher: a causal LM, or a `Teacher` (which carries `top_k`, the candidates recorded at each position).
        config: when a token counts as drift, and what that costs.
        check_every: tokens between two teacher passes. Results do not depend on it; the number of discarded tokens and
            the cost of the teacher do.
        truncate: stop rows whose reliability is used up. False only records.
        pad_token_id: padding token; by default that of the `generate` call, else the teacher's, else its EOS.
        eos_token_id: the token or tokens that end a sequence, beside those of the `generate` call; the teacher's where neither
            knows any.
        attention_mask: of the prompts, as given to `generate`. Needed beside plain `generate` when prompts are padded with
            a token that also ends sequences; otherwise found from the padding.
        teacher_prompt_ids, teacher_prompt_mask: another prompt for the teacher (its own chat template, a hint, an answer),
            one for each sequence, or for each prompt where `num_return_sequences` repeats them.
        student: score the student's side of each block with this model, instead of recording it from the logits.
        tokenizer, teacher_tokenizer: when both are given, their vocabularies are compared before anything is generated.
        allow_renamed_special_tokens: let added and special tokens of different meaning pass, as tokens that do not count; the
            log names them, and `generate` must not sample them: `suppress_tokens=monitor.teacher.excluded_ids`.
        on_check: called with a `DriftProgress` after every check.

    Attributes:
        logits_processor: goes into `generate(logits_processor=[...])`: records the student's candidates, changes nothing.
        stopping_criterion: goes into `generate(stopping_criteria=[...])`: stops rows whose reliability is used up.

    Raises:
        ConfigError: settings that contradict each other, the vocabulary or what the teacher can do.
        VocabularyMismatchError: the two tokenizers differ; names the first differing token.

    Example: the hooks beside `generate`.
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, eos_token_id=1, pad_token_id=0)
        >>> student, teacher = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config)
        >>> monitor = DriftMonitor(teacher, DriftConfig(top_k=4), check_every=8)
        >>> sequences = student.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False,
        ...                              logits_processor=[monitor.logits_processor],
        ...                              stopping_criteria=[monitor.stopping_criterion])
        >>> rollouts = monitor.finish(sequences)
        >>> rollouts.overlap.shape, bool((rollouts.response_ids == sequences[:, 3:]).all())
        (torch.Size([1, 4]), True)
    """

    def __init__(
        self,
        teacher: Teacher | nn.Module,
        config: DriftConfig = DriftConfig(),
        *,
        check_every: int = 32,
        truncate: bool = True,
        pad_token_id: int | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        attention_mask: Int[Tensor, "prompts prompt"] | None = None,
        teacher_prompt_ids: Int[Tensor, "prompts teacher_prompt"] | None = None,
        teacher_prompt_mask: Int[Tensor, "prompts teacher_prompt"] | None = None,
        student: nn.Module | None = None,
        tokenizer: Any = None,
        teacher_tokenizer: Any = None,
        allow_renamed_special_tokens: bool = False,
        on_check: Callable[[DriftProgress], None] | None = None,
    ) -> None:
        if isinstance(check_every, bool) or not isinstance(check_every, int) or check_every < 1:
            raise ConfigError(f"check_every must be at least 1 token, and a whole number; got {check_every!r}")
        if teacher_prompt_mask is not None and teacher_prompt_ids is None:
            raise ConfigError("teacher_prompt_mask was given without teacher_prompt_ids")
        teacher = LocalTeacher(teacher, top_k=config.top_k) if isinstance(teacher, nn.Module) else teacher
        if not isinstance(teacher, Teacher):
            raise ConfigError(
                f"teacher must be a loaded model or a Teacher, got {teacher!r}: load it with from_pretrained"
            )
        if teacher.top_k < config.top_k:
            raise ConfigError(
                f"the Teacher records {teacher.top_k} candidates, the drift metric needs {config.top_k}: "
                f"make it with Teacher(model, top_k={config.top_k})"
            )
        if METRICS[config.metric].needs_candidate_scores:
            require(teacher, "scores_candidates", f"metric={config.metric!r}", f"choose metric={DriftConfig.metric!r}")
        if tokenizer is not None and teacher_tokenizer is not None:
            allowed = {"allow_renamed_special_tokens": allow_renamed_special_tokens}
            shared = shared_vocabulary(tokenizer, teacher_tokenizer, **allowed)
            teacher.restrict_vocabulary(shared.size, shared.excluded_ids)
            if shared.renamed:
                logger.warning(shared.describe())
        scorer = None
        if student is not None:
            scorer = LocalTeacher(student, top_k=teacher.top_k, role="student")
            teacher.restrict_vocabulary(scorer.vocab_size)
            scorer.restrict_vocabulary(teacher.vocab_size, teacher.excluded_ids)
        ends_of = teacher if scorer is None else scorer
        self._given = {"eos": eos_token_id, "pad": pad_token_id}
        eos = ends_of.special_token_ids("eos_token_id") if eos_token_id is None else as_ids(eos_token_id)
        pads = (*as_ids(pad_token_id), *ends_of.special_token_ids("pad_token_id"), *eos)
        self.settings = WatchSettings(
            teacher, config, check_every, truncate, eos, pads[0] if pads else None, scorer, on_check
        )
        self._attention_mask = attention_mask
        self._teacher_prompt = (teacher_prompt_ids, teacher_prompt_mask)
        self._watch: SequencesWatch | RaggedDriftWatch | None = None
        self._generation_config: Any = (
            None  # of the `generate` call that the hooks observe: it tells one call from the next
        )
        self.logits_processor = StudentTopKLogitsProcessor(self)
        self.stopping_criterion = DriftStoppingCriteria.of(self)

    @property
    def teacher(self) -> Teacher:
        return self.settings.teacher

    @property
    def config(self) -> DriftConfig:
        return self.settings.config

    @property
    def watch(self) -> Any:
        """The state of the newest generation."""
        if self._watch is None:
            raise MonitorStateError("no generation was observed")
        return self._watch

    def begin(
        self,
        *,
        eos_token_ids: Iterable[int] | None = None,
        pad_token_id: int | None = None,
        device: torch.device | str = "cpu",
        ragged: bool = False,
        contexts: Sequence[TeacherContext] = (),
    ) -> Any:
        """A fresh watch over one generation, for an engine to report to.

        Args:
            eos_token_ids: the tokens that end a row in this generation, where they are known; those that this monitor was made
                with count as well.
            pad_token_id: the token that pads a row; one that this monitor was made with goes before it.
            device: of the tokens.
            ragged: for an engine whose rows come each at a pace of its own; the watch is a `RaggedDriftWatch`.
            contexts: what the teacher reads of each request, where it is not the student's prompt, and which teacher it is.

        Raises:
            ConfigError: this monitor was made with prompts for the teacher, which belong to the rows of one `generate` call; or
                `ragged`, and its teacher or student cannot follow rows of different lengths.
        """
        if self._teacher_prompt[0] is not None:
            raise ConfigError(
                "teacher_prompt_ids belong to the sequences of one generate call: give begin the contexts of an engine's requests"
            )
        settings = self._settings_of(eos_token_ids, pad_token_id)
        if ragged:
            for role, scorer in (("teacher", settings.teacher), ("student", settings.student)):
                if scorer is not None:
                    require(scorer, "ragged_rows", "an engine that streams rows", "use the engine 'loop'", role=role)
        watch = RaggedDriftWatch if ragged else SequencesWatch
        self._watch = watch(settings, torch.device(device), contexts=TeacherContexts(contexts))
        return self._watch

    def _settings_of(self, eos_token_ids: Iterable[int] | None, pad_token_id: int | None) -> WatchSettings:
        """Those of one generation."""
        settings = self.settings
        if eos_token_ids is not None:
            given = () if self._given["eos"] is None else settings.eos_token_ids
            settings = replace(settings, eos_token_ids=tuple(dict.fromkeys((*given, *eos_token_ids))))
        if pad_token_id is not None and self._given["pad"] is None:
            settings = replace(settings, pad_token_id=pad_token_id)
        return settings

    def begin_with(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        attention_mask: Int[Tensor, "batch prompt"] | None = None,
        *,
        eos_token_ids: Iterable[int] | None = None,
        pad_token_id: int | None = None,
        beside_generate: bool = False,
    ) -> SequencesWatch:
        """`begin`, with the prompts of a whole batch.

        Args:
            prompt_ids, attention_mask: of the student, padded on the left, already repeated for `num_return_sequences`. Without a
                mask the monitor's own is taken, else it is found from the padding.
            eos_token_ids, pad_token_id: as for `begin`.
            beside_generate: the hooks report tokens, and verify them.

        Raises:
            InputError: empty or right-padded prompts, padding that looks like text without the mask, or a mask or
                teacher's prompts that do not fit the sequences.
        """
        if prompt_ids.shape[1] == 0:
            raise InputError("generate was called without a prompt; the teacher needs at least one prompt token")
        settings = self._settings_of(eos_token_ids, pad_token_id)
        contexts = TeacherContexts.of_sequences(prompt_ids, *self._teacher_prompt)
        watch = SequencesWatch(settings, prompt_ids.device, contexts=contexts, can_verify=beside_generate)
        self._watch = watch
        if eos_token_ids is not None:
            named = {*self.teacher.special_token_ids("eos_token_id")}
            known = named.difference(unshared_ids(self.teacher, max(named, default=0) + 1))
            ignored = describe_ignored_end_tokens(sorted(known), watch.settings.eos_token_ids)
            if ignored is not None:
                warn_once(logger, ignored)
        mask = self._attention_mask if attention_mask is None else attention_mask
        if mask is None:
            starts = self.teacher.special_token_ids("bos_token_id")
            mask = mask_from_padding(prompt_ids, watch.settings.pad_token_id, watch.settings.eos_token_ids, starts)
        mask = repeat_for_sequences(mask.to(prompt_ids.device), prompt_ids, "attention_mask")
        if mask.shape != prompt_ids.shape:
            raise InputError(
                f"attention_mask has the shape {tuple(mask.shape)}, the prompts {tuple(prompt_ids.shape)}: "
                "give the monitor the mask that generate gets"
            )
        check_left_padding(mask)
        watch.add_rows(prompt_ids, mask)
        return watch

    def finish(self, sequences: Any) -> Rollouts:
        """Score what is still pending of the newest generation and return its record.

        Args:
            sequences: what `generate` returned: token ids of shape (batch, prompt + time), or an output with `.sequences`.

        Raises:
            MonitorStateError: no generation was observed, this was called before, or the tokens are not those that were observed
                (beam search reorders them, assisted decoding takes them back).
        """
        if self.watch.is_finished:
            raise MonitorStateError("finish was called twice for one generation")
        return self.watch.finish(getattr(sequences, "sequences", sequences))


class StudentTopKLogitsProcessor(LogitsProcessor):
    """Records the student's most likely tokens at each step and returns the scores unchanged.

    Made by `DriftMonitor`, as `monitor.logits_processor`. Custom processors run after the penalties and before the warpers, so it
    sees the distribution at temperature 1; a repetition penalty, if one is set, is part of what it sees.
    """

    def __init__(self, monitor: DriftMonitor) -> None:
        self.monitor = monitor

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Record `scores`, shape (batch, vocab), for the token that follows `input_ids`, and return them as they are.

        Raises:
            UnsupportedGenerationError: `generate` does neither greedy decoding nor sampling with a decoder-only model.
            MonitorStateError: the call does not continue the one before.
            NonFiniteLogitsError: NaN or infinite logits that are about to be sampled from.
        """
        call = generate_call()
        watch = _running_watch(self.monitor, call)
        if watch is None:
            watch = _begin(self.monitor, input_ids, call)
            warped = describe_earlier_processors(call, self)
            if warped is not None:
                warn_once(logger, warped)
        else:
            _catch_up(watch, input_ids)
            _end_finished_rows(watch, self.monitor)
        if watch.needs_candidates:
            watch.observe_logits(scores.clone())
        config = call.get("generation_config")
        sampled = config is not None and bool(config.do_sample)
        if sampled and scores.device.type == "cpu" and not bool(scores.amax(dim=-1).isfinite().all()):
            watch.check_sampled_from()  # in place of torch.multinomial, which does not say whose logits they were
        return scores


class DriftStoppingCriteria(StoppingCriteria):
    """Stops every sequence whose reliability is used up. Works beside `generate` alone, or with `DriftMonitor`'s processor.

    With the metric "tail" it needs nothing more. With those that compare distributions it takes `student=model` and scores the
    student's side of each block itself: dearer than the monitor's processor, but one line.

    Args:
        teacher, config, and the keyword arguments: as for `DriftMonitor`.

    Raises:
        ConfigError: a metric that compares distributions with neither `student` nor the monitor's processor; settings out of range.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, eos_token_id=1, pad_token_id=0)
        >>> student, teacher = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config)
        >>> criterion = DriftStoppingCriteria(teacher, DriftConfig(metric="tail", weight_drop=1.0), check_every=4)
        >>> sequences = student.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=16, stopping_criteria=[criterion])
        >>> criterion.finish(sequences).stop_reason[0] in ("drift", "eos", "length")
        True
    """

    def __init__(
        self,
        teacher: Teacher | nn.Module,
        config: DriftConfig = DriftConfig(),
        *,
        student: nn.Module | None = None,
        **monitor_arguments: Any,
    ) -> None:
        if METRICS[config.metric].needs_student and student is None:
            raise ConfigError(NEEDS_STUDENT.format(metric=config.metric))
        self.monitor = DriftMonitor(teacher, config, student=student, **monitor_arguments)

    @classmethod
    def of(cls, monitor: DriftMonitor) -> "DriftStoppingCriteria":
        """The criterion that reads this monitor's decisions."""
        criterion = cls.__new__(cls)
        criterion.monitor = monitor
        return criterion

    @property
    def eos_token_id(self) -> int:
        """Its presence makes `generate` pad finished rows; absent where no padding token is known, to `generate` above all."""
        config, watch = generate_call().get("generation_config"), self.monitor._watch
        pad = (self.monitor.settings if watch is None else watch.settings).pad_token_id
        if pad is None or (config is not None and pad_token_id(config) is None):
            raise AttributeError("eos_token_id")
        return pad

    def __call__(self, input_ids: torch.LongTensor, scores: Any = None, **kwargs: Any) -> torch.BoolTensor:
        """Report the token that was appended last; returns which rows of `input_ids`, shape (batch, total), are stopped.

        Raises:
            ConfigError: the metric needs the student's logits and they are not observed.
            UnsupportedGenerationError: `generate` does neither greedy decoding nor sampling with a decoder-only model.
            MonitorStateError: the tokens are not those observed before.
        """
        call = generate_call()
        watch = _running_watch(self.monitor, call)
        if watch is None:
            config = self.monitor.config
            if METRICS[config.metric].needs_student and self.monitor.settings.student is None:
                raise ConfigError(NEEDS_STUDENT.format(metric=config.metric))
            watch = _begin(self.monitor, input_ids[:, :-1], call)
        _end_finished_rows(watch, self.monitor)
        _catch_up(watch, input_ids)
        return watch.stopped

    def finish(self, sequences: Any) -> Rollouts:
        """The record of the newest generation; see `DriftMonitor.finish`."""
        return self.monitor.finish(sequences)


def _running_watch(monitor: DriftMonitor, call: Any) -> SequencesWatch | None:
    """The watch over the `generate` call that is running; None where that call is a new one."""
    watch, config = monitor._watch, call.get("generation_config")
    if (
        not isinstance(watch, SequencesWatch)
        or watch.is_finished
        or (config is not None and monitor._generation_config is not config)
    ):
        return None
    return watch


def _begin(monitor: DriftMonitor, prompt_ids: Tensor, call: Any) -> SequencesWatch:
    """A fresh watch, with what the running `generate` knows of ends and padding."""
    if not call:
        return monitor.begin_with(prompt_ids, beside_generate=True)
    config = call["generation_config"]
    refuse_other_modes(call["self"], config, call.get("assistant_model"))
    watch = monitor.begin_with(
        prompt_ids,
        eos_token_ids=eos_token_ids(call["prepared_stopping_criteria"]).tolist(),
        pad_token_id=pad_token_id(config),
        beside_generate=True,
    )
    monitor._generation_config = config
    return watch


def _end_finished_rows(watch: SequencesWatch, monitor: DriftMonitor) -> None:
    """Rows that `generate` has ended with the newest token that was reported; what it pads them with may be an end token."""
    finished = finished_rows(monitor)
    if finished is not None:
        watch.end_rows((finished & ~watch.stopped).nonzero().squeeze(-1))


def _catch_up(watch: SequencesWatch, input_ids: Tensor) -> None:
    """Report the newest token, unless the other hook has reported it already."""
    taken, rows = watch.steps, watch.rows
    time = input_ids.shape[1] - watch.prompt_columns
    if time == taken:
        return
    if time != taken + 1 or input_ids.shape[0] != rows:
        raise MonitorStateError(
            f"{CHANGED_TOKENS} Expected {taken + 1} response tokens in {rows} rows, got {time} in {input_ids.shape[0]}."
        )
    if watch.next_token_is_scored:
        watch.verify(input_ids[:, watch.prompt_columns :])
    watch.append_tokens(input_ids[:, -1])
