"""What `generate` prepared for a decoding loop: sorted processors and criteria, and what this package's loop cannot do."""

import inspect
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from prune_opd_hf.errors import UnsupportedGenerationError
from prune_opd_hf.generation.generate_call import eos_token_ids, generate_call, pad_token_id, refuse_other_modes
from prune_opd_hf.generation.logits_processors import efficient_processor, is_position_free, is_row_local
from prune_opd_hf.models.compatibility import refuse_checkpointing

KNOWN_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


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
    """Let greedy decoding and sampling of decoder-only models from token ids pass.

    Raises:
        UnsupportedGenerationError: another mode, training mode with gradient checkpointing, `inputs_embeds`, a streamer, or outputs
            for every row at every step.
    """
    refuse_other_modes(model, generation_config)
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
            f"{', '.join(asked)}: rows leave the batch as they end, so there are no outputs for every row at every step. "
            "Use plain generate with the monitor's processor and criterion, or the log-probabilities in its Rollouts"
        )
    if generate_call().get("streamer") is not None:
        raise UnsupportedGenerationError(
            "generate does not hand a streamer to a custom loop, so it would wait for ever: use plain generate with the "
            "monitor's processor and criterion, or the monitor's on_check"
        )


def compaction_obstacle(model: Any, model_kwargs: dict[str, Any]) -> str | None:
    """Why the batch cannot be compacted, in words; None where it can."""
    cache = model_kwargs.get("past_key_values")
    if not model_kwargs.get("use_cache", True):
        return "use_cache is off"
    if not isinstance(cache, DynamicCache):
        return f"its cache is {type(cache).__name__}, not a DynamicCache"
    if any(getattr(layer, "is_initialized", False) for layer in cache.layers):
        return "it continues from a cache that was passed in"
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.ndim != 2:
        return f"its position_ids have {positions.ndim} axes"
    unknown = sorted(name for name, value in model_kwargs.items() if value is not None and name not in KNOWN_INPUTS)
    if unknown:
        return f"its forward pass takes {', '.join(unknown)}"
    method = inspect.unwrap(type(model).prepare_inputs_for_generation)
    if method is not inspect.unwrap(GenerationMixin.prepare_inputs_for_generation):
        return f"{type(model).__name__} prepares its inputs in its own way"
    return None
