"""Does vLLM sample with the weights that it was sent? Its log-probabilities of a few tokens, against the student's own.

A version number says what was sent. It does not say that a server of another model took it, or that a layer kept what it had:
on CPUs vLLM 0.32 keeps a packed copy of an LM head that is tied to the embeddings, and goes on using it.
"""

from collections.abc import Sequence

import torch
from torch import nn

from prune_opd_hf.errors import ServingError
from prune_opd_hf.models.lm_head import evaluating, input_device

PROBE_TOKENS = 16
PROBING = {"temperature": 0.0, "logprobs": 1, "stop_token_ids": []}
"""Sampling parameters of the tokens that are compared, the student's most likely ones."""

SAME_MODEL = 1.0
"""Mean difference in nats above which it is another model. Rounding to bfloat16 makes 0.1 at most."""

SAME_WEIGHTS, GROWTH = 0.01, 20.0
"""After an update the difference stays below this, or below so many times the first one, which is rounding."""


def probing_prompt(vocabulary: int) -> tuple[int, ...]:
    """A few tokens from all over the vocabulary."""
    return tuple(vocabulary * part // 5 for part in (1, 2, 3, 4))


class SameModel:
    """Compares the student with an engine after every update of its weights."""

    def __init__(self) -> None:
        self.first: float | None = None

    @torch.no_grad()
    def check(
        self, where: str, model: nn.Module, prompt: Sequence[int], token_ids: Sequence[int], log_probs: Sequence[float]
    ) -> None:
        """Refuse an engine whose log-probabilities of these tokens are not the student's."""
        ids = torch.tensor([[*prompt, *token_ids]], device=input_device(model))
        with evaluating(model):
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        own = logits.log_softmax(dim=-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1).cpu()
        difference = float((own - torch.tensor(log_probs)).abs().mean())
        found = f"log-probabilities of {len(token_ids)} tokens differ by {difference:.2g} on average"
        if self.first is None and not difference <= SAME_MODEL:
            raise ServingError(
                f"{where} serves another model than the student, or another vocabulary: {found}. Start it with the student's folder"
            )
        self.first = difference if self.first is None else self.first
        if not difference <= max(SAME_WEIGHTS, GROWTH * self.first):
            raise ServingError(
                f"{where} does not sample with the weights that it was sent: {found}, {self.first:.2g} at first. On CPUs it cannot "
                "take a head that is tied to the embeddings: serve and train a student with tie_word_embeddings=false"
            )
