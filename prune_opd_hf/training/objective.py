"""The loss of one micro-batch of rollouts, from the student's forward pass to a number with a gradient.

Everything is computed on response tokens only, as one row of them: (1, tokens, ...). Losses on candidates, the sampled token
among them, use what generation recorded of the teacher; those over the full vocabulary ask the teacher for its whole distribution
at each response token.

`LOSSES` names the losses that `loss_type` chooses from. A further one on candidates is a function of `OnCandidates` there.
It knows models, rollouts and losses; it does not know generation or the optimizer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prune_opd_hf.algorithm.losses import (
    generalized_jsd_loss,
    sampled_token_loss,
    topk_kl_loss,
    topk_policy_gradient_loss,
)
from prune_opd_hf.algorithm.rewards import Candidates, choose_candidates, topk_rewards
from prune_opd_hf.models.chunked_head import candidate_log_probs, divergence_from_hidden
from prune_opd_hf.models.forward_pass import Layout, can_pack, hidden_states, lay_out, logits
from prune_opd_hf.models.lm_head import BackboneAndHead, HeadParameters
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.teachers.base import require
from prune_opd_hf.teachers.several import rows_by_name

if TYPE_CHECKING:
    from prune_opd_hf.training.config import PruneOPDConfig

Metrics = dict[str, tuple[float, float]]
"""Means over response tokens, each with its number of tokens as its weight."""


class ObjectiveValue(NamedTuple):
    """What one micro-batch contributes.

    Attributes:
        loss: its share of the mean over the response tokens of the whole step, with gradient.
        old_log_probs: of the candidates under the weights of this pass, for later updates on the same rollouts; None where the
            loss has no use for them.
    """

    loss: Float[Tensor, ""]
    old_log_probs: Float[Tensor, "1 tokens candidates"] | None
    metrics: Metrics


@dataclass(frozen=True)
class OnCandidates:
    """What a loss on candidates sees.

    Attributes:
        weights: L_t of each response token.
        mask: True everywhere.
        token_count: the response tokens of the whole step over all processes.
        log_probs: log p of the candidates, with gradient.
        old_log_probs: the same under the weights that generated.
        candidates: their ids, log q, and which of them count.
    """

    weights: Float[Tensor, "1 tokens"]
    mask: Bool[Tensor, "1 tokens"]
    token_count: Tensor
    log_probs: Float[Tensor, "1 tokens candidates"]
    old_log_probs: Float[Tensor, "1 tokens candidates"]
    candidates: Candidates


def topk_policy_gradient(args: "PruneOPDConfig", seen: OnCandidates) -> tuple[Tensor, Metrics]:
    """The paper's: a reward for each candidate, PPO's clips."""
    rewards = seen.weights.unsqueeze(-1) * topk_rewards(
        seen.old_log_probs,
        seen.candidates.teacher_log_probs,
        seen.mask,
        support=seen.candidates.support,
        weighting=args.loss_weighting,
        centered=args.loss_centered,
    )
    loss, clip_share = topk_policy_gradient_loss(
        seen.log_probs, seen.old_log_probs, rewards, seen.mask, token_count=seen.token_count, **_clips(args)
    )
    return loss, {
        "clip_share": (float(clip_share), float(seen.mask.numel())),
        "reward/mean": _mean(rewards.sum(dim=-1)),
    }


def topk_kl(args: "PruneOPDConfig", seen: OnCandidates) -> tuple[Tensor, Metrics]:
    """The KL on the candidates."""
    loss = topk_kl_loss(
        seen.log_probs,
        seen.candidates.teacher_log_probs,
        seen.weights,
        seen.mask,
        direction=args.topk_kl_direction,
        tail=args.topk_kl_tail,
        support=seen.candidates.support,
        token_count=seen.token_count,
    )
    return loss, {}


def sampled_token(args: "PruneOPDConfig", seen: OnCandidates) -> tuple[Tensor, Metrics]:
    """The KL estimated at the sampled token, the only candidate."""
    log_q, old_log_p = seen.candidates.teacher_log_probs[..., 0], seen.old_log_probs[..., 0]
    loss, clip_share = sampled_token_loss(
        seen.log_probs[..., 0],
        old_log_p,
        log_q,
        seen.weights,
        seen.mask,
        estimator=args.sampled_estimator,
        token_count=seen.token_count,
        **_clips(args),
    )
    return loss, {
        "clip_share": (float(clip_share), float(seen.mask.numel())),
        "reward/mean": _mean(seen.weights * (log_q - old_log_p)),
    }


CANDIDATE_LOSSES: Mapping[str, Callable[["PruneOPDConfig", OnCandidates], tuple[Tensor, Metrics]]] = {
    "topk_policy_gradient": topk_policy_gradient,
    "topk_kl": topk_kl,
    "sampled_token": sampled_token,
}
VOCABULARY_LOSSES: Mapping[str, Callable[["PruneOPDConfig"], float]] = {
    "generalized_jsd": lambda args: args.beta,
    "reverse_kl": lambda args: 1.0,
}
"""The losses over the full vocabulary, by the beta at which TRL's divergence is each: 0 is the forward KL, 1 the reverse KL."""

LOSSES = (*CANDIDATE_LOSSES, *VOCABULARY_LOSSES)
"""Choices of `loss_type`."""


class Objective:
    """The loss that the settings choose. A loss that needs what the teacher cannot give is a `ConfigError`.

    Args:
        student: the bare student, PEFT-wrapped or not, before it is wrapped for distributed training.
        teacher: whose vocabulary counts, and who is asked again where a loss needs its whole distribution.
    """

    def __init__(self, args: "PruneOPDConfig", student: nn.Module, teacher: Any) -> None:
        if args.loss_type in VOCABULARY_LOSSES:
            require(
                teacher,
                "gives_full_logits",
                f"loss_type='{args.loss_type}'",
                "choose a loss on candidates, such as 'topk_kl' with loss_support='teacher'",
            )
        elif args.loss_type != "sampled_token" and args.loss_support != "teacher":
            remedy = "set loss_support='teacher' or loss_type='sampled_token'"
            require(teacher, "scores_candidates", f"loss_support='{args.loss_support}'", remedy)
        self.args, self.teacher = args, teacher
        self.parts = BackboneAndHead(student)
        by_tokens, reads_again = args.max_tokens_per_micro_batch is not None, args.loss_type in VOCABULARY_LOSSES
        # Where the teacher would pad, rows of like length go together, for both.
        self.packs = by_tokens and can_pack(student) and (not reads_again or teacher.can_pack())

    @property
    def _counted(self) -> tuple[int, tuple[int, ...]]:
        """Which ids count."""
        return self.teacher.vocab_size, self.teacher.excluded_ids

    def weights(self, rollouts: Rollouts) -> Float[Tensor, "batch time"]:
        """The weight of each response token: L_t = R_t + weight_base, or 1; 0 on padding."""
        return rollouts.loss_weights if self.args.weighs_by_reliability else rollouts.response_mask.float()

    def measure(self, model: nn.Module, rollouts: Rollouts) -> Metrics:
        """The loss of rollouts that are not trained on, every token at weight 1, and the student's entropy.

        With "topk_policy_gradient" it is the KL on the candidates, which that loss brings down: its own value is 0 by construction.
        """
        tokens = rollouts.response_mask.sum().float()
        value = self(model, rollouts, tokens, weights=rollouts.response_mask.float())
        loss = (float(value.loss), float(tokens))
        if self.args.loss_type == "topk_policy_gradient":
            loss = value.metrics["kl/topk"]
        return {"loss": loss, "entropy": value.metrics["student/entropy"]}

    def __call__(
        self,
        model: nn.Module,
        rollouts: Rollouts,
        token_count: Tensor,
        old_log_probs: Tensor | None = None,
        *,
        weights: Tensor | None = None,
    ) -> ObjectiveValue:
        """The loss of a micro-batch, of a model as the trainer wraps it; `old_log_probs` is what the first pass over these rollouts
        returned, `token_count` the response tokens of the whole step, over micro-batches and processes, and `weights` takes the
        place of those of the settings."""
        kind, layout = self.args.loss_type, lay_out(rollouts, packed=self.packs)
        weights = self.weights(rollouts) if weights is None else weights
        weights = weights[rollouts.response_mask].unsqueeze(0)
        mask = torch.ones(weights.shape, dtype=torch.bool, device=weights.device)
        if kind in VOCABULARY_LOSSES:
            return self._on_vocabulary(model, rollouts, layout, weights, token_count)
        candidates = self._candidates(rollouts)
        log_probs, entropy = self._log_probs(model, layout, candidates.ids)
        now = log_probs.detach()
        old = now if old_log_probs is None else old_log_probs
        loss, metrics = CANDIDATE_LOSSES[kind](
            self.args, OnCandidates(weights, mask, token_count, log_probs, old, candidates)
        )
        metrics["student/entropy"] = _mean(entropy)
        if kind != "sampled_token":
            log_ratio = (now - candidates.teacher_log_probs).masked_fill(~candidates.support, 0.0)
            metrics["student/topk_mass"] = _mean((now.exp() * candidates.support).sum(dim=-1))
            metrics["kl/topk"] = _mean((now.exp() * log_ratio).sum(dim=-1))
        return ObjectiveValue(loss, old, metrics)

    def _candidates(self, rollouts: Rollouts) -> Candidates:
        """The candidates of every response token: the sampled token alone, or one of the supports."""
        mask, k = rollouts.response_mask, self.args.loss_top_k
        if self.args.loss_type == "sampled_token":
            ids = rollouts.response_ids[mask].reshape(1, -1, 1)
            log_q = rollouts.teacher_token_log_probs[mask].reshape(1, -1, 1)
            return Candidates(ids, log_q, torch.ones_like(ids, dtype=torch.bool))
        teacher_ids, teacher_log_q = (
            values[mask][:, :k].unsqueeze(0) for values in (rollouts.teacher_topk_ids, rollouts.teacher_topk_log_probs)
        )
        if self.args.loss_support == "teacher":
            return Candidates(teacher_ids, teacher_log_q, torch.ones_like(teacher_ids, dtype=torch.bool))
        assert rollouts.student_topk_ids is not None  # this trainer always records the student's candidates
        assert rollouts.teacher_log_probs is not None  # the constructor has refused teachers that cannot score them
        student_ids, log_q = (
            values[mask][:, :k].unsqueeze(0) for values in (rollouts.student_topk_ids, rollouts.teacher_log_probs)
        )
        if self.args.loss_support == "student":  # nothing to compare
            return Candidates(student_ids, log_q, torch.ones_like(student_ids, dtype=torch.bool))
        return choose_candidates(student_ids, log_q, teacher_ids, teacher_log_q, self.args.loss_support)

    def _log_probs(
        self, model: nn.Module, layout: Layout, ids: Int[Tensor, "1 tokens candidates"]
    ) -> tuple[Float[Tensor, "1 tokens candidates"], Float[Tensor, "1 tokens"]]:
        """log p of the candidates, with gradient, and the student's entropy, both over the shared vocabulary."""
        if self.parts.head_parameters() is None:
            dense = logits(model, layout, *self._counted).unsqueeze(0).log_softmax(dim=-1)
            return dense.gather(-1, ids), _entropy(dense.detach())
        hidden = hidden_states(model, self.parts.lm_head, layout).unsqueeze(0)
        head = self.parts.head_parameters(*self._counted)
        assert head is not None
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return tuple(candidate_log_probs(hidden, head, ids, mask))

    def _on_vocabulary(
        self,
        model: nn.Module,
        rollouts: Rollouts,
        layout: Layout,
        weights: Float[Tensor, "1 tokens"],
        token_count: Tensor,
    ) -> ObjectiveValue:
        """TRL's divergence over the full vocabulary: one pass of the student over all rows, and one of each teacher over its own.

        It takes hidden states with the LM heads, or dense logits where a head is more than a linear map.
        """
        device, losses, metrics = layout.input_ids.device, [], []
        beta, temperature = VOCABULARY_LOSSES[self.args.loss_type](self.args), self.args.loss_temperature
        kind = "reverse" if beta == 1 else "forward" if beta == 0 else "jsd"
        teachers = self.teacher.teachers if rollouts.teachers else {"": self.teacher}
        rows_of = rows_by_name(rollouts.teachers) if rollouts.teachers else [("", torch.arange(len(rollouts)))]
        heads = {name: teachers[name].head_parameters() for name, _ in rows_of}
        head = None
        if self.parts.head_parameters() is None or any(one is None for one in heads.values()):
            ours = logits(model, layout, *self._counted).unsqueeze(0)
        else:
            ours = hidden_states(model, self.parts.lm_head, layout).unsqueeze(0)
            head = self.parts.head_parameters(*self._counted)
        row_of_token, several = rollouts.response_mask.nonzero()[:, 0], len(rows_of) > 1
        for name, rows in rows_of:
            read = lay_out(rollouts.select(rows) if several else rollouts, for_teacher=True, packed=self.packs)
            inside = torch.isin(row_of_token, rows.to(device)) if several else slice(None)
            student, counted = ours[:, inside], weights[:, inside]
            mask = torch.ones(counted.shape, dtype=torch.bool, device=device)
            how = {"beta": beta, "temperature": temperature, "token_count": token_count}
            if head is None:
                teacher = teachers[name].logits(read).unsqueeze(0).to(device)
                losses.append(generalized_jsd_loss(student, teacher, counted, mask, **how))
                entropy = _entropy((student.detach() / temperature).log_softmax(dim=-1))
                metrics.append({"student/entropy": _mean(entropy)})
            else:
                teacher = teachers[name].hidden_states(read).unsqueeze(0).to(device)
                value = divergence_from_hidden(student, head, teacher, _on(heads[name], device), counted, mask, **how)
                losses.append(value.loss)
                metrics.append({"student/entropy": _mean(value.entropy), f"kl/{kind}": _mean(value.divergence)})
        return ObjectiveValue(torch.stack(losses).sum(), None, _together(metrics))


def _clips(args: "PruneOPDConfig") -> dict[str, float]:
    return {"clip_low": args.clip_low, "clip_high": args.clip_high, "dual_clip": args.dual_clip}


def _on(head: HeadParameters, device: torch.device) -> HeadParameters:
    if head.weight.device == device:
        return head
    return head._replace(weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))


def _mean(values: Tensor) -> tuple[float, float]:
    """A mean over response tokens, with their number as its weight."""
    return float(values.mean()), float(values.numel())


def _together(parts: Sequence[Metrics]) -> Metrics:
    """Means over several sets of tokens as means over all of them."""
    if len(parts) == 1:
        return parts[0]
    weights = {name: sum(part[name][1] for part in parts) for name in parts[0]}
    sums = {name: sum(value * weight for value, weight in (part[name] for part in parts)) for name in parts[0]}
    return {name: (sums[name] / weights[name], weights[name]) for name in sums}


def _entropy(log_probs: Float[Tensor, "1 tokens vocab"]) -> Float[Tensor, "1 tokens"]:
    return -(log_probs.exp() * log_probs.clamp(min=-1e30)).sum(dim=-1)
