"""The chunked head against dense autograd: values, every gradient, what costs nothing, and what is refused."""

import math

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import COMMON, tiny_model

from prune_opd_hf.algorithm.losses import generalized_jsd_loss, topk_kl_loss, topk_policy_gradient_loss
from prune_opd_hf.algorithm.rewards import topk_rewards
from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.models.chunked_head import candidate_log_probs, divergence_from_hidden, gathered
from prune_opd_hf.models.chunked_head.projection import HeadGradients, Projector
from prune_opd_hf.models.lm_head import BackboneAndHead, HeadParameters, LogitTransform

EXAMPLES = settings(max_examples=30)
FINISHES = {
    "plain": LogitTransform(),
    "soft cap": LogitTransform(soft_cap=2.0),
    "divided": LogitTransform(divisor=3.0),
    "scaled": LogitTransform(scale=0.25),
}
VOCAB, SHARED, HIDDEN = 30, 26, 6


class Case:
    """Hidden states (2 x 4) of both models, their heads, and a mask, in float64: gradients are compared to the last digits."""

    def __init__(self, seed=0, transform="plain", bias=True, dtype=torch.float64, candidates=3):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight = draw(2, 4, HIDDEN).requires_grad_(), draw(VOCAB, HIDDEN).requires_grad_()
        self.bias = draw(VOCAB).requires_grad_() if bias else None
        self.head = HeadParameters(self.weight, self.bias, FINISHES[transform], SHARED)
        self.teacher_hidden = draw(2, 4, 5)
        self.teacher_head = HeadParameters(draw(VOCAB + 3, 5), None, LogitTransform(soft_cap=4.0), SHARED)
        self.mask = torch.rand(2, 4, generator=generator) < 0.7
        self.ids = torch.randint(0, SHARED, (2, 4, candidates), generator=generator)
        self.weights = torch.rand(2, 4, generator=generator)
        self.given = [values for values in (self.hidden, self.weight, self.bias) if values is not None]

    def logits(self):
        return dense_logits(self.hidden, self.head)

    def teacher_logits(self):
        return dense_logits(self.teacher_hidden, self.teacher_head)


def dense_logits(hidden, head):
    raw = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    transform = head.transform
    raw = raw * transform.scale / transform.divisor
    raw = raw if transform.soft_cap is None else transform.soft_cap * torch.tanh(raw / transform.soft_cap)
    return raw[..., : head.vocab_size]


@pytest.mark.parametrize("transform", sorted(FINISHES))
@EXAMPLES
@given(
    seed=st.integers(0, 9999),
    bias=st.booleans(),
    tokens_at_once=st.integers(1, 9),
    relative=st.sampled_from([0, 0.5, 1]),
)
def test_candidate_log_probs_and_their_gradients_equal_dense_autograd(transform, seed, bias, tokens_at_once, relative):
    case = Case(seed, transform, bias)
    gradient = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    sums_to_zero = torch.rand(2, 4, 1, generator=torch.Generator().manual_seed(seed)) < relative
    gradient = torch.where(sums_to_zero, gradient - gradient.mean(-1, keepdim=True), gradient)
    received = candidate_log_probs(
        case.hidden, case.head, case.ids, case.mask, max_logit_elements=tokens_at_once * SHARED
    )
    log_p = case.logits().log_softmax(-1)
    expected = log_p.gather(-1, case.ids) * case.mask.unsqueeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1) * case.mask
    torch.testing.assert_close(received.log_probs, expected)
    torch.testing.assert_close(received.entropy, entropy)
    torch.testing.assert_close(
        torch.autograd.grad((received.log_probs * gradient).sum(), case.given),
        torch.autograd.grad((expected * gradient).sum(), case.given),
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("transform", sorted(FINISHES))
@EXAMPLES
@given(
    seed=st.integers(0, 9999),
    bias=st.booleans(),
    tokens_at_once=st.integers(1, 9),
    temperature=st.sampled_from([1.0, 0.5, 3]),
)
def test_divergences_and_their_gradients_equal_dense_autograd(transform, beta, seed, bias, tokens_at_once, temperature):
    case = Case(seed, transform, bias)
    received = divergence_from_hidden(
        case.hidden,
        case.head,
        case.teacher_hidden,
        case.teacher_head,
        case.weights,
        case.mask,
        beta=beta,
        temperature=temperature,
        token_count=5,
        max_logit_elements=tokens_at_once * SHARED,
    )
    p, q = ((logits / temperature).softmax(-1) for logits in (case.logits(), case.teacher_logits()))
    m = (1 - beta) * p + beta * q
    if beta == 0:
        divergence = (q * (q / p).log()).sum(-1)
    elif beta == 1:
        divergence = (p * (p / q).log()).sum(-1)
    else:
        divergence = (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(-1)
    torch.testing.assert_close(received.divergence, divergence * case.mask)
    torch.testing.assert_close(received.entropy, -(p * p.log()).sum(-1) * case.mask)
    loss = (case.weights * divergence * case.mask).sum() / 5
    torch.testing.assert_close(received.loss, loss)
    torch.testing.assert_close(
        torch.autograd.grad(3 * received.loss, case.given), torch.autograd.grad(3 * loss, case.given)
    )


LEFT_OUT = (0, 7, 8, SHARED - 1)
KEPT = [index for index in range(SHARED) if index not in LEFT_OUT]


def without_ids(head):
    """The same head twice: told to leave ids out, and as one of a vocabulary that never had them."""
    bias = None if head.bias is None else head.bias[KEPT]
    return head._replace(excluded_ids=LEFT_OUT), HeadParameters(head.weight[KEPT], bias, head.transform)


@pytest.mark.parametrize("transform", sorted(FINISHES))
@EXAMPLES
@given(seed=st.integers(0, 9999), bias=st.booleans(), tokens_at_once=st.integers(1, 9))
def test_ids_that_are_left_out_count_for_nothing_in_any_value_or_gradient(transform, seed, bias, tokens_at_once):
    case, limit = Case(seed, transform, bias), {"max_logit_elements": tokens_at_once * SHARED}
    head, smaller = without_ids(case.head)
    ids = torch.randint(0, len(KEPT), (2, 4, 3), generator=torch.Generator().manual_seed(seed))
    received = candidate_log_probs(case.hidden, head, torch.tensor(KEPT)[ids], case.mask, **limit)
    expected = candidate_log_probs(case.hidden, smaller, ids, case.mask, **limit)
    torch.testing.assert_close(received, expected)
    gradient = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gradient[:, ::2] -= gradient[:, ::2].mean(-1, keepdim=True)  # which is computed in another way
    results = [(each.log_probs * gradient).sum() for each in (received, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(result, case.given) for result in results))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("transform", sorted(FINISHES))
@EXAMPLES
@given(seed=st.integers(0, 9999), bias=st.booleans(), temperature=st.sampled_from([1.0, 0.5, 3]))
def test_divergences_without_some_ids_are_those_of_the_smaller_vocabulary(transform, beta, seed, bias, temperature):
    case, settings = Case(seed, transform, bias), {"beta": beta, "temperature": temperature}
    heads, teacher_heads = without_ids(case.head), without_ids(case.teacher_head)
    received, expected = (
        divergence_from_hidden(case.hidden, head, case.teacher_hidden, theirs, case.weights, case.mask, **settings)
        for head, theirs in zip(heads, teacher_heads, strict=True)
    )
    torch.testing.assert_close(received, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each.loss, case.given) for each in (received, expected)))


def projected_tokens(monkeypatch):
    """Counts, from now on, the tokens whose logits are made."""
    counted = []
    project = Projector.project

    def counting(projector, tokens):
        logits = project(projector, tokens)
        counted.append(len(logits))
        return logits

    monkeypatch.setattr(Projector, "project", counting)
    return counted


def test_only_positions_in_the_mask_are_projected(monkeypatch):
    case, counted = Case(), projected_tokens(monkeypatch)
    candidate_log_probs(case.hidden, case.head, case.ids, case.mask)
    assert sum(counted) == int(case.mask.sum())
    divergence_from_hidden(case.hidden, case.head, case.teacher_hidden, case.teacher_head, case.weights, case.mask)
    assert sum(counted) == 3 * int(case.mask.sum())  # and once for each of the two models


@pytest.mark.parametrize("loss", ["centred", "renormalized KL", "literal", "bucket KL"])
def test_losses_that_compare_candidates_with_each_other_never_make_the_logits_again(monkeypatch, loss):
    case = Case(dtype=torch.float32, candidates=16)
    ids = case.logits().topk(16).indices
    log_q = case.teacher_logits().log_softmax(-1).gather(-1, ids)
    counted = projected_tokens(monkeypatch)
    log_p = candidate_log_probs(case.hidden, case.head, ids, case.mask).log_probs
    if "KL" in loss:
        value = topk_kl_loss(log_p, log_q, case.weights, case.mask, tail=loss.split()[0].replace("d", ""))
    else:
        rewards = topk_rewards(log_p, log_q, case.mask, centered=loss == "centred") * case.weights.unsqueeze(-1)
        value = topk_policy_gradient_loss(log_p, log_p.detach(), rewards, case.mask).loss
    value.backward()
    tokens = int(case.mask.sum())
    assert sum(counted) == (tokens if loss in ("centred", "renormalized KL") else 2 * tokens)


@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_what_stands_off_the_mask_is_never_read(rubbish):
    def all_of(case):
        log_probs, entropy = candidate_log_probs(case.hidden, case.head, case.ids, case.mask)
        divergence = divergence_from_hidden(
            case.hidden, case.head, case.teacher_hidden, case.teacher_head, case.weights, case.mask, beta=0.5
        )
        gradients = torch.autograd.grad(log_probs.square().sum() + divergence.loss, case.given)
        assert not gradients[0][~case.mask].any()
        return [log_probs, entropy, *divergence, *gradients]

    clean, dirty = Case(3), Case(3)
    assert not clean.mask.all()
    with torch.no_grad():
        for values in (dirty.hidden, dirty.teacher_hidden, dirty.weights):
            values[~dirty.mask] = rubbish
    dirty.ids[~dirty.mask] = -100
    torch.testing.assert_close(all_of(dirty), all_of(clean), rtol=0, atol=0)


def test_a_micro_batch_without_tokens_gives_zeros_that_can_be_differentiated():
    case = Case()
    nothing = torch.zeros_like(case.mask)
    log_probs, entropy = candidate_log_probs(case.hidden, case.head, case.ids, nothing)
    divergence = divergence_from_hidden(
        case.hidden, case.head, case.teacher_hidden, case.teacher_head, case.weights, nothing, beta=0.5
    )
    gradients = torch.autograd.grad(log_probs.sum() + divergence.loss, case.given)
    assert not any(values.any() for values in (log_probs, entropy, *divergence, *gradients))


def test_impossible_tokens_have_a_log_prob_of_minus_infinity_and_count_for_nothing():
    # constrained decoding by an infinite bias: id 4 for both, id 7 for the student alone
    case = Case()
    with torch.no_grad():
        case.bias[[4, 7]] = -math.inf
    teacher_bias = torch.zeros(VOCAB + 3, dtype=torch.float64)
    teacher_bias[4] = -math.inf
    teacher_head = case.teacher_head._replace(bias=teacher_bias, transform=LogitTransform())
    ids = torch.full_like(case.ids, 3)
    ids[..., 0] = 4
    log_probs, entropy = candidate_log_probs(case.hidden, case.head, ids, case.mask)
    assert torch.isneginf(log_probs[case.mask][:, 0]).all()
    p, q = case.logits().softmax(-1), dense_logits(case.teacher_hidden, teacher_head).softmax(-1)
    torch.testing.assert_close(entropy, torch.special.entr(p).sum(-1) * case.mask)
    both = p[..., [v for v in range(SHARED) if v not in (4, 7)]], q[..., [v for v in range(SHARED) if v not in (4, 7)]]
    reverse = (both[0] * (both[0] / both[1]).log()).sum(-1)
    jsd = 0.5 * (both[0] * (2 * both[0] / (both[0] + both[1])).log()).sum(-1)
    jsd = jsd + 0.5 * (both[1] * (2 * both[1] / (both[0] + both[1])).log()).sum(-1) + 0.5 * q[..., 7] * math.log(2)
    for beta, expected in [(1.0, reverse), (0.5, jsd)]:
        received = divergence_from_hidden(
            case.hidden, case.head, case.teacher_hidden, teacher_head, case.weights, case.mask, beta=beta
        )
        torch.testing.assert_close(received.divergence, expected * case.mask)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(received.loss, case.given[:1]))
    forward = divergence_from_hidden(
        case.hidden, case.head, case.teacher_hidden, teacher_head, case.weights, case.mask, beta=0.0
    )
    assert torch.isinf(forward.divergence[case.mask]).all()  # the teacher wants 7, and the student cannot


def test_a_frozen_head_gets_no_gradient_computed_and_hidden_states_do(monkeypatch):
    case, made = Case(), []
    take = HeadGradients.take
    monkeypatch.setattr(HeadGradients, "take", lambda sums: made.append(sums) or take(sums))
    frozen = case.head._replace(weight=case.weight.detach(), bias=case.bias.detach())
    log_probs, _ = candidate_log_probs(case.hidden, frozen, case.ids, case.mask)
    loss = divergence_from_hidden(
        case.hidden, frozen, case.teacher_hidden, case.teacher_head, case.weights, case.mask
    ).loss
    (log_probs.sum() + loss).backward()
    assert case.hidden.grad[case.mask].abs().min() > 0
    assert len(made) == 2
    assert all(sums.weight is None and sums.bias is None for sums in made)


def test_without_gradient_none_is_formed(monkeypatch):
    case = Case()
    monkeypatch.setattr(HeadGradients, "add_inplace", None)
    with torch.no_grad():
        loss = divergence_from_hidden(
            case.hidden, case.head, case.teacher_hidden, case.teacher_head, case.weights, case.mask
        ).loss
        log_probs, _ = candidate_log_probs(case.hidden, case.head, case.ids, case.mask)
    assert not loss.requires_grad
    assert not log_probs.requires_grad


@pytest.mark.parametrize("operation", ["candidates", "divergence"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bfloat16_computes_what_the_models_own_head_does(weights, operation):
    # float32 weights under autocast, and bfloat16 weights: as dense logits of the head in bfloat16, softmax in float32
    case = Case(5, dtype=torch.float32)
    hidden = case.hidden.detach().to(torch.bfloat16).requires_grad_()
    weight, bias = (values.detach().to(weights).requires_grad_() for values in (case.weight, case.bias))
    head = case.head._replace(weight=weight, bias=bias)
    given = (hidden, weight, bias)
    results = []
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        logits = torch.nn.functional.linear(hidden, weight, bias)[..., :SHARED].float()
        if operation == "candidates":
            received = candidate_log_probs(hidden, head, case.ids, case.mask).log_probs
            expected = logits.log_softmax(-1).gather(-1, case.ids)
            results = [(values * case.mask.unsqueeze(-1)).square().sum() for values in (received, expected)]
        else:
            received = divergence_from_hidden(
                hidden, head, case.teacher_hidden, case.teacher_head, case.weights, case.mask, beta=0.5
            ).loss
            teacher = torch.nn.functional.linear(case.teacher_hidden, case.teacher_head.weight)
            teacher = case.teacher_head.transform(teacher)[..., :SHARED].float()
            results = [received, generalized_jsd_loss(logits, teacher, case.weights, case.mask, beta=0.5)]
    assert results[0].dtype == torch.float32
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(result, given) for result in results)
    for gradient, dense, of in zip(ours, theirs, given, strict=True):
        assert gradient.dtype == of.dtype
        assert (gradient - dense).float().norm() <= 0.02 * dense.float().norm()


def test_float16_keeps_gradients_that_are_small_since_the_step_has_many_tokens():
    case = Case(5, dtype=torch.float32)
    given = [values.detach().half().requires_grad_() for values in case.given]
    teacher = (case.teacher_hidden.half(), case.teacher_head._replace(weight=case.teacher_head.weight.half()))
    gradients = []
    for token_count in (1.0, 2.0**20):  # a loss scaler multiplies in the backward pass
        head = case.head._replace(weight=given[1], bias=given[2])
        loss = divergence_from_hidden(given[0], head, *teacher, case.weights, case.mask, token_count=token_count).loss
        gradients.append(torch.autograd.grad(loss * token_count, given))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def small_model(**changes):
    torch.manual_seed(2)
    config = transformers.LlamaConfig(**{**COMMON, "vocab_size": 48, "pad_token_id": 0, **changes})
    return transformers.LlamaForCausalLM(config)


# peft 0.21 still asks Transformers for a property by its old name.
from_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.tensor([[5, 11, 3, 40, 22], [7, 7, 2, 30, 9]])
MASK = torch.tensor([[False, True, True, True, True], [False, False, True, True, False]])


def assert_gradients_of_all_parameters_are_those_of_dense_logits(model):
    parts = BackboneAndHead(model)
    head = parts.head_parameters()
    assert head is not None
    candidates = torch.arange(1, 4).expand(2, 5, 3)
    log_probs, _ = candidate_log_probs(parts.backbone(input_ids=IDS).last_hidden_state, head, candidates, MASK)
    parameters = [values for values in model.parameters() if values.requires_grad]
    dense = model(input_ids=IDS).logits.float().log_softmax(-1)[..., 1:4] * MASK.unsqueeze(-1)
    torch.testing.assert_close(log_probs, dense, rtol=1e-5, atol=1e-5)
    ours, theirs = (
        torch.autograd.grad(values.square().sum(), parameters, allow_unused=True) for values in (log_probs, dense)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_with_tied_embeddings_both_uses_add_up_in_the_shared_weight():
    model = small_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_gradients_of_all_parameters_are_those_of_dense_logits(model)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_models_own_head_with_its_bias_and_soft_cap(family):
    assert_gradients_of_all_parameters_are_those_of_dense_logits(tiny_model(family, 1))


@from_peft
@pytest.mark.parametrize(
    "where",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["frozen head", "adapted head", "trained copy of the head"],
)
def test_adapters_get_the_gradients_of_dense_logits(where):
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **where)
    model = peft.get_peft_model(small_model(), config)
    assert_gradients_of_all_parameters_are_those_of_dense_logits(model)


@from_peft
def test_a_head_that_is_more_than_a_linear_map_is_not_taken_for_one():
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5, task_type="CAUSAL_LM")
    model = peft.get_peft_model(small_model(), config)
    parts = BackboneAndHead(model)
    assert parts.head_parameters() is None  # dropout acts on the adapter's input
    model.eval()
    assert parts.head_parameters() is not None

    class Normalized(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden / hidden.norm(dim=-1, keepdim=True))

    plain = small_model()
    plain.set_output_embeddings(Normalized(32, 48, bias=False))
    assert BackboneAndHead(plain).head_parameters() is None


def test_the_gradient_of_a_divergence_can_be_taken_once_and_says_so():
    case = Case()
    loss = divergence_from_hidden(
        case.hidden, case.head, case.teacher_hidden, case.teacher_head, case.weights, case.mask
    ).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once: compute the loss again"):
        loss.backward()


def test_bad_inputs_are_refused_with_what_was_received():
    case = Case()
    teacher = (case.teacher_hidden, case.teacher_head, case.weights, case.mask)
    with pytest.raises(ConfigError, match=r"beta must lie in 0 \(forward KL\) to 1 \(reverse KL\), got 1.5"):
        divergence_from_hidden(case.hidden, case.head, *teacher, beta=1.5)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="temperature of a divergence must be positive and finite"):
            divergence_from_hidden(case.hidden, case.head, *teacher, temperature=temperature)
    with pytest.raises(InputError, match="the student's head counts 20 ids and the teacher's 26"):
        divergence_from_hidden(case.hidden, case.head._replace(vocab_size=20), *teacher)
    with pytest.raises(InputError, match="vocab_size must lie in 1 to 30, the student's rows; got 31"):
        candidate_log_probs(case.hidden, case.head._replace(vocab_size=31), case.ids, case.mask)
    with pytest.raises(InputError, match="the student's hidden states have 5 features and its head takes 6"):
        candidate_log_probs(case.teacher_hidden, case.head, case.ids, case.mask)
    with pytest.raises(ConfigError, match="at least one position of the student's 26 logits, got 25"):
        candidate_log_probs(case.hidden, case.head, case.ids, case.mask, max_logit_elements=25)
    for wrong in (-1, SHARED):
        ids = case.ids.clone()
        ids[case.mask] = wrong
        with pytest.raises(InputError, match=f"must lie in 0 to 25, the student's vocabulary; got {wrong}"):
            candidate_log_probs(case.hidden, case.head, ids, case.mask)


def test_whole_weights_are_passed_on_as_they_are():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    assert gathered(weight) is weight
