"""Transformers' own continuous batching as a rollout engine, for GPUs: paged cache, CUDA graphs, one copy of the weights.

Its thread decodes while the watch's teacher scores in ours. It delivers tokens alone, so the student's side is scored in blocks
as the teacher's is; meanwhile it pauses, for its passes change the model's config. Tokens are drawn from one stream for the
whole batch, so that samples depend on what runs beside them: a restarted run is another draw of the same distribution, not the
same samples.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from prune_opd_hf.errors import UnsupportedGenerationError
from prune_opd_hf.generation.engine import (
    Completion,
    NewTokens,
    Request,
    Sampling,
    cap_of,
    check_requests,
    request_seed,
)
from prune_opd_hf.generation.ragged_watch import RaggedDriftWatch
from prune_opd_hf.generation.streams import completions
from prune_opd_hf.models.lm_head import evaluating

IS_WATCHABLE = Version(transformers.__version__) >= Version("5.19.dev0")
"""5.17 has no pause, and in 5.18 the student cannot be scored beside the paged attention."""

POLL_SECONDS = 1.0
STOP_SECONDS = 30.0


class ContinuousBatchingEngine:
    """A `RolloutEngine` over `model.continuous_batching_context_manager`. The batch is sized by the memory that is free."""

    ragged = True
    delivers_candidates = False

    def __init__(self, model: nn.Module, sampling: Sampling) -> None:
        sampling.refuse_beyond_warpers("continuous batching")
        self.model: Any = model
        self.sampling, self.weights = sampling, ""

    def update_weights(self, model: nn.Module, step: int) -> None:
        self.model, self.weights = model, f"step {step}"

    def with_sampling(self, sampling: Sampling, *, slots: int) -> "ContinuousBatchingEngine":
        return ContinuousBatchingEngine(self.model, sampling)

    def close(self) -> None:
        """Nothing is held between two calls of `generate`."""

    def generate(self, requests: Iterable[Request], watch: RaggedDriftWatch | None = None) -> Iterator[Completion]:
        """Sample a response to each request, and yield each when it ends; their seeds together make the seed of the batch.

        Raises:
            UnsupportedGenerationError: the model's family or a warper is not supported, or generation failed.
        """
        requests = list(requests)
        if not requests:
            return
        sampling = self.sampling
        check_requests(requests, sampling.eos_token_ids, watch, model=self.model)
        if watch is not None:
            watch.sampled_by = ("continuous_batching", self.weights)
        if watch is not None and self.model.config._attn_implementation == "eager":
            raise UnsupportedGenerationError(
                "continuous batching switches eager attention to a paged form, with which the watch cannot score the student's "
                "side meanwhile: load the student with attn_implementation='sdpa', or use the engine 'loop'"
            )
        config = GenerationConfig(**sampling.generate_arguments())
        batching = ContinuousBatchingConfig(
            seed=request_seed(0, *(request.seed for request in requests)) % 2**31,
            drop_unsupported_processors=False,  # a warper that is left out changes every number
        )
        streaming = {} if watch is None else {"streaming": True}
        with (
            evaluating(self.model),
            self.model.continuous_batching_context_manager(
                generation_config=config, continuous_batching_config=batching, block=True, timeout=STOP_SECONDS
            ) as manager,
        ):
            for index, request in enumerate(requests):
                cap = cap_of(request, sampling.max_completion_length)
                manager.add_request(list(request.prompt_ids), request_id=str(index), max_new_tokens=cap, **streaming)
            yield from completions(_Batch(manager, sampling.eos_token_ids, len(requests)), requests, watch)


class _Batch:
    """The requests of a manager, as a `TokenSource`."""

    def __init__(self, manager: Any, ends: Sequence[int], requests: int) -> None:
        self.manager, self.ends = manager, ends
        self.received = [0] * requests
        self.fault: str | None = None

    def next(self) -> list[NewTokens]:
        found: list[NewTokens] = []
        while self.fault is None:
            output = self.manager.get_result(timeout=0.0 if found else POLL_SECONDS)
            if output is not None:
                found += self._new_tokens(output)
            elif found:
                break
            elif not self.manager.is_running():
                self.fault = (
                    "continuous batching stopped before all samples were finished; the log of transformers says why. Use the "
                    "engine 'loop' instead"
                )
        if not found:  # what came before the fault is handed out first
            raise UnsupportedGenerationError(self.fault)
        return found

    def cancel(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.manager.cancel_request(str(row))

    def undisturbed(self) -> AbstractContextManager:
        return self.manager.pause() if self.manager.is_running() else nullcontext()

    def _new_tokens(self, output: Any) -> list[NewTokens]:
        if output.error is not None:
            self.fault = f"continuous batching failed on a sample ({output.error}): use the engine 'loop' instead"
            return []
        row, tokens = int(output.request_id), list(output.generated_tokens)
        start, self.received[row] = self.received[row], len(tokens)
        end = None
        if output.is_finished():
            end = "eos" if tokens[-1] in self.ends else "length"
        return [NewTokens(row, start, tokens[start:], end=end)] if end or len(tokens) > start else []
