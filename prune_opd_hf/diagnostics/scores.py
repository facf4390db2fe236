"""Every drift metric as one number a token: high where the models disagree, so that thresholds become cuts on it."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from prune_opd_hf.algorithm.drift import agreement
from prune_opd_hf.errors import InputError
from prune_opd_hf.records.rollouts import Rollouts


def disagreement(rollouts: Rollouts, metric: str, top_k: int) -> Float[Tensor, "batch time"]:
    """1 - O_t, 1 - M_t, or the teacher's mass before the sampled token.

    A drift event of "overlap" and "mass" is a score above 1 - threshold; one of "nucleus" a score of at least the threshold,
    where a token outside the candidates has the score 1.

    Args:
        rollouts: with at least `top_k` candidates recorded.
        metric: "overlap", "mass" or "nucleus".
        top_k: how many of them count.

    Raises:
        InputError: too few candidates, or the student's columns are missing.

    Example: see examples/benchmarks/drift_metrics.py.
    """
    if metric == "nucleus":
        if rollouts.teacher_topk_ids.shape[-1] < top_k:
            raise InputError(
                f"the record holds {rollouts.teacher_topk_ids.shape[-1]} candidates, {top_k} were asked for: lower top_k"
            )
        ids, probs = rollouts.teacher_topk_ids[..., :top_k], rollouts.teacher_topk_log_probs[..., :top_k].exp()
        mass_before = pad(probs.cumsum(dim=-1)[..., :-1], (1, 0))
        is_token = ids == rollouts.response_ids.unsqueeze(-1)
        return torch.where(is_token.any(dim=-1), (mass_before * is_token).sum(dim=-1), 1.0)
    values = agreement(
        metric,
        top_k,
        student_topk_ids=rollouts.student_topk_ids,
        student_topk_log_probs=rollouts.student_topk_log_probs,
        teacher_log_probs=rollouts.teacher_log_probs,
        teacher_topk_ids=rollouts.teacher_topk_ids,
    )
    return 1 - values
