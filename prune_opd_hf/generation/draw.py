"""Drawing tokens from logits with one random number a row, so that a sample does not depend on what else is in its batch.

Pure functions of tensors. `generate` draws all rows of a batch from one stream of random numbers: a row's tokens then change
with its neighbours. Here every sample has a stream of its own, made from the seed and what the sample is.
"""

import hashlib
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prune_opd_hf.errors import NonFiniteLogitsError
from prune_opd_hf.generation.inverse_transform import inverse_transform, sum_dtype

NUCLEUS_CANDIDATES = 1024
"""top_p looks at so many tokens first, and at the whole vocabulary where they do not hold its mass."""

_CHUNK = 256


def sample_seed(seed: int, *what: object) -> int:
    """A seed for one sample, from the run's seed and what the sample is: independent of order, batch and process.

    Example:
        >>> sample_seed(0, "aime24", 3, 1) == sample_seed(0, "aime24", 3, 1) != sample_seed(0, "aime24", 1, 3)
        True
    """
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes 63 bits


def uniform_stream(seed: int) -> Iterator[float]:
    """Endless random numbers in [0, 1), the same for the same seed on every machine.

    Example:
        >>> from itertools import islice
        >>> list(islice(uniform_stream(7), 300)) == list(islice(uniform_stream(7), 300))
        True
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.rand(_CHUNK, generator=generator, dtype=torch.float64).tolist()


def draw_tokens(
    logits: Float[Tensor, "rows vocab"],
    uniforms: Float[Tensor, " rows"],
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Int[Tensor, " rows"]:
    """One token a row: the first, in the order of ids, at which the cumulative probability exceeds the row's random number.

    Temperature, then top_k, then top_p, as in `generate`. In the order of ids, not of probabilities, because rounding may
    swap two likely tokens but moves a cumulative sum only by itself.

    Args:
        logits: of the next token, before any warper.
        uniforms: in [0, 1); not read at temperature 0.
        temperature: 0 takes the most likely token.
        top_p, top_k: 1.0 and 0 switch them off.

    Raises:
        NonFiniteLogitsError: NaN or infinite logits.

    Example: probabilities .2, .5, .3; the nucleus of mass .6 is the last two.
        >>> logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
        >>> [draw_tokens(logits, torch.tensor([u]), temperature=1.0).item() for u in (0.1, 0.4, 0.8)]
        [0, 1, 2]
        >>> [draw_tokens(logits, torch.tensor([u]), temperature=1.0, top_p=0.6).item() for u in (0.1, 0.7)]
        [1, 2]
    """
    if temperature == 0:
        _require_finite(logits.amax(dim=-1))
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    _require_finite(probs[:, 0])  # one NaN makes the whole row NaN
    dtype = sum_dtype(probs.device)
    uniforms = uniforms.to(probs.device, dtype).clamp(max=1 - torch.finfo(dtype).eps)  # a shorter dtype may round to 1
    if top_k == 0 and top_p == 1:
        return inverse_transform(probs, uniforms)
    vocabulary = probs.shape[-1]
    kept, ids = probs.topk(min(top_k or NUCLEUS_CANDIDATES, vocabulary), dim=-1)
    if top_k:
        kept = kept / kept.sum(dim=-1, keepdim=True)
    elif kept.shape[-1] < vocabulary and bool((kept.sum(dim=-1) < top_p).any()):
        kept, ids = probs.sort(dim=-1, descending=True)
    if top_p < 1:
        mass_before = kept.cumsum(dim=-1) - kept
        kept = torch.where(mass_before < top_p, kept, 0.0)
    ids, order = ids.sort(dim=-1)
    places = inverse_transform(kept.gather(-1, order), uniforms)
    return ids.gather(-1, places.unsqueeze(-1)).squeeze(-1)


def _require_finite(totals: Tensor) -> None:
    if not bool(torch.isfinite(totals).all()):
        raise NonFiniteLogitsError(
            "the model returned NaN or infinite logits: check the weights, or load them in float32 or bfloat16"
        )
