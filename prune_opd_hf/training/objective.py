"""The loss of one micro-batch of rollouts, from the student's forward pass to a number with a gradient.

It knows models, rollouts and losses; it does not know generation or the optimizer.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prune_opd_hf.losses import reverse_kl_loss, topk_policy_gradient_loss
from prune_opd_hf.rewards import choose_candidates, topk_rewards
from prune_opd_hf.rollouts import Rollouts
from prune_opd_hf.teacher import Teacher
from prune_opd_hf.training.config import PruneOPDConfig


class ObjectiveValue(NamedTuple):
    """What one micro-batch contributes.

    Attributes:
        loss: its share of the mean over the response tokens of the whole step, with gradient.
        old_log_probs: log-probabilities of the candidates under the weights of this pass, for later updates on the same
            rollouts; None where the loss has no use for them.
        metrics: means over this micro-batch's response tokens, each with its number of tokens.
    """

    loss: Float[Tensor, ""]
    old_log_probs: Tensor | None
    metrics: dict[str, tuple[float, float]]


class Objective:
    """The loss that the settings choose.

    Args:
        args: the settings of the run.
        teacher: whose vocabulary counts, and who is asked again where a loss needs its whole distribution.
    """

    def __init__(self, args: PruneOPDConfig, teacher: Teacher) -> None:
        self.args, self.teacher = args, teacher

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
        mask, weights = rollouts.response_mask, self.weights(rollouts)
        logits = self._response_logits(model, rollouts)
        tokens = float(mask.sum())
        metrics: dict[str, tuple[float, float]] = {}
        if self.args.loss_type == "topk_policy_gradient":
            loss, old_log_probs = self._topk_loss(logits, rollouts, weights, token_count, old_log_probs, metrics)
        else:
            with torch.no_grad():
                teacher_logits = self._response_logits(self.teacher.model, rollouts)
            loss = reverse_kl_loss(logits, teacher_logits, weights, mask, token_count=token_count)
        with torch.no_grad():
            log_probs = logits.detach().log_softmax(dim=-1)
            entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
            metrics["student/entropy"] = (float(entropy[mask].mean()), tokens)
        return ObjectiveValue(loss, old_log_probs, metrics)

    def _response_logits(self, model: nn.Module, rollouts: Rollouts) -> Float[Tensor, "batch time vocab"]:
        """float32 logits for every response token, over the vocabulary that both models share."""
        mask = rollouts.sequence_mask.long()
        time_steps = rollouts.response_ids.shape[1]
        outputs: Any = model(
            input_ids=rollouts.sequences,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=time_steps + 1,
        )
        return outputs.logits[:, -time_steps - 1 : -1, : self.teacher.vocab_size].float()

    def _topk_loss(
        self,
        logits: Tensor,
        rollouts: Rollouts,
        weights: Tensor,
        token_count: Tensor,
        old_log_probs: Tensor | None,
        metrics: dict[str, tuple[float, float]],
    ) -> tuple[Tensor, Tensor]:
        args, k, mask = self.args, self.args.loss_top_k, rollouts.response_mask
        assert rollouts.student_topk_ids is not None  # the rollouts of this trainer always watch the student
        assert rollouts.teacher_log_probs is not None
        candidates = choose_candidates(
            rollouts.student_topk_ids[..., :k],
            rollouts.teacher_log_probs[..., :k],
            rollouts.teacher_topk_ids[..., :k],
            rollouts.teacher_topk_log_probs[..., :k],
            args.loss_support,
        )
        log_probs = logits.gather(-1, candidates.ids) - logits.logsumexp(dim=-1, keepdim=True)
        now = log_probs.detach()
        old_log_probs = now if old_log_probs is None else old_log_probs
        rewards = topk_rewards(
            old_log_probs,
            candidates.teacher_log_probs,
            mask,
            support=candidates.support,
            weighting=args.loss_weighting,
            centered=args.loss_centered,
        )
        rewards = rewards * weights.unsqueeze(-1)
        loss, clip_share = topk_policy_gradient_loss(
            log_probs,
            old_log_probs,
            rewards,
            mask,
            clip_low=args.clip_low,
            clip_high=args.clip_high,
            dual_clip=args.dual_clip,
            token_count=token_count,
        )
        tokens = float(mask.sum())
        in_set = (now.exp() * candidates.support).sum(dim=-1)
        divergence = (now.exp() * (now - candidates.teacher_log_probs) * candidates.support).sum(dim=-1)
        metrics["student/topk_mass"] = (float(in_set[mask].mean()), tokens)
        metrics["kl/topk"] = (float(divergence[mask].mean()), tokens)
        metrics["reward/mean"] = (float(rewards.sum(dim=-1)[mask].mean()), tokens)
        metrics["clip_share"] = (float(clip_share), tokens)
        return loss, old_log_probs
