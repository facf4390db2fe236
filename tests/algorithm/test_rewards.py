"""Rewards of the candidates against loops over the formulas, and candidate sets against Python's sets."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd_hf.algorithm.rewards import candidate_weights, choose_candidates, topk_rewards, weight_rewards
from prune_opd_hf.errors import ConfigError

EXAMPLES = settings(max_examples=50)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10_000))


def random_case(batch, time, k, seed, vocab=12):
    """log p and log q of k distinct candidates out of a vocabulary of 12, and a mask with padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (2 * torch.randn(2, batch, time, vocab, generator=generator)).log_softmax(-1)
    ids = torch.rand(batch, time, vocab, generator=generator).argsort(-1)[..., :k]
    lengths = torch.randint(0, time + 1, (batch, 1), generator=generator)
    return p.gather(-1, ids), q.gather(-1, ids), torch.arange(time) < lengths


def reward_by_loop(log_p, log_q, inside, weighting, centered):
    """-w_j (log p_j - log q_j) at one position, with lists and the names of the formula."""
    if weighting == "student":
        mass = [math.exp(value) for value in log_p]
    elif weighting == "teacher":
        mass = [math.exp(value) for value in log_q]
    else:
        mass = [1.0] * len(log_p)
    total = sum(m for m, counts in zip(mass, inside, strict=True) if counts)
    weights = [m / total if counts else 0.0 for m, counts in zip(mass, inside, strict=True)]
    ratios = [a - b for a, b in zip(log_p, log_q, strict=True)]
    mean = sum(w * ratio for w, ratio in zip(weights, ratios, strict=True)) if centered else 0.0
    return [-w * (ratio - mean) for w, ratio in zip(weights, ratios, strict=True)]


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("weighting", ["student", "teacher", "uniform"])
@EXAMPLES
@given(shape=SHAPES)
def test_rewards_equal_the_formula_position_by_position(weighting, centered, shape):
    log_p, log_q, mask = random_case(*shape)
    support = torch.rand(log_p.shape, generator=torch.Generator().manual_seed(shape[-1])) < 0.7
    received = topk_rewards(log_p, log_q, mask, support=support, weighting=weighting, centered=centered)
    for row, column in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        inside = [bool(flag) and bool(mask[row, column]) for flag in support[row, column]]
        expected = (
            reward_by_loop(log_p[row, column].tolist(), log_q[row, column].tolist(), inside, weighting, centered)
            if any(inside)
            else [0.0] * len(inside)
        )
        assert received[row, column].tolist() == pytest.approx(expected, abs=2e-6)


def test_the_literal_reward_in_numbers():
    # p~ = (.75, .25), log-ratios log 2 and -log 2, L = .4 + .5
    log_p, log_q = torch.tensor([[[0.6, 0.2]]]).log(), torch.tensor([[[0.3, 0.4]]]).log()
    mask = torch.tensor([[True]])
    rewards = weight_rewards(topk_rewards(log_p, log_q, mask), torch.tensor([[0.4]]), mask, weight_base=0.5)
    assert rewards[0, 0].tolist() == pytest.approx([-0.9 * 0.75 * math.log(2), 0.9 * 0.25 * math.log(2)])


@EXAMPLES
@given(SHAPES, st.sampled_from(["student", "teacher", "uniform"]))
def test_weights_sum_to_one_over_the_support_and_are_zero_outside_it(shape, weighting):
    log_p, log_q, mask = random_case(*shape)
    support = torch.arange(log_p.shape[-1]) < torch.randint(0, 6, (*mask.shape, 1))
    weights = candidate_weights(log_p, log_q, support, weighting)
    assert not weights[~support].any()
    torch.testing.assert_close(weights.sum(-1), support.any(-1).float())


@EXAMPLES
@given(SHAPES, st.sampled_from(["student", "teacher", "uniform"]))
def test_centred_rewards_of_a_position_sum_to_zero(shape, weighting):
    log_p, log_q, mask = random_case(*shape)
    rewards = topk_rewards(log_p, log_q, mask, weighting=weighting, centered=True)
    torch.testing.assert_close(rewards.sum(-1), torch.zeros(mask.shape), atol=2e-6, rtol=0)


def test_centring_leaves_the_gradient_over_the_full_vocabulary_unchanged():
    # Σ_v p_v ∇ log p_v = 0, so a constant taken off every log-ratio is lost: only on a true subset does it matter.
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    log_q, mask = torch.randn(2, 3, 7).log_softmax(-1), torch.ones(2, 3, dtype=torch.bool)

    def gradient(k, centered):
        log_p = logits.log_softmax(-1)[..., :k]
        rewards = topk_rewards(log_p, log_q[..., :k], mask, centered=centered)
        return torch.autograd.grad((rewards.double() * log_p).sum(), logits)[0]

    torch.testing.assert_close(gradient(7, True), gradient(7, False), atol=1e-6, rtol=0)
    assert (gradient(6, True) - gradient(6, False)).abs().max() > 1e-3


@EXAMPLES
@given(st.permutations(range(9)), st.permutations(range(9)), st.integers(1, 6))
def test_candidates_of_every_support_are_those_of_the_sets(student, teacher, k):
    student, teacher = student[:k], teacher[:k]
    log_q = [-0.1 * (token + 1) for token in range(9)]  # tells which token a value belongs to
    arguments = [
        torch.tensor([[values]])
        for values in (student, [log_q[token] for token in student], teacher, [log_q[token] for token in teacher])
    ]
    expected = {
        "student": set(student),
        "teacher": set(teacher),
        "intersection": set(student) & set(teacher),
        "union": set(student) | set(teacher),
    }
    for name, tokens in expected.items():
        chosen = choose_candidates(*arguments, support=name)
        columns = chosen.support[0, 0]
        received = chosen.ids[0, 0][columns].tolist()
        assert set(received) == tokens
        assert len(received) == len(tokens), f"{name} counts a token twice"
        torch.testing.assert_close(chosen.teacher_log_probs[0, 0][columns], torch.tensor([log_q[t] for t in received]))


def test_disjoint_sets_have_an_empty_intersection_and_then_no_reward():
    ids, others = torch.tensor([[[1, 2]]]), torch.tensor([[[3, 4]]])
    log_q = torch.tensor([[[0.5, 0.3]]]).log()
    chosen = choose_candidates(ids, log_q, others, log_q, "intersection")
    for centered in (False, True):
        rewards = topk_rewards(log_q - 1, log_q, torch.tensor([[True]]), support=chosen.support, centered=centered)
        assert rewards.tolist() == [[[0.0, 0.0]]]


@pytest.mark.parametrize("impossible_for", ["student", "teacher", "both"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("weighting", ["student", "teacher", "uniform"])
def test_an_impossible_candidate_takes_no_part(weighting, centered, impossible_for):
    # Constrained decoding: log p = -inf. The others are rewarded as if it were not there.
    log_p, log_q = torch.tensor([[[0.5, 0.3, 0.1]]]).log(), torch.tensor([[[0.2, 0.4, 0.3]]]).log()
    mask, kind = torch.tensor([[True]]), {"weighting": weighting, "centered": centered}
    expected = topk_rewards(log_p[..., :2], log_q[..., :2], mask, **kind)
    if impossible_for in ("student", "both"):
        log_p[..., 2] = -math.inf
    if impossible_for in ("teacher", "both"):
        log_q[..., 2] = -math.inf
    received = topk_rewards(log_p, log_q, mask, **kind)
    assert received[0, 0].tolist() == [*expected[0, 0].tolist(), 0.0]


def test_rewards_carry_no_gradient_and_are_float32_for_any_input():
    log_p = torch.randn(1, 2, 3, dtype=torch.bfloat16, requires_grad=True).log_softmax(-1)
    rewards = topk_rewards(log_p, log_p.detach() - 1, torch.ones(1, 2, dtype=torch.bool), centered=True)
    assert not rewards.requires_grad
    assert rewards.dtype == torch.float32


def test_nan_on_padding_gives_a_reward_of_zero():
    log_p = torch.tensor([[[-1.0, -2.0], [math.nan, math.nan]]])
    mask = torch.tensor([[True, False]])
    for centered in (False, True):
        rewards = topk_rewards(log_p, log_p - 1, mask, centered=centered)
        assert rewards.isfinite().all()
        assert not rewards[0, 1].any()


def test_nan_on_a_response_token_is_not_hidden():
    log_p = torch.tensor([[[-1.0, math.nan]]])
    assert topk_rewards(log_p, torch.tensor([[[-1.0, -2.0]]]), torch.tensor([[True]])).isnan().any()


def test_unknown_words_are_refused():
    log_p, mask = torch.zeros(1, 1, 2), torch.tensor([[True]])
    with pytest.raises(ConfigError, match="weighting must be one of student, teacher, uniform, got 'Student'"):
        topk_rewards(log_p, log_p, mask, weighting="Student")
    ids = torch.zeros(1, 1, 2, dtype=torch.long)
    with pytest.raises(ConfigError, match="support must be one of student, teacher, intersection, union, got 'both'"):
        choose_candidates(ids, log_p, ids, log_p, "both")
