"""The loss of one micro-batch of rollouts, from the student's forward pass to a number with a gradient.

Everything is computed on response tokens only, as one row of them: (1, tokens, ...). The losses on candidates use what
generation recorded of the teacher; those over the full vocabulary ask its backbone once more.

It knows models, rollouts and losses; it does not know generation or the optimizer.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prune_opd_hf.algorithm.losses import (
    generalized_jsd_loss,
    sampled_token_loss,
    topk_kl_loss,
    topk_policy_gradient_loss,
)
from prune_opd_hf.algorithm.rewards import Candidates, choose_candidates, topk_rewards
from prune_opd_hf.models.chunked_head import candidate_log_probs, divergence_from_hidden
from prune_opd_hf.models.forward_pass import Layout, hidden_states, lay_out, logits
from prune_opd_hf.models.lm_head import BackboneAndHead
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.local import LocalTeacher
from prune_opd_hf.training.config import PruneOPDConfig

Metrics = dict[str, tuple[float, float]]


class ObjectiveValue(NamedTuple):
    """What one micro-batch contributes.

    Attributes:
        loss: its share of the mean over the response tokens of the whole step, with gradient.
        old_log_probs: log-probabilities of the candidates under the weights of this pass, for later updates on the same
            rollouts; None where the loss has no use for them.
        metrics: means over this micro-batch's response tokens, each with its number of tokens.
    """

    loss: Float[Tensor, ""]
    old_log_probs: Float[Tensor, "1 tokens candidates"] | None
    metrics: Metrics


class Objective:
    """The loss that the settings choose.

    Args:
        args: the settings of the run.
        student: the bare student, PEFT-wrapped or not, before it is wrapped for distributed training.
        teacher: whose vocabulary counts, and who is asked again where a loss needs its whole distribution.
    """

    def __init__(self, args: PruneOPDConfig, student: nn.Module, teacher: LocalTeacher) -> None:
        self.args, self.teacher = args, teacher
        self.parts = BackboneAndHead(student)

    def weights(self, rollouts: Rollouts) -> Float[Tensor, "batch time"]:
        """What each response token weighs: L_t = R_t + weight_base, or 1; 0 on padding."""
        return rollouts.loss_weights if self.args.weighs_by_reliability else rollouts.response_mask.float()

    def __call__(
        self, model: nn.Module, rollouts: Rollouts, token_count: Tensor, old_log_probs: Tensor | None = None
    ) -> ObjectiveValue:
        """The loss of a micro-batch.

        Args:
            model: the student as the trainer wraps it.
            rollouts: the micro-batch.
            token_count: response tokens of the whole step, over micro-batches and processes.
            old_log_probs: what the first pass over these rollouts returned; None in the first pass.
        """
        layout, mask = lay_out(rollouts), rollouts.response_mask
        weights = self.weights(rollouts)[mask].unsqueeze(0)
        if self.args.loss_type in ("generalized_jsd", "reverse_kl"):
            loss, metrics = self._divergence(model, layout, weights, token_count)
            return ObjectiveValue(loss, None, metrics)
        candidates = self._candidates(rollouts)
        log_probs, entropy = self._log_probs(model, layout, candidates.ids)
        now = log_probs.detach()
        old = now if old_log_probs is None else old_log_probs
        loss, metrics = self._loss_on_candidates(log_probs, old, candidates, weights, token_count)
        metrics["student/entropy"] = _mean(entropy)
        if self.args.loss_type != "sampled_token":
            mass = (now.exp() * candidates.support).sum(dim=-1)
            log_ratio = (now - candidates.teacher_log_probs).masked_fill(~candidates.support, 0.0)
            metrics["student/topk_mass"] = _mean(mass)
            metrics["kl/topk"] = _mean((now.exp() * log_ratio).sum(dim=-1))
        return ObjectiveValue(loss, old, metrics)

    # ------------------------------------------------------------------ losses on candidates

    def _candidates(self, rollouts: Rollouts) -> Candidates:
        """The candidates of every response token: the sampled token alone, or one of the supports."""
        mask, k = rollouts.response_mask, self.args.loss_top_k
        if self.args.loss_type == "sampled_token":
            ids = rollouts.response_ids[mask].reshape(1, -1, 1)
            log_q = rollouts.teacher_token_log_probs[mask].reshape(1, -1, 1)
            return Candidates(ids, log_q, torch.ones_like(ids, dtype=torch.bool))
        assert rollouts.student_topk_ids is not None  # the rollouts of this trainer always watch the student
        assert rollouts.teacher_log_probs is not None
        student_ids, log_q, teacher_ids, teacher_log_q = (
            values[mask][:, :k].unsqueeze(0)
            for values in (
                rollouts.student_topk_ids,
                rollouts.teacher_log_probs,
                rollouts.teacher_topk_ids,
                rollouts.teacher_topk_log_probs,
            )
        )
        if self.args.loss_support == "student":  # nothing to compare
            return Candidates(student_ids, log_q, torch.ones_like(student_ids, dtype=torch.bool))
        return choose_candidates(student_ids, log_q, teacher_ids, teacher_log_q, self.args.loss_support)

    def _log_probs(
        self, model: nn.Module, layout: Layout, ids: Int[Tensor, "1 tokens candidates"]
    ) -> tuple[Float[Tensor, "1 tokens candidates"], Float[Tensor, "1 tokens"]]:
        """log p of the candidates, with gradient, and the student's entropy, both over the shared vocabulary."""
        if self.parts.head_parameters() is None:
            dense = logits(model, layout, self.teacher.vocab_size).unsqueeze(0).log_softmax(dim=-1)
            return dense.gather(-1, ids), _entropy(dense.detach())
        hidden = hidden_states(model, self.parts.lm_head, layout).unsqueeze(0)
        head = self.parts.head_parameters(self.teacher.vocab_size)
        assert head is not None
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return tuple(candidate_log_probs(hidden, head, ids, mask))

    def _loss_on_candidates(
        self, log_probs: Tensor, old: Tensor, candidates: Candidates, weights: Tensor, token_count: Tensor
    ) -> tuple[Tensor, Metrics]:
        args, mask = self.args, torch.ones(weights.shape, dtype=torch.bool, device=weights.device)
        clips = {"clip_low": args.clip_low, "clip_high": args.clip_high, "dual_clip": args.dual_clip}
        if args.loss_type == "topk_kl":
            loss = topk_kl_loss(
                log_probs,
                candidates.teacher_log_probs,
                weights,
                mask,
                direction=args.topk_kl_direction,
                tail=args.topk_kl_tail,
                support=candidates.support,
                token_count=token_count,
            )
            return loss, {}
        if args.loss_type == "sampled_token":
            log_p, old_log_p, log_q = log_probs[..., 0], old[..., 0], candidates.teacher_log_probs[..., 0]
            loss, clip_share = sampled_token_loss(
                log_p,
                old_log_p,
                log_q,
                weights,
                mask,
                estimator=args.sampled_estimator,
                token_count=token_count,
                **clips,
            )
            return loss, {
                "clip_share": (float(clip_share), float(mask.numel())),
                "reward/mean": _mean(weights * (log_q - old_log_p)),
            }
        rewards = weights.unsqueeze(-1) * topk_rewards(
            old,
            candidates.teacher_log_probs,
            mask,
            support=candidates.support,
            weighting=args.loss_weighting,
            centered=args.loss_centered,
        )
        loss, clip_share = topk_policy_gradient_loss(log_probs, old, rewards, mask, token_count=token_count, **clips)
        return loss, {
            "clip_share": (float(clip_share), float(mask.numel())),
            "reward/mean": _mean(rewards.sum(dim=-1)),
        }

    # ------------------------------------------------------------------ losses over the full vocabulary

    def _divergence(
        self, model: nn.Module, layout: Layout, weights: Tensor, token_count: Tensor
    ) -> tuple[Tensor, Metrics]:
        args, vocab_size = self.args, self.teacher.vocab_size
        beta = 1.0 if args.loss_type == "reverse_kl" else args.beta
        mask = torch.ones(weights.shape, dtype=torch.bool, device=weights.device)
        if self.parts.head_parameters() is None or self.teacher.head_parameters() is None:
            teacher_logits = self.teacher.logits(layout).unsqueeze(0)
            student_logits = logits(model, layout, vocab_size).unsqueeze(0)
            loss = generalized_jsd_loss(
                student_logits,
                teacher_logits.to(student_logits.device),
                weights,
                mask,
                beta=beta,
                temperature=args.loss_temperature,
                token_count=token_count,
            )
            entropy = _entropy((student_logits.detach() / args.loss_temperature).log_softmax(dim=-1))
            return loss, {"student/entropy": _mean(entropy)}
        teacher_hidden = self.teacher.hidden_states(layout).unsqueeze(0).to(weights.device)
        teacher_head = self.teacher.head_parameters()
        hidden = hidden_states(model, self.parts.lm_head, layout).unsqueeze(0)
        student_head = self.parts.head_parameters(vocab_size)
        assert student_head is not None
        assert teacher_head is not None
        if teacher_head.weight.device != hidden.device:
            bias = None if teacher_head.bias is None else teacher_head.bias.to(hidden.device)
            teacher_head = teacher_head._replace(weight=teacher_head.weight.to(hidden.device), bias=bias)
        value = divergence_from_hidden(
            hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            weights,
            mask,
            beta=beta,
            temperature=args.loss_temperature,
            token_count=token_count,
        )
        return value.loss, {
            "student/entropy": _mean(value.entropy),
            f"kl/{'reverse' if beta == 1 else 'forward' if beta == 0 else 'jsd'}": _mean(value.divergence),
        }


def _mean(values: Tensor) -> tuple[float, float]:
    """A mean over response tokens, with their number as its weight."""
    return float(values.mean()), float(values.numel())


def _entropy(log_probs: Float[Tensor, "1 tokens vocab"]) -> Float[Tensor, "1 tokens"]:
    return -(log_probs.exp() * log_probs.clamp(min=-1e30)).sum(dim=-1)
