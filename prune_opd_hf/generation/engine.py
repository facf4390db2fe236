"""Who samples tokens: requests in, completions out, and a watch over them that may end a row before its time.

`loop.py` samples with a model of this process, `continuous_batching.py` with Transformers' own engine. An engine that lives
elsewhere implements the same protocol. An engine asks no teacher: it reports to a watch (`watch.py`, or `ragged_watch.py` where
each row comes at a pace of its own) and asks it which rows have ended.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import nn

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.generation.watch import DriftWatch
from prune_opd_hf.models.generation_config import NEUTRAL

OWNED_BY_SAMPLING = {
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
    "num_return_sequences": "num_generations",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "do_sample": "temperature (0 is greedy)",
    "pad_token_id": "the tokenizer's padding token",
    "eos_token_id": "eos_token_id",
    "generation_config": "the settings that it holds",
    "custom_generate": "nothing: an engine has its own loop",
    "drift_monitor": "the drift settings",
}
"""Arguments of `generate` that `Sampling.generation_kwargs` may not hold, and what to set instead."""

WARPERS = ("temperature", "top_p", "top_k", "min_p")
"""What every engine draws by, beside `Sampling.suppress_tokens`."""


def refuse_owned(generation_kwargs: Mapping[str, Any]) -> None:
    """Refuse further arguments of `generate` that have a setting of their own."""
    for name in generation_kwargs:
        if name in OWNED_BY_SAMPLING:
            raise ConfigError(f"generation_kwargs must not hold {name}: set {OWNED_BY_SAMPLING[name]} instead")


@dataclass(frozen=True)
class Request:
    """One response to sample.

    Attributes:
        prompt_ids: the prompt's tokens; any sequence of whole numbers becomes a tuple.
        seed: of this response alone; see `request_seed`.
        max_completion_length: its own cap, where it is lower than the engine's.

    Raises:
        ConfigError: a cap below 1.
        InputError: tokens that are no whole numbers.
    """

    prompt_ids: tuple[int, ...]
    seed: int = 0
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "prompt_ids", tuple(index(token) for token in self.prompt_ids))
        except TypeError as error:
            raise InputError(f"prompt_ids must be a sequence of token ids, got {self.prompt_ids!r:.80}") from error
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ConfigError(f"max_completion_length must be at least 1, got {self.max_completion_length}")


class Completion(NamedTuple):
    """One sampled response.

    Attributes:
        request: index of its request.
        token_ids: the response, the token that ended it included.
        stop_reason: one of `algorithm.drift.STOP_REASONS`.
    """

    request: int
    token_ids: list[int]
    stop_reason: str


class Candidates(NamedTuple):
    """The student's side of some tokens, where an engine delivers it: over the full vocabulary, at temperature 1.

    Attributes:
        ids, log_probs: of each token's most likely alternatives, most likely first.
        token_log_probs: of the tokens themselves.
    """

    ids: list[list[int]]
    log_probs: list[list[float]]
    token_log_probs: list[float]


class NewTokens(NamedTuple):
    """Tokens of one row since the last report.

    Attributes:
        row: index of its request.
        start: response tokens that it had before; 0 once more where the engine begins it anew, and what came before is void.
        token_ids: the new ones.
        candidates: the student's side of them.
        end: the stop reason, where the row ends with them.
    """

    row: int
    start: int
    token_ids: list[int]
    candidates: Candidates | None = None
    end: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How an engine samples. What a model's generation config says of sampling has no part in it: tokens are drawn from the
    distribution that is recorded, reported and trained.

    Attributes:
        max_completion_length: cap on every response.
        eos_token_ids: the tokens that end a response; none where only the cap does.
        pad_token_id: fills rows that have ended.
        temperature: 0 is greedy; any other is positive and finite.
        top_p, top_k: 1.0 and 0 switch them off.
        suppress_tokens: never sampled.
        generation_kwargs: further arguments of `generate`, where the engine samples by it.
    """

    max_completion_length: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    suppress_tokens: tuple[int, ...] = ()
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise ConfigError(f"max_completion_length must be at least 1, got {self.max_completion_length}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be a finite number of at least 0 (greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0 (all tokens), got {self.top_k}")
        refuse_owned(self.generation_kwargs)

    def generate_arguments(self) -> dict[str, Any]:
        """The same as arguments of `model.generate`, with a neutral value for whatever else could change what is drawn."""
        arguments: dict[str, Any] = {**NEUTRAL, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            arguments |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        else:
            arguments["top_k"] = None  # Transformers warns of any other that has no effect
        arguments |= {
            "max_new_tokens": self.max_completion_length,
            "pad_token_id": self.pad_token_id,
            "eos_token_id": list(self.eos_token_ids) or None,
            **self.generation_kwargs,
        }
        if self.suppress_tokens:
            arguments["suppress_tokens"] = [*self.suppress_tokens, *(arguments.get("suppress_tokens") or [])]
        return arguments

    def beyond_warpers(self) -> dict[str, Any]:
        """The arguments that change what is drawn, or where it ends, and that the loop alone follows."""
        known = (*WARPERS, "do_sample", "max_new_tokens", "pad_token_id", "eos_token_id", "suppress_tokens")
        arguments = {name: value for name, value in self.generate_arguments().items() if name not in known}
        return {name: value for name, value in arguments.items() if value not in (None, NEUTRAL.get(name))}

    def refuse_beyond_warpers(self, engine: str) -> None:
        """Refuse them, for an engine of this name."""
        for name, value in self.beyond_warpers().items():
            raise ConfigError(
                f"generation_kwargs: {engine} samples without {name}={value!r}; leave it out (it takes {', '.join(WARPERS)}), or "
                "use rollout_engine='loop'"
            )


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples responses.

    Attributes:
        ragged: whether each row comes at a pace of its own, so that its watch is a `RaggedDriftWatch`.
        delivers_candidates: whether the student's most likely tokens come with every token; otherwise the student's side is
            scored in blocks, as the teacher's is.
    """

    ragged: bool
    delivers_candidates: bool

    def generate(self, requests: Iterable[Request], watch: Any = None) -> Iterator[Completion]:
        """Sample a response to each request, and yield each when it is final, in any order."""

    def update_weights(self, model: nn.Module, step: int) -> None:
        """Sample with these weights from now on, those after `step` optimizer steps."""

    def with_sampling(self, sampling: Sampling, *, slots: int) -> "RolloutEngine":
        """The same engine under another sampling; what it holds is shared."""

    def close(self) -> None:
        """Give back what the engine holds."""


def request_seed(seed: int, *key: object) -> int:
    """A seed for one response, from the run's seed and what the response is: independent of order, batch and process.

    A served engine samples a response in pieces where drift may stop it, each with a seed of its own by where it begins, which
    depends on lengths alone.
    """
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes 63 bits


def check_requests(
    requests: Sequence[Request], eos_token_ids: Sequence[int], watch: DriftWatch | None, *, model: Any = None
) -> None:
    """Refuse what cannot be sampled before anything is.

    Args:
        model: the student, where it samples in this process.

    Raises:
        InputError: an empty prompt, or a token that the student has no embedding of.
        ConfigError: the watch does not know all tokens that end a response.
    """
    if not all(request.prompt_ids for request in requests):
        raise InputError("every prompt needs at least one token; got an empty one")
    known = None if model is None else getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None:
        for request in requests:
            if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < known:
                token = next(token for token in request.prompt_ids if not 0 <= token < known)
                raise InputError(
                    f"a prompt holds token {token}, and the student has embeddings of {known} tokens: is the tokenizer its own? "
                    "If tokens were added to it, call model.resize_token_embeddings(len(tokenizer))"
                )
    unknown = set() if watch is None else {*eos_token_ids} - {*watch.eos_token_ids}
    if unknown:
        raise ConfigError(
            f"token {min(unknown)} ends a response, and the watch does not know: begin it with the engine's eos_token_ids"
        )


def cap_of(request: Request, cap: int) -> int:
    """Response tokens that a request may come to."""
    return cap if request.max_completion_length is None else min(cap, request.max_completion_length)


def final_completion(watch: DriftWatch | None, row: int, tokens: list[int], reason: str) -> Completion:
    """A completion, ended where the watch ended it."""
    if watch is None:
        return Completion(row, tokens, reason)
    length, reason = watch.ending(row)
    return Completion(row, tokens[:length], reason)
