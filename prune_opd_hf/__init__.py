"""Prune-OPD for Hugging Face Transformers (arXiv 2605.07804).

Axes used in every signature:

    batch      sequences (prompts times generations)
    time       response positions; the prompt is never counted
    k          candidate tokens at one position, most likely first
    vocab      token ids shared by teacher and student

Symbols in formulas: student p, teacher q, S_t and T_t their k most likely ids, O_t overlap, B_t drift event, C_t number of
events so far, R_t reliability, L_t = R_t + weight_base the loss weight, E effective length.

Importing this package configures nothing: no logging, no device, no dtype.
"""

from prune_opd_hf.budget import ResponseBudget
from prune_opd_hf.drift import DriftConfig, effective_length, reliability
from prune_opd_hf.errors import PruneOPDError
from prune_opd_hf.losses import reverse_kl_loss, topk_policy_gradient_loss
from prune_opd_hf.overlap import nucleus_accepts, topk_overlap
from prune_opd_hf.rewards import topk_rewards, weight_rewards

__version__ = "0.1.0"

__all__ = [
    "DriftConfig",
    "PruneOPDError",
    "ResponseBudget",
    "effective_length",
    "nucleus_accepts",
    "reliability",
    "reverse_kl_loss",
    "topk_overlap",
    "topk_policy_gradient_loss",
    "topk_rewards",
    "weight_rewards",
]
