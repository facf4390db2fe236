"""Which of Transformers' logits processors treat each row by itself, so that they may be shown the rows that still run alone."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation import logits_process as processors


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


def with_standing_mask(processor: Any) -> Any:
    """The processor itself, or its equal that makes its mask once.

    Example:
        >>> suppressing = processors.SuppressTokensLogitsProcessor([1])
        >>> with_standing_mask(suppressing)(torch.tensor([[2]]), torch.zeros(1, 3))
        tensor([[0., -inf, 0.]])
    """
    if type(processor) is processors.SuppressTokensLogitsProcessor:
        return StandingSuppressTokens(processor.suppress_tokens)
    return processor


ROW_LOCAL_PROCESSORS = tuple(
    getattr(processors, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "LogitNormalization",
        "SuppressTokensLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
    )
    if hasattr(processors, name)
)
"""They keep nothing between steps. Any other is shown the whole batch, as `generate` shows it: a prefix constraint, for one,
knows rows by their number."""


def is_row_local(processor: Any) -> bool:
    """Whether it is one of these, not a subclass that may do more."""
    return type(processor) in (*ROW_LOCAL_PROCESSORS, StandingSuppressTokens)
