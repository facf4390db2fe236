"""The pair beside plain `model.generate`: a logits processor that records, and a stopping criterion that stops.

Thin adapters between Transformers' interfaces and the drift monitor; all state lies in the monitor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria

from prune_opd_hf.algorithm.drift import DriftConfig
from prune_opd_hf.errors import ConfigError, MonitorStateError, UnsupportedGenerationError
from prune_opd_hf.generation.generate_call import eos_token_ids, generate_call, pad_token_id, refuse_other_modes
from prune_opd_hf.generation.monitor import CHANGED_TOKENS, DriftMonitor, DriftProgress
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.base import Teacher

NORMALIZED_TOLERANCE = 1e-5


class StudentTopKLogitsProcessor(LogitsProcessor):
    """Records the student's most likely tokens at each step and returns the scores unchanged.

    Made by `DriftMonitor.logits_processor`. Custom processors run after the penalties and before the warpers, so it sees the
    distribution at temperature 1; a repetition penalty, if one is set, is part of what it sees.
    """

    def __init__(self, monitor: DriftMonitor) -> None:
        self.monitor = monitor

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Record `scores`, shape (batch, vocab), for the token that follows `input_ids`, and return them as they are.

        Raises:
            UnsupportedGenerationError: `generate` does neither greedy decoding nor sampling with a decoder-only model, or the
                scores are normalised already, as beam search passes them.
            MonitorStateError: the call does not continue the one before.
            NonFiniteLogitsError: NaN or infinite logits that are about to be sampled from.
        """
        monitor = self.monitor
        if not monitor.is_open:
            if bool((scores.float().logsumexp(dim=-1).abs() < NORMALIZED_TOLERANCE).all()):
                raise UnsupportedGenerationError(
                    "the scores arrive as log-probabilities, which is what beam search passes: the drift monitor follows "
                    "greedy decoding and sampling (num_beams=1)"
                )
            _open(monitor, input_ids)
        else:
            _catch_up(monitor, input_ids)
        monitor.watch(scores.clone())
        if scores.device.type == "cpu" and not bool(scores.amax(dim=-1).isfinite().all()) and _is_sampled():
            monitor.refuse_rubbish()  # in place of torch.multinomial, which does not say whose logits they were
        return scores


class DriftStoppingCriteria(StoppingCriteria):
    """Stops every sequence whose reliability is used up. Works beside `generate` alone, or with `DriftMonitor`'s processor.

    With the metric "nucleus" it needs nothing more. With "overlap" and "mass" it takes `student=model` and scores the student's
    side of each block itself: dearer than the monitor's processor, but one line. One criterion serves one `generate` call.

    Args:
        teacher, config, and the keyword arguments: as for `DriftMonitor`.

    Raises:
        ConfigError: "overlap" or "mass" with neither `student` nor the monitor's processor, or settings out of range.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, eos_token_id=1, pad_token_id=0)
        >>> student, teacher = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config)
        >>> criterion = DriftStoppingCriteria(teacher, DriftConfig(metric="nucleus", weight_drop=1.0), check_every=4)
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
        check_every: int = 32,
        truncate: bool = True,
        on_check: Callable[[DriftProgress], None] | None = None,
        **monitor_arguments: Any,
    ) -> None:
        if config.metric != "nucleus" and student is None:
            raise ConfigError(NEEDS_STUDENT.format(metric=config.metric))
        self.monitor = DriftMonitor(
            teacher,
            config,
            student=student,
            check_every=check_every,
            truncate=truncate,
            on_check=on_check,
            **monitor_arguments,
        )

    @classmethod
    def of(cls, monitor: DriftMonitor) -> "DriftStoppingCriteria":
        """The criterion that reads this monitor's decisions."""
        criterion = cls.__new__(cls)
        criterion.monitor = monitor
        return criterion

    @property
    def eos_token_id(self) -> int:
        """Its presence makes `generate` pad finished rows; absent where no padding token is known, to `generate` above all."""
        config = generate_call().get("generation_config")
        if self.monitor.pad_token_id is None or (config is not None and pad_token_id(config) is None):
            raise AttributeError("eos_token_id")
        return self.monitor.pad_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: Any = None, **kwargs: Any) -> torch.BoolTensor:
        """Take the token that was appended last, and say which rows of `input_ids`, shape (batch, total), are stopped.

        Raises:
            ConfigError: the metric needs the student's logits and nobody shows them.
            UnsupportedGenerationError: `generate` does neither greedy decoding nor sampling with a decoder-only model.
            MonitorStateError: the tokens are not those seen before.
        """
        monitor = self.monitor
        if not monitor.is_open:
            if monitor.needs_logits:
                raise ConfigError(NEEDS_STUDENT.format(metric=monitor.config.metric))
            _open(monitor, input_ids[:, :-1])
        _catch_up(monitor, input_ids)
        return monitor.stopped

    def finish(self, sequences: Any) -> Rollouts:
        """The record of this generation; see `DriftMonitor.finish`."""
        return self.monitor.finish(sequences)


NEEDS_STUDENT = (
    "the metric {metric!r} needs the student's side: pass monitor.logits_processor of a DriftMonitor to generate as well, or "
    'student=model to DriftStoppingCriteria, or choose metric="nucleus"'
)


def _open(monitor: DriftMonitor, prompt_ids: Tensor) -> None:
    """Begin, with what the running `generate` knows of ends and padding where the monitor was not told."""
    call = generate_call()
    if not call:
        monitor.open(prompt_ids)
        return
    config = call["generation_config"]
    refuse_other_modes(call["self"], config, call.get("assistant_model"))
    monitor.open(
        prompt_ids,
        eos_token_ids=None if monitor.chosen_tokens["eos"] else eos_token_ids(call["prepared_stopping_criteria"]),
        pad_token_id=None if monitor.chosen_tokens["pad"] else pad_token_id(config),
    )


def _is_sampled() -> bool:
    config = generate_call().get("generation_config")
    return config is not None and bool(config.do_sample)


def _catch_up(monitor: DriftMonitor, input_ids: Tensor) -> None:
    """Take the newest token, unless the other half of the pair has taken it already."""
    time = input_ids.shape[1] - monitor.prompt_length
    if time == monitor.taken:
        return
    if time != monitor.taken + 1 or input_ids.shape[0] != len(monitor.stopped):
        raise MonitorStateError(
            f"{CHANGED_TOKENS} Expected {monitor.taken + 1} response tokens in {len(monitor.stopped)} rows, got {time} in "
            f"{input_ids.shape[0]}; one monitor serves one generate call."
        )
    if (monitor.taken + 1) % monitor.check_every == 0:
        monitor.verify(input_ids)
    monitor.take(input_ids[:, -1])
