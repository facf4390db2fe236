"""Per-token gradients, and how far they point along a reference gradient.

The gradient of response token t is that of the centred top-k loss at t alone, with weight 1:

    g_t = ∇ Σ_j c_j log π(j | x, y_<t),   c_j = p~_j [(log p_j - log q_j) - Σ_i p~_i (log p_i - log q_i)],   c held fixed

which is what one update of the trainer adds up over tokens. Exact: one backward pass for each token. That is meant for small
models, or for a chosen part of the parameters of a large one (its last layers, its LM head); the cosine is then that of the
part, and a report must say so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prune_opd_hf.errors import InputError
from prune_opd_hf.records.rollouts import Rollouts

MOST_TOKENS = 512
"""Tokens of one rollout whose gradients are taken; longer rollouts are sampled evenly."""


@dataclass(frozen=True)
class TokenGradients:
    """What the gradients of a record say.

    Attributes:
        cosine: by name of the reference: cos(g_t, reference); NaN where g_t is zero or was not taken.
        norm: |g_t|; NaN where it was not taken.
        parameters: how many parameters count.
        whole_model: whether they are all of the model's.
    """

    cosine: dict[str, Float[Tensor, "batch time"]]
    norm: Float[Tensor, "batch time"]
    parameters: int
    whole_model: bool


def token_gradients(
    student: nn.Module,
    rollouts: Rollouts,
    *,
    references: dict[str, Tensor] | None = None,
    chosen: Callable[[str], bool] | None = None,
    most_tokens: int = MOST_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenGradients:
    """Cosine of each token's gradient with reference gradients.

    The reference "rollouts" is always there: the sum over all tokens of all *other* rollouts. A token's own rollout is left
    out, or long rollouts would agree with themselves.

    Args:
        student: in the state that made the rollouts.
        rollouts: with the student's candidates.
        references: further gradients, flat, over the chosen parameters in their order (see `flat_gradient`).
        chosen: which parameters count, by name; all of them by default.
        most_tokens: of one rollout.
        on_progress: called with rollouts done and rollouts in all.

    Raises:
        InputError: no parameter is chosen, or the record lacks the student's candidates.
    """
    if rollouts.student_topk_ids is None or rollouts.teacher_log_probs is None:
        raise InputError("per-token gradients need the student's candidates, and this record has none")
    parameters = chosen_parameters(student, chosen)
    references = dict(references or {})
    batch, time = rollouts.response_ids.shape
    cosine = {name: torch.full((batch, time), float("nan")) for name in (*references, "rollouts")}
    norm = torch.full((batch, time), float("nan"))
    rows = [rollouts.select([row]) for row in range(batch)]
    sums = []
    for row in rows:
        sums.append(flat_gradient(token_losses(student, row).sum(), parameters))
    total = torch.stack(sums).sum(dim=0)
    for number, row in enumerate(rows):
        losses = token_losses(student, row)[0]
        others = total - sums[number]
        at = torch.arange(len(losses))
        if len(losses) > most_tokens:
            at = torch.linspace(0, len(losses) - 1, most_tokens).round().long().unique()
        for position in at.tolist():
            gradient = flat_gradient(losses[position], parameters, retain_graph=True)
            size = float(gradient.norm())
            norm[number, position] = size
            if size > 0:
                for name, reference in (*references.items(), ("rollouts", others)):
                    cosine[name][number, position] = float(gradient @ reference / (size * reference.norm()))
        if on_progress is not None:
            on_progress(number + 1, batch)
    count = sum(parameter.numel() for parameter in parameters)
    everything = sum(parameter.numel() for parameter in student.parameters())
    return TokenGradients(cosine, norm, count, count == everything)


def token_losses(student: nn.Module, rollouts: Rollouts) -> Float[Tensor, "batch time"]:
    """The centred top-k loss of each response token, 0 on padding, with its graph."""
    assert rollouts.student_topk_ids is not None
    assert rollouts.teacher_log_probs is not None
    log_probs = response_log_probs(student, rollouts).gather(-1, rollouts.student_topk_ids)
    fixed = log_probs.detach()
    weights = fixed.softmax(dim=-1)  # p~: renormalised over the candidates
    log_ratio = fixed - rollouts.teacher_log_probs  # log p - log q
    centred = weights * (log_ratio - (weights * log_ratio).sum(dim=-1, keepdim=True))
    return (centred * log_probs).sum(dim=-1) * rollouts.response_mask


def gold_gradient(
    student: nn.Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    chosen: Callable[[str], bool] | None = None,
) -> Float[Tensor, " parameters"]:
    """Gradient of the negative log-likelihood of gold responses, flat: where a student that saw the answers would go.

    Args:
        student: a causal LM.
        prompts, responses: token ids; take prompts that are not in the rollouts.
        chosen: which parameters count.

    Raises:
        InputError: nothing to learn from, or no parameter is chosen.
    """
    if not prompts or len(prompts) != len(responses):
        raise InputError(f"one response is needed for each prompt, got {len(responses)} for {len(prompts)}")
    parameters = chosen_parameters(student, chosen)
    device = parameters[0].device
    total = torch.zeros(sum(parameter.numel() for parameter in parameters), device=device)
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[*prompt, *response]], device=device)
        logits = student(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1].float()
        loss = nn.functional.cross_entropy(logits[0], ids[0, len(prompt) :], reduction="sum")
        total += flat_gradient(loss, parameters)
    return total


def chosen_parameters(model: nn.Module, chosen: Callable[[str], bool] | None) -> list[nn.Parameter]:
    """The parameters that count, each once.

    Raises:
        InputError: none is left.
    """
    parameters = [value for name, value in model.named_parameters() if chosen is None or chosen(name)]
    if not parameters:
        raise InputError(
            f"no parameter is chosen; the first one is called {next(iter(dict(model.named_parameters())))}"
        )
    return parameters


def flat_gradient(
    loss: Tensor, parameters: Sequence[nn.Parameter], *, retain_graph: bool = False
) -> Float[Tensor, " parameters"]:
    """Gradient of a loss with respect to the parameters, as one vector; 0 where a parameter has no part in it."""
    gradients = torch.autograd.grad(loss, list(parameters), retain_graph=retain_graph, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if gradient is None else gradient).reshape(-1)
            for gradient, parameter in zip(gradients, parameters, strict=True)
        ]
    )


def response_log_probs(model: nn.Module, rollouts: Rollouts) -> Float[Tensor, "batch time vocab"]:
    mask = rollouts.sequence_mask.long()
    device = next(iter(model.parameters())).device
    logits = model(
        input_ids=rollouts.sequences.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0).to(device),
        use_cache=False,
    ).logits
    return logits[:, rollouts.prompt_ids.shape[1] - 1 : -1].float().log_softmax(dim=-1).to(rollouts.response_ids.device)
