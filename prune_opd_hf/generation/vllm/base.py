"""What both engines over vLLM have in common: sampling in its words, and what is refused before anything is sampled."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.generation.engine import Completion, Request, Sampling, cap_of, check_requests
from prune_opd_hf.generation.ragged_watch import RaggedDriftWatch
from prune_opd_hf.generation.streams import TokenSource, completions
from prune_opd_hf.generation.vllm.protocol import sampling_parameters

Engine = TypeVar("Engine", bound="VLLMEngine")


class VLLMEngine(ABC):
    """A `RolloutEngine` over vLLM.

    Args:
        sampling: how to sample.
        slots: rows under way at a time, where a watch may stop them.
        candidates: how many of the student's most likely tokens are wanted with each token.

    Attributes:
        candidates: how many are asked for. None where some tokens must not count: vLLM normalises over every id, so that the
            student's side is scored here.
        parameters: of every request, in vLLM's words.
        name: in records.
        where: whoever samples, for messages.
        max_model_len: tokens of the longest sequence that it takes.
    """

    ragged = True
    name: str
    where: str
    max_model_len: int

    def __init__(self, sampling: Sampling, *, slots: int, candidates: int) -> None:
        self._wanted_candidates = candidates
        self._set_sampling(sampling, slots)

    def with_sampling(self: Engine, sampling: Sampling, *, slots: int) -> Engine:
        """The same engine, with the same weights, under another sampling."""
        other = copy.copy(self)
        other._set_sampling(sampling, slots)
        other.check_length()
        return other

    def _set_sampling(self, sampling: Sampling, slots: int) -> None:
        self.delivers_candidates = self._wanted_candidates > 0 and not sampling.suppress_tokens
        self.candidates = self._wanted_candidates if self.delivers_candidates else 0
        self.sampling, self.slots = sampling, slots
        self.parameters = sampling_parameters(sampling, self.candidates)

    def check_length(self) -> None:
        """Refuse a cap that leaves no room for a prompt."""
        if self.max_model_len <= self.sampling.max_completion_length:
            raise ConfigError(
                f"{self.where} takes sequences of {self.max_model_len} tokens (--max-model-len), too few for "
                f"max_completion_length {self.sampling.max_completion_length} and a prompt: start it with a larger one, or lower "
                "max_completion_length"
            )

    def generate(self, requests: Iterable[Request], watch: RaggedDriftWatch | None = None) -> Iterator[Completion]:
        """Sample a response to each request, and yield each when it is final."""
        requests = list(requests)
        if not requests:
            return
        check_requests(requests, self.sampling.eos_token_ids, watch)
        for request in requests:
            tokens = len(request.prompt_ids) + cap_of(request, self.sampling.max_completion_length)
            if tokens > self.max_model_len:
                raise InputError(
                    f"a prompt of {len(request.prompt_ids)} tokens and its response may come to {tokens}, and {self.where} takes "
                    f"{self.max_model_len}: start it with a larger --max-model-len, or lower max_completion_length"
                )
        if watch is not None:
            watch.sampled_by = (self.name, self.weights_version)
        with self._source(requests, watch) as source:
            yield from completions(source, requests, watch)

    @abstractmethod
    def _source(
        self, requests: Sequence[Request], watch: RaggedDriftWatch | None
    ) -> AbstractContextManager[TokenSource]:
        """These requests under way."""

    @property
    @abstractmethod
    def weights_version(self) -> str:
        """The name of the weights that it samples with; "" for those that servers were started with."""
