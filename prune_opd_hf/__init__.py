"""Prune-OPD for Hugging Face Transformers (arXiv 2605.07804).

Axes used in every signature:

    batch      sequences (prompts times generations)
    time       response positions; the prompt is never counted
    k          candidate tokens at one position, most likely first
    vocab      token ids shared by teacher and student

Symbols in formulas: student p, teacher q, S_t and T_t their k most likely ids, O_t overlap, B_t drift event, C_t number of
events so far, R_t reliability, L_t = R_t + weight_base the loss weight, E effective length.

Importing this package configures nothing (no logging, no device, no dtype) and imports nothing: a name is imported from its
module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune_opd_hf.algorithm.budget import ResponseBudget as ResponseBudget
    from prune_opd_hf.algorithm.drift import (
        DriftConfig as DriftConfig,
        effective_length as effective_length,
        reliability as reliability,
    )
    from prune_opd_hf.algorithm.losses import (
        generalized_jsd_loss as generalized_jsd_loss,
        reverse_kl_loss as reverse_kl_loss,
        sampled_token_loss as sampled_token_loss,
        topk_kl_loss as topk_kl_loss,
        topk_policy_gradient_loss as topk_policy_gradient_loss,
    )
    from prune_opd_hf.algorithm.overlap import (
        mass_overlap as mass_overlap,
        nucleus_accepts as nucleus_accepts,
        tail_accepts as tail_accepts,
        topk_overlap as topk_overlap,
        weighted_overlap as weighted_overlap,
    )
    from prune_opd_hf.algorithm.rewards import (
        choose_candidates as choose_candidates,
        topk_rewards as topk_rewards,
        weight_rewards as weight_rewards,
    )
    from prune_opd_hf.errors import PruneOPDError as PruneOPDError
    from prune_opd_hf.evaluation import evaluate_model as evaluate_model
    from prune_opd_hf.generation import (
        DriftMonitor as DriftMonitor,
        DriftProgress as DriftProgress,
        DriftStoppingCriteria as DriftStoppingCriteria,
        StudentTopKLogitsProcessor as StudentTopKLogitsProcessor,
        pruned_generate as pruned_generate,
    )
    from prune_opd_hf.hub import build_card as build_card, publish_student as publish_student
    from prune_opd_hf.models.chunked_head import (
        candidate_log_probs as candidate_log_probs,
        divergence_from_hidden as divergence_from_hidden,
    )
    from prune_opd_hf.models.vocabulary import shared_vocabulary as shared_vocabulary
    from prune_opd_hf.preflight import PreflightReport as PreflightReport, preflight as preflight
    from prune_opd_hf.records.evaluation_report import EvaluationReport as EvaluationReport
    from prune_opd_hf.records.rollouts import Rollouts as Rollouts
    from prune_opd_hf.records.training_summary import TrainingSummary as TrainingSummary
    from prune_opd_hf.teachers.base import TeacherScores as TeacherScores
    from prune_opd_hf.teachers.local import LocalTeacher as Teacher  # noqa: F401 - under another name
    from prune_opd_hf.teachers.served import ServedTeacher as ServedTeacher
    from prune_opd_hf.training import PruneOPDConfig as PruneOPDConfig, PruneOPDTrainer as PruneOPDTrainer

__version__ = "0.1.0"

PUBLIC_NAMES = {
    "DriftConfig": "algorithm.drift",
    "DriftMonitor": "generation",
    "DriftProgress": "generation",
    "DriftStoppingCriteria": "generation",
    "EvaluationReport": "records.evaluation_report",
    "PreflightReport": "preflight",
    "PruneOPDConfig": "training",
    "PruneOPDError": "errors",
    "PruneOPDTrainer": "training",
    "ResponseBudget": "algorithm.budget",
    "Rollouts": "records.rollouts",
    "ServedTeacher": "teachers.served",
    "StudentTopKLogitsProcessor": "generation",
    "Teacher": "teachers.local:LocalTeacher",
    "TeacherScores": "teachers.base",
    "TrainingSummary": "records.training_summary",
    "build_card": "hub",
    "candidate_log_probs": "models.chunked_head",
    "choose_candidates": "algorithm.rewards",
    "divergence_from_hidden": "models.chunked_head",
    "effective_length": "algorithm.drift",
    "evaluate_model": "evaluation",
    "generalized_jsd_loss": "algorithm.losses",
    "mass_overlap": "algorithm.overlap",
    "nucleus_accepts": "algorithm.overlap",
    "preflight": "preflight",
    "pruned_generate": "generation",
    "publish_student": "hub",
    "reliability": "algorithm.drift",
    "reverse_kl_loss": "algorithm.losses",
    "sampled_token_loss": "algorithm.losses",
    "shared_vocabulary": "models.vocabulary",
    "tail_accepts": "algorithm.overlap",
    "topk_kl_loss": "algorithm.losses",
    "topk_overlap": "algorithm.overlap",
    "topk_policy_gradient_loss": "algorithm.losses",
    "topk_rewards": "algorithm.rewards",
    "weight_rewards": "algorithm.rewards",
    "weighted_overlap": "algorithm.overlap",
}
"""Every public name and the module that has it, with the name there where it is another."""

__all__ = sorted(PUBLIC_NAMES)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = PUBLIC_NAMES[name].partition(":")
    value = getattr(import_module(f"{__name__}.{module}"), there or name)
    return globals().setdefault(name, value)  # `preflight` is set by its import: the room can be called as its function


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC_NAMES})
