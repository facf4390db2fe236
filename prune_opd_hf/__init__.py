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

from typing import TYPE_CHECKING, Any

from prune_opd_hf.algorithm.budget import ResponseBudget
from prune_opd_hf.algorithm.drift import DriftConfig, effective_length, reliability
from prune_opd_hf.algorithm.losses import (
    generalized_jsd_loss,
    reverse_kl_loss,
    sampled_token_loss,
    topk_kl_loss,
    topk_policy_gradient_loss,
)
from prune_opd_hf.algorithm.overlap import mass_overlap, nucleus_accepts, topk_overlap
from prune_opd_hf.algorithm.rewards import choose_candidates, topk_rewards, weight_rewards
from prune_opd_hf.errors import PruneOPDError
from prune_opd_hf.generation import (
    DriftMonitor,
    DriftProgress,
    DriftStoppingCriteria,
    StudentTopKLogitsProcessor,
    pruned_generate,
)
from prune_opd_hf.models.chunked_head import candidate_log_probs, divergence_from_hidden
from prune_opd_hf.models.compatibility import shared_vocabulary_size
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.base import TeacherScores
from prune_opd_hf.teachers.local import LocalTeacher as Teacher

if TYPE_CHECKING:
    from prune_opd_hf.evaluation import EvaluationReport, evaluate_model
    from prune_opd_hf.hub import build_card, publish_student
    from prune_opd_hf.preflight import PreflightReport, preflight
    from prune_opd_hf.training import PruneOPDConfig, PruneOPDTrainer, TrainingSummary

__version__ = "0.1.0"

_ON_FIRST_USE = {
    "EvaluationReport": "prune_opd_hf.evaluation",
    "PreflightReport": "prune_opd_hf.preflight",
    "PruneOPDConfig": "prune_opd_hf.training",
    "PruneOPDTrainer": "prune_opd_hf.training",
    "TrainingSummary": "prune_opd_hf.training",
    "build_card": "prune_opd_hf.hub",
    "evaluate_model": "prune_opd_hf.evaluation",
    "preflight": "prune_opd_hf.preflight",
    "publish_student": "prune_opd_hf.hub",
}

__all__ = [
    "DriftConfig",
    "DriftMonitor",
    "DriftProgress",
    "DriftStoppingCriteria",
    "EvaluationReport",
    "PreflightReport",
    "PruneOPDConfig",
    "PruneOPDError",
    "PruneOPDTrainer",
    "ResponseBudget",
    "Rollouts",
    "StudentTopKLogitsProcessor",
    "Teacher",
    "TeacherScores",
    "TrainingSummary",
    "build_card",
    "candidate_log_probs",
    "choose_candidates",
    "divergence_from_hidden",
    "effective_length",
    "evaluate_model",
    "generalized_jsd_loss",
    "mass_overlap",
    "nucleus_accepts",
    "preflight",
    "pruned_generate",
    "publish_student",
    "reliability",
    "reverse_kl_loss",
    "sampled_token_loss",
    "shared_vocabulary_size",
    "topk_kl_loss",
    "topk_overlap",
    "topk_policy_gradient_loss",
    "topk_rewards",
    "weight_rewards",
]


def __getattr__(name: str) -> Any:
    """What lies above generation, on first use: whoever only watches `generate` need not wait for it to be imported."""
    if name in _ON_FIRST_USE:
        from importlib import import_module

        return getattr(import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
