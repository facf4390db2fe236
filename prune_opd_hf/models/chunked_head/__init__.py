"""From hidden states to log-probabilities and divergences, without ever holding tokens x vocab.

Dense logits of 4,096 tokens over 151,936 ids are 2.5 GB in float32, and a loss with its backward pass keeps several such
arrays. Here only a few rows of logits exist at a time. Two operations:

`candidate_log_probs`: log p of chosen ids. Its backward pass goes one of two ways, token by token. With g_j the gradient of
    log p_j and G = Σ_j g_j,
        d/dz_v = Σ_j g_j [j = v] - G p_v
    so where G is 0 the softmax drops out, and only the chosen rows of the head are touched: no logits are made again. That
    is every loss that looks at candidates relative to each other: the centred policy gradient before its clips bite, and KL
    renormalised over the candidates. Where G is not 0, the logits of those tokens are recomputed.

`divergence_from_hidden`: Σ_t w_t D(p_t, q_t) over the full vocabulary. The weights are known in advance, so the gradients are
    formed while the logits are at hand in the forward pass, and nothing is recomputed.

This module knows tensors only: neither models nor trainers. Sharded weights: see `gathered`.
"""

from prune_opd_hf.models.chunked_head.candidates import CandidateLogProbs, candidate_log_probs
from prune_opd_hf.models.chunked_head.divergence import HiddenDivergence, divergence_from_hidden
from prune_opd_hf.models.chunked_head.projection import MAX_LOGIT_ELEMENTS, gathered

__all__ = [
    "MAX_LOGIT_ELEMENTS",
    "CandidateLogProbs",
    "HiddenDivergence",
    "candidate_log_probs",
    "divergence_from_hidden",
    "gathered",
]
