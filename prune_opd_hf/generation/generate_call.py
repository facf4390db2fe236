"""What the running `generate` was asked for and what it prepared for a decoding loop.

`generate` hands neither its streamer to a custom loop nor its mode, model and special tokens to processors and criteria: those are
read from its frame. Without such a frame (another decoding loop) nothing is known.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from prune_opd_hf.errors import UnsupportedGenerationError
from prune_opd_hf.generation.logits_processors import efficient_processor, is_position_free, is_row_local
from prune_opd_hf.models.compatibility import refuse_checkpointing, rotary_switch
from prune_opd_hf.models.lm_head import text_config

KNOWN_INPUTS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "cache_position",
}


def generate_call() -> Mapping[str, Any]:
    """The local variables of the innermost `generate` that is running in this thread; empty where none is."""
    return _variables_of(GenerationMixin.generate)


def finished_rows(monitor: Any) -> Bool[Tensor, " rows"] | None:
    """Rows that plain `generate` pads from now on, in this thread; None where no criterion but this monitor's ends rows in it."""
    known, running = (MaxLengthCriteria, EosTokenCriteria), _variables_of(GenerationMixin._sample)
    criteria = running.get("stopping_criteria", ())
    others = any(not isinstance(item, known) and getattr(item, "monitor", None) is not monitor for item in criteria)
    return running["unfinished_sequences"] == 0 if others else None


def _variables_of(function: Any) -> Mapping[str, Any]:
    code = inspect.unwrap(function).__code__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is code:
            return frame.f_locals
        frame = frame.f_back
    return {}


def refuse_other_modes(model: Any, generation_config: GenerationConfig, assistant_model: Any = None) -> None:
    """Let greedy decoding and sampling of decoder-only models pass."""
    if model.config.is_encoder_decoder:
        raise UnsupportedGenerationError(
            f"{type(model).__name__} is an encoder-decoder model; drift can be watched in decoder-only models"
        )
    mode = generation_config.get_generation_mode(assistant_model)
    if getattr(generation_config, "is_assistant", False):
        mode = GenerationMode.ASSISTED_GENERATION
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UnsupportedGenerationError(
            f"the drift monitor and its loop follow greedy decoding and sampling, not {mode.value.replace('_', ' ')}: "
            "set num_beams=1 and leave out assistant models, penalty_alpha and constraints"
        )


def eos_token_ids(stopping_criteria: StoppingCriteriaList) -> Int[Tensor, " ends"]:
    """The tokens that end a row in this generation; none where it has no EOS criterion."""
    ids = [item.eos_token_id.reshape(-1) for item in stopping_criteria if isinstance(item, EosTokenCriteria)]
    return torch.cat(ids).cpu() if ids else torch.empty(0, dtype=torch.long)


def pad_token_id(generation_config: GenerationConfig) -> int | None:
    """What `generate` pads finished rows with, if it knows a padding token."""
    pad = getattr(generation_config, "_pad_token_tensor", None)
    return generation_config.pad_token_id if pad is None else int(pad)


def describe_ignored_end_tokens(teacher_ids: Sequence[int], ends: Sequence[int]) -> str | None:
    """Which tokens end the teacher's responses and no row of `generate`, and what to do; None where there are none."""
    missing = [token for token in teacher_ids if token not in ends]
    if not missing:
        return None
    return (
        f"the teacher ends its responses with token {' and '.join(map(str, missing))}, and generate ends rows with {list(ends)} "
        f"only, so rows go on behind the teacher's end: pass eos_token_id={[*ends, *missing]} to generate"
    )


def describe_earlier_processors(call: Mapping[str, Any], processor: Any) -> str | None:
    """Which processors, such as a penalty of the generation config, change what this one sees; None where none does."""
    earlier = takewhile(lambda item: item is not processor, call.get("prepared_logits_processor", ()))
    names = " and ".join(type(item).__name__ for item in earlier)
    if not names:
        return None
    return (
        f"{names} of this generate call run before the monitor, so what it records is not the student's own distribution: pass "
        "neutral values to generate, such as repetition_penalty=1.0, or use pruned_generate, which records what comes before them"
    )


@dataclass(frozen=True)
class GenerationPlan:
    """What `generate` prepared, sorted.

    Attributes:
        processors, criteria: without EOS and length.
        eos: tokens that end a row.
        pad: fills rows that have ended.
        max_length: columns of a sequence at most.
    """

    model: Any
    config: GenerationConfig
    processors: list[Any]
    criteria: list[Any]
    eos: Int[Tensor, " ends"]
    pad: int
    max_length: int

    @classmethod
    def of(
        cls,
        model: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        pad: int | None = None,
    ) -> "GenerationPlan":
        """Sort what `generate` prepared; `pad` where its config knows no padding token."""
        known_pad = pad_token_id(generation_config)
        return cls(
            model=model,
            config=generation_config,
            processors=[efficient_processor(item) for item in logits_processor],
            criteria=[item for item in stopping_criteria if not isinstance(item, MaxLengthCriteria | EosTokenCriteria)],
            eos=eos_token_ids(stopping_criteria),
            pad=(pad or 0) if known_pad is None else known_pad,
            max_length=min(item.max_length for item in stopping_criteria if isinstance(item, MaxLengthCriteria)),
        )

    @property
    def do_sample(self) -> bool:
        """Whether tokens are drawn; otherwise the most likely one is taken."""
        return bool(self.config.do_sample)

    @property
    def rows_may_join(self) -> bool:
        """Whether no processor or criterion asks which row stands where, or in which column its response begins."""
        return all(map(is_position_free, self.processors)) and all(map(is_row_local, self.criteria))

    @property
    def shows_whole_batch(self) -> bool:
        """Whether some processor or criterion must see every row of the batch at its place."""
        return not all(map(is_row_local, [*self.processors, *self.criteria]))


def refuse_unsupported(model: Any, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Let greedy decoding and sampling of decoder-only models from token ids pass."""
    refuse_other_modes(model, generation_config, generate_call().get("assistant_model"))
    refuse_checkpointing(model, "student")
    if model_kwargs.get("inputs_embeds") is not None:
        raise UnsupportedGenerationError(
            "pruned_generate needs input_ids: the teacher cannot read the student's inputs_embeds"
        )
    asked = [
        name
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        if generation_config.return_dict_in_generate and getattr(generation_config, name, False)
    ]
    if asked:
        raise UnsupportedGenerationError(
            f"{', '.join(asked)}: the batch is compacted as rows end, so there are no outputs for every row at every step. "
            "Use plain generate with the monitor's processor and criterion, or the log-probabilities in its Rollouts"
        )
    if generate_call().get("streamer") is not None:
        raise UnsupportedGenerationError(
            "generate does not hand a streamer to a custom loop, so it would wait for ever: use plain generate with the "
            "monitor's processor and criterion, or the monitor's on_check"
        )


def compaction_obstacle(model: Any, model_kwargs: dict[str, Any], max_length: int) -> str | None:
    """Why the batch cannot be compacted, in words; None where it can.

    Args:
        model_kwargs: as `generate` prepared them.
        max_length: tokens that a sequence may come to.
    """
    cache = model_kwargs.get("past_key_values")
    if not model_kwargs.get("use_cache", True):
        return "use_cache is off"
    if not isinstance(cache, DynamicCache):
        return f"its cache is {type(cache).__name__}, not a DynamicCache"
    if any(getattr(layer, "keys", None) is not None for layer in cache.layers):
        return "it continues from a cache that was passed in"
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.ndim != 2:
        return f"its position_ids have {positions.ndim} axes"
    unknown = _others(model_kwargs)
    if unknown:
        return f"its forward pass takes {', '.join(unknown)}"
    switch = rotary_switch(model)
    if switch is not None and max_length > switch:
        return f"its rotary embedding changes at {switch} tokens, and a sequence may come to {max_length}"
    method = inspect.unwrap(type(model).prepare_inputs_for_generation)
    if method is inspect.unwrap(GenerationMixin.prepare_inputs_for_generation):
        return None
    if not (
        method.__module__.startswith("transformers.models.") and _prepares_plainly(model, model_kwargs, max_length)
    ):
        return f"{type(model).__name__} prepares its inputs in its own way"
    return None


def _others(inputs: Mapping[str, Any]) -> list[str]:
    """Inputs that hold something and are not those of every model."""
    return sorted(
        name
        for name, value in inputs.items()
        if name not in KNOWN_INPUTS and value is not None and not (isinstance(value, dict) and not value)
    )


def _prepares_plainly(model: Any, model_kwargs: dict[str, Any], max_length: int) -> bool:
    """Whether a family's own `prepare_inputs_for_generation` hands over what the loop would: the tokens, their mask and positions,
    the cache, and beside them nothing that counts. It is asked at the length that sequences may come to, because some families
    change there."""
    ids = torch.zeros(1, max_length, dtype=torch.long, device=model.device)
    mask, cache = torch.ones_like(ids), DynamicCache(config=text_config(model))
    given = {**model_kwargs, "attention_mask": mask, "past_key_values": cache}
    if given.get("position_ids") is not None:
        given["position_ids"] = mask.cumsum(dim=-1) - 1
    for is_first, read in ((True, max_length), (False, 1)):
        expected = {"input_ids": ids[:, -read:], **given}
        if given.get("position_ids") is not None:
            expected["position_ids"] = given["position_ids"][:, -read:]
        length = {} if is_first else {"next_sequence_length": 1}
        made = type(model).prepare_inputs_for_generation(model, ids, is_first_iteration=is_first, **length, **given)
        if made.get("past_key_values") is not cache or _others({**made, "input_ids": None}):
            return False
        for name in ("input_ids", "attention_mask", "position_ids"):
            ours, theirs = expected.get(name), made.get(name)
            if (ours is None) != (theirs is None) or (ours is not None and not torch.equal(ours, theirs)):
                return False
    return True
