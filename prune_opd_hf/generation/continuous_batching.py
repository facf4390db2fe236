"""Generation by Transformers' continuous batching, for GPUs: what `generate_batch` does, with every sample as it ends.

Tokens are drawn from one stream for the whole batch, so that samples depend on what runs beside them: a restarted run is
another draw of the same distribution, not the same samples.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from prune_opd_hf.errors import UnsupportedGenerationError
from prune_opd_hf.generation.draw import sample_seed
from prune_opd_hf.generation.requests import Completion, Request

POLL_SECONDS = 1.0
STOP_SECONDS = 30.0


def generate_continuous(
    model: PreTrainedModel,
    requests: Sequence[Request],
    settings: Any,
    eos_token_ids: Sequence[int],
) -> Iterator[Completion]:
    """Generate every request, and yield each sample when it ends. The batch is sized by the memory that is free.

    Args:
        model: decoder-only, in evaluation mode.
        requests: as `generate_refilling` takes them; their seeds together make the seed of the batch.
        settings: temperature, top_p, top_k and max_new_tokens are read.
        eos_token_ids: the tokens that end a response.

    Raises:
        UnsupportedGenerationError: the model's family or a warper is not supported, or generation failed.
    """
    if not requests:
        return
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        temperature=settings.temperature or 1.0,
        top_p=settings.top_p,
        top_k=settings.top_k,
        eos_token_id=list(eos_token_ids),
        pad_token_id=eos_token_ids[0],
    )
    batching = ContinuousBatchingConfig(
        seed=sample_seed(settings.seed, *[request.seed for request in requests]) % 2**31,
        drop_unsupported_processors=False,  # a warper that is left out changes every number
    )
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=batching, block=True, timeout=STOP_SECONDS
    ) as manager:
        for index, request in enumerate(requests):
            manager.add_request(list(request.prompt_ids), request_id=str(index), max_new_tokens=settings.max_new_tokens)
        pending = len(requests)
        while pending:
            output = manager.get_result(timeout=POLL_SECONDS)
            if output is None:
                if not manager.is_running():
                    raise UnsupportedGenerationError(
                        f"continuous batching of {type(model).__name__} stopped with {pending} samples to go; the log of "
                        "transformers says why. Evaluate with engine='refilling' instead"
                    )
                continue
            if not output.is_finished():
                continue
            if output.error is not None:
                raise UnsupportedGenerationError(
                    f"continuous batching failed on a sample ({output.error}): evaluate with engine='refilling' instead"
                )
            pending -= 1
            ended = output.generated_tokens[-1] in eos_token_ids
            yield Completion(int(output.request_id), list(output.generated_tokens), ended)
