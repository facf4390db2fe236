"""The student answers prompts: one way of sampling for rollouts and evaluation, under random states of its own.

It knows `generate` and the sampling settings; it does not know drift, losses or the optimizer.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prune_opd_hf.errors import NonFiniteLogitsError
from prune_opd_hf.generation import pruned_generate
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.synced import is_sharded, synced_generate


class StudentSampler:
    """Sampling settings of a run, ready to be used on its student.

    Args:
        args: temperature, nucleus, `generation_kwargs`, seed and process of the run.
        tokenizer: the student's; its padding token pads finished rows.
        eos_token_ids: the tokens that end a response.
        forbidden_token_ids: tokens that the student may not sample, because the teacher does not know them.
    """

    def __init__(
        self,
        args: PruneOPDConfig,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: list[int],
        forbidden_token_ids: list[int],
    ) -> None:
        self.args = args
        self.pad_token_id = tokenizer.pad_token_id
        self.eos_token_ids = eos_token_ids
        self.forbidden_token_ids = forbidden_token_ids

    def generate(self, model: nn.Module, prompts: Mapping[str, Tensor], max_new_tokens: int, **kwargs: Any) -> Tensor:
        """Sequences of prompts (left-padded `input_ids` and `attention_mask`) and responses of up to `max_new_tokens`.

        Raises:
            NonFiniteLogitsError: the student's weights have gone bad.
        """
        args = self.args
        settings: dict[str, Any] = {"do_sample": False}
        if args.temperature > 0:
            settings = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
        settings |= {
            "max_new_tokens": max_new_tokens,
            "pad_token_id": self.pad_token_id,
            "eos_token_id": self.eos_token_ids,
            "custom_generate": synced_generate if is_sharded(model) else pruned_generate,
            **args.dictionary("generation_kwargs"),
        }
        if self.forbidden_token_ids:
            settings["suppress_tokens"] = [*self.forbidden_token_ids, *(settings.get("suppress_tokens") or [])]
        try:
            return model.generate(**prompts, **{**settings, **kwargs})
        except RuntimeError as error:
            if "probability tensor" not in str(error):  # torch.multinomial's words for NaN, before anybody else saw it
                raise
            raise NonFiniteLogitsError("the student returned NaN or infinite logits while it was sampled") from error

    @contextmanager
    def mode(self, model: nn.Module, purpose: str, step: int) -> Iterator[None]:
        """The student in evaluation mode, under a random state of its own: the same for the same seed, step and process,
        whatever happened before. A resumed run therefore samples what the uninterrupted one did."""
        training, device = model.training, self.args.device
        key = [self.args.seed, step, self.args.process_index, sum(purpose.encode())]
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
        model.eval()
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                yield
        finally:
            model.train(training)


def ids_beyond(model_rows: int, shared: int) -> list[int]:
    """Token ids of a student that lie outside the vocabulary it shares with its teacher.

    Example: a student with 8 rows, of which the teacher knows 6.
        >>> ids_beyond(8, 6), ids_beyond(6, 8)
        ([6, 7], [])
    """
    return list(range(shared, model_rows))
