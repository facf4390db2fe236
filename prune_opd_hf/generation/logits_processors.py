"""Which of Transformers' logits processors and stopping criteria treat each row by itself, and equals of some that cost less.

Those may get the running rows alone.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import MaxTimeCriteria, StopStringCriteria
from transformers.generation import logits_process as processors


def _known(*names: str) -> tuple[type, ...]:
    """Those of the processors that this version of Transformers has."""
    return tuple(getattr(processors, name) for name in names if hasattr(processors, name))


class StandingSuppressTokens(processors.SuppressTokensLogitsProcessor):
    """`SuppressTokensLogitsProcessor` with its mask made once; the original looks through the whole vocabulary at every step."""

    def __init__(self, suppress_tokens: Int[Tensor, " tokens"]) -> None:
        self.suppress_tokens = suppress_tokens
        self._mask: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """`scores` with -inf at the suppressed tokens; ids beyond the vocabulary count for nothing."""
        if self._mask is None:
            ids = torch.arange(scores.shape[-1], device=scores.device)
            self._mask = torch.isin(ids, self.suppress_tokens.to(scores.device))
        return scores.masked_fill(self._mask, -float("inf"))


class NucleusWarper(LogitsProcessor):
    """`TopPLogitsWarper` without sorting the vocabulary: it looks at the most likely tokens first.

    Args:
        top_p: the mass that the kept tokens must reach, in (0, 1).
        filter_value: what the others get.
        min_tokens_to_keep: at least so many are kept.
    """

    candidates = (64, 1024)
    """So many are looked at, in turn; where none hold the mass, the original decides."""

    def __init__(self, top_p: float, filter_value: float, min_tokens_to_keep: int) -> None:
        self.top_p, self.filter_value, self.least = top_p, filter_value, min_tokens_to_keep
        self._original = processors.TopPLogitsWarper(top_p, filter_value, min_tokens_to_keep)

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """`scores` with the filter value outside of the smallest set of most likely tokens that reaches the mass."""
        probabilities = torch.softmax(scores, dim=-1)
        for candidates in self.candidates:
            if not self.least <= candidates < scores.shape[-1]:
                continue
            kept, ids = probabilities.topk(candidates, dim=-1)
            if bool((kept.sum(dim=-1) >= self.top_p).all()):
                outside = kept.cumsum(dim=-1) - kept >= self.top_p
                outside[:, : self.least] = False
                values = scores.gather(-1, ids).masked_fill(outside, self.filter_value)
                return torch.full_like(scores, self.filter_value).scatter(-1, ids, values)
        return self._original(input_ids, scores)


class PaddingFreeRepetitionPenalty(LogitsProcessor):
    """`RepetitionPenaltyLogitsProcessor` over each row's prompt and response; `exclude_padding_inplace` says where they begin.

    Args:
        penalty: divides positive scores of tokens that were there, and multiplies negative ones.
    """

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty
        self.begins: Int[Tensor, " rows"] | None = None

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """`scores` with the penalty on tokens of prompt and response."""
        counted = torch.ones_like(input_ids, dtype=scores.dtype)
        if self.begins is not None:
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)
            counted *= columns >= self.begins.to(input_ids.device).unsqueeze(-1)
        was_there = torch.zeros_like(scores).scatter_add_(1, input_ids, counted) > 0
        return torch.where(was_there, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)


def efficient_processor(processor: Any) -> Any:
    """The processor itself, its equal that costs less at each step, or one of the loop's own where the loop changes it."""
    if type(processor) is processors.SuppressTokensLogitsProcessor:
        return StandingSuppressTokens(processor.suppress_tokens)
    if type(processor) is processors.TopPLogitsWarper:
        return NucleusWarper(processor.top_p, processor.filter_value, processor.min_tokens_to_keep)
    if type(processor) is processors.RepetitionPenaltyLogitsProcessor and processor.prompt_ignore_length is None:
        return PaddingFreeRepetitionPenalty(processor.penalty)
    return processor


def exclude_padding_inplace(processors_of_batch: Iterable[Any], prompt_mask: Int[Tensor, "rows prompt"]) -> None:
    """Exclude padding from the repetition penalty: a token that pads and also ends responses would be penalized as an end."""
    for processor in processors_of_batch:
        if isinstance(processor, PaddingFreeRepetitionPenalty):
            processor.begins = prompt_mask.bool().int().argmax(dim=1)


POSITION_FREE_PROCESSORS = _known(
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "NoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "SuppressTokensLogitsProcessor",
)
"""They treat each row by itself and do not ask in which column its response begins, so rows may join a batch under way."""

ROW_LOCAL_PROCESSORS = (
    *POSITION_FREE_PROCESSORS,
    *_known(
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "SuppressTokensAtBeginLogitsProcessor",
    ),
)
"""They keep nothing between steps. Any other gets the whole batch, as from `generate`: a prefix constraint, for one,
knows rows by their number."""

PROMPT_BOUND_PROCESSORS = _known(
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
)
"""`generate` makes them for the prompts of one batch."""


def is_prompt_bound(processor: Any) -> bool:
    """Whether it fits the prompts of one batch alone: made for them, or told how many of their columns to ignore."""
    return type(processor) in PROMPT_BOUND_PROCESSORS or getattr(processor, "prompt_ignore_length", None) is not None


ROW_LOCAL_CRITERIA = (MaxTimeCriteria, StopStringCriteria)


def ended_rows(criterion: Any, input_ids: Int[Tensor, "rows columns"], scores: Any = None) -> Bool[Tensor, " rows"]:
    """What a stopping criterion answers for each row. As in `generate`, one answer may stand for all of them."""
    return torch.as_tensor(criterion(input_ids, scores), device=input_ids.device).bool().expand(len(input_ids))


def is_row_local(processor: Any) -> bool:
    """Whether it is one of these, not a subclass that may do more."""
    return type(processor) in (*ROW_LOCAL_PROCESSORS, *ROW_LOCAL_CRITERIA, StandingSuppressTokens, NucleusWarper)


def is_position_free(processor: Any) -> bool:
    """Whether it treats each row by itself, wherever its response begins."""
    return type(processor) in (*POSITION_FREE_PROCESSORS, StandingSuppressTokens, NucleusWarper)
