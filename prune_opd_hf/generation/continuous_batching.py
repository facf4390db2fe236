"""Transformers' own continuous batching as a rollout engine, for GPUs: paged cache, CUDA graphs, one copy of the weights.

Tokens are drawn from one stream for the whole batch, so that samples depend on what runs beside them: a restarted run is
another draw of the same distribution, not the same samples. It takes no watch yet.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from prune_opd_hf.errors import UnsupportedGenerationError
from prune_opd_hf.generation.engine import Completion, Request, Sampling, Watch, cap_of, request_seed

POLL_SECONDS = 1.0
STOP_SECONDS = 30.0


class ContinuousBatchingEngine:
    """A `RolloutEngine` over `model.continuous_batching_context_manager`. The batch is sized by the memory that is free.

    Args:
        model: decoder-only, in evaluation mode.
        sampling: how to sample.
        slots: not used.
    """

    delivers_candidates = False
    takes_watch = False

    def __init__(self, model: nn.Module, sampling: Sampling, *, slots: int = 0) -> None:
        self.model: Any = model
        self.sampling = sampling

    def update_weights(self, model: nn.Module, step: int) -> None:
        """Sample with this model from now on."""
        self.model = model

    def close(self) -> None:
        """Nothing is held between two calls of `generate`."""

    def generate(self, requests: Iterable[Request], watch: Watch | None = None) -> Iterator[Completion]:
        """Sample a response to each request, and yield each when it ends; their seeds together make the seed of the batch.

        Raises:
            UnsupportedGenerationError: a watch, the model's family or a warper is not supported, or generation failed.
        """
        if watch is not None:
            raise UnsupportedGenerationError(
                "continuous batching delivers no candidates to a drift watch yet: use the engine 'loop'"
            )
        requests = list(requests)
        if not requests:
            return
        sampling = self.sampling
        ends = list(sampling.eos_token_ids)
        config = GenerationConfig(**sampling.generate_arguments())
        batching = ContinuousBatchingConfig(
            seed=request_seed(0, *(request.seed for request in requests)) % 2**31,
            drop_unsupported_processors=False,  # a warper that is left out changes every number
        )
        with self.model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching, block=True, timeout=STOP_SECONDS
        ) as manager:
            for index, request in enumerate(requests):
                cap = cap_of(request, sampling.max_completion_length)
                manager.add_request(list(request.prompt_ids), request_id=str(index), max_new_tokens=cap)
            pending = len(requests)
            while pending:
                output = manager.get_result(timeout=POLL_SECONDS)
                if output is None:
                    if not manager.is_running():
                        raise UnsupportedGenerationError(
                            f"continuous batching of {type(self.model).__name__} stopped with {pending} samples to go; the log "
                            "of transformers says why. Use the engine 'loop' instead"
                        )
                    continue
                if not output.is_finished():
                    continue
                if output.error is not None:
                    raise UnsupportedGenerationError(
                        f"continuous batching failed on a sample ({output.error}): use the engine 'loop' instead"
                    )
                pending -= 1
                tokens = list(output.generated_tokens)
                yield Completion(int(output.request_id), tokens, "eos" if tokens[-1] in ends else "length")
