"""Losses: their gradients against the formulas in loops, the clips case by case, and what padding may do to them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd_hf.algorithm.losses import LOG_RATIO_LIMIT, reverse_kl_loss, token_mean, topk_policy_gradient_loss
from prune_opd_hf.algorithm.rewards import topk_rewards, weight_rewards

EXAMPLES = settings(max_examples=25)
ONE = torch.tensor([[True]])


def gradient_by_loop(logits, log_q, ids, weights, mask, *, centered):
    """Contract 5: mean over tokens of Σ_j L p~_j c_j ∇ log p_j, c_j = log(p_j/q_j) or that minus its p~-weighted mean.

    By hand ∂ log p_j / ∂ z_v = [j = v] - p_v for p = softmax(z).
    """
    batch, time, vocab = logits.shape
    gradient = torch.zeros(batch, time, vocab, dtype=torch.float64)
    tokens = int(mask.sum())
    for row in range(batch):
        for column in range(time):
            if not mask[row, column]:
                continue
            scores = [math.exp(value) for value in logits[row, column].tolist()]
            p = [score / sum(scores) for score in scores]
            candidates = ids[row, column].tolist()
            inside = sum(p[j] for j in candidates)
            ratio = {j: math.log(p[j]) - float(log_q[row, column, j]) for j in candidates}
            mean = sum(p[j] / inside * ratio[j] for j in candidates) if centered else 0.0
            for j in candidates:
                push = float(weights[row, column]) * p[j] / inside * (ratio[j] - mean) / tokens
                for v in range(vocab):
                    gradient[row, column, v] += push * ((j == v) - p[v])
    return gradient


@pytest.mark.parametrize("centered", [False, True])
@EXAMPLES
@given(batch=st.integers(1, 2), time=st.integers(1, 3), k=st.integers(1, 5), seed=st.integers(0, 9999))
def test_gradient_of_the_topk_loss_is_that_of_contract_5(centered, batch, time, k, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(batch, time, 6, generator=generator)).requires_grad_()
    log_q = (2 * torch.randn(batch, time, 6, generator=generator)).log_softmax(-1)
    mask = torch.arange(time) < torch.randint(1, time + 1, (batch, 1), generator=generator)
    reliability = torch.rand(batch, time, generator=generator)
    log_p = logits.log_softmax(-1)
    ids = log_p.topk(k).indices
    candidates = log_p.gather(-1, ids)
    rewards = topk_rewards(candidates, log_q.gather(-1, ids), mask, centered=centered)
    rewards = weight_rewards(rewards, reliability, mask, weight_base=0.5)
    loss, clip_share = topk_policy_gradient_loss(candidates, candidates.detach(), rewards, mask)
    loss.backward()
    expected = gradient_by_loop(logits.detach(), log_q, ids, reliability + 0.5, mask, centered=centered)
    torch.testing.assert_close(logits.grad.double(), expected, atol=2e-6, rtol=1e-5)
    assert clip_share == 0


@pytest.mark.parametrize("centered", [False, True])
def test_reverse_kl_has_the_gradient_of_the_topk_loss_with_the_whole_vocabulary(centered):
    logits = torch.randn(2, 4, 9, requires_grad=True)
    teacher_logits, weights = torch.randn(2, 4, 9), torch.rand(2, 4) + 0.5
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    rewards = topk_rewards(log_p, log_q, mask, centered=centered) * weights.unsqueeze(-1)
    policy_gradient = topk_policy_gradient_loss(log_p, log_p.detach(), rewards, mask).loss
    divergence = reverse_kl_loss(logits, teacher_logits, weights, mask)
    expected = torch.autograd.grad(policy_gradient, logits)[0]
    torch.testing.assert_close(torch.autograd.grad(divergence, logits)[0], expected, atol=1e-6, rtol=1e-5)


def test_reverse_kl_equals_a_loop():
    logits, teacher_logits, weights = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.rand(2, 3)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    total = 0.0
    for row, column in mask.nonzero().tolist():
        p, q = (torch.softmax(scores[row, column], 0).tolist() for scores in (logits, teacher_logits))
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total += float(weights[row, column]) * kl
    assert float(reverse_kl_loss(logits, teacher_logits, weights, mask)) == pytest.approx(total / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("reward", "ratio", "loss", "flows"),
    [
        # good candidate (reward 2): -2 * ratio, but no more is gained above 1.2
        (2.0, 0.5, -1.0, True),
        (2.0, 1.0, -2.0, True),
        (2.0, 1.1, -2.2, True),
        (2.0, 1.5, -2.4, False),
        # bad candidate (reward -2): 2 * ratio, no more is gained below .8, and at most 3 times 2 is lost
        (-2.0, 0.5, 1.6, False),
        (-2.0, 0.9, 1.8, True),
        (-2.0, 1.0, 2.0, True),
        (-2.0, 2.9, 5.8, True),
        (-2.0, 3.5, 6.0, False),
        (0.0, 5.0, 0.0, False),
    ],
)
def test_clips_on_each_side(reward, ratio, loss, flows):
    old = torch.tensor([[[-4.0]]])
    log_p = (old + math.log(ratio)).requires_grad_()
    received, clip_share = topk_policy_gradient_loss(log_p, old, torch.tensor([[[reward]]]), ONE)
    received.backward()
    assert float(received.detach()) == pytest.approx(loss, abs=1e-5)
    assert float(log_p.grad) == pytest.approx(-reward * ratio if flows else 0.0, abs=1e-5)
    assert float(clip_share) == float(reward != 0 and not flows)


def test_the_clips_are_where_they_were_asked_for():
    old, rewards = torch.zeros(1, 1, 3), torch.tensor([[[1.0, -1.0, -1.0]]])
    log_p = torch.tensor([[[math.log(1.5), math.log(0.5), math.log(9)]]])
    loss, _ = topk_policy_gradient_loss(log_p, old, rewards, ONE, clip_low=0.4, clip_high=0.3, dual_clip=5)
    assert float(loss) == pytest.approx(-1.3 + 0.6 + 5)


def test_ratios_are_bounded_before_they_are_exponentiated():
    old, rewards = torch.tensor([[[-200.0, 0.0]]]), torch.tensor([[[-1.0, 1.0]]])
    log_p = torch.tensor([[[0.0, -200.0]]], requires_grad=True)
    loss, _ = topk_policy_gradient_loss(log_p, old, rewards, ONE, dual_clip=math.inf)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.exp(LOG_RATIO_LIMIT), rel=1e-5)
    assert log_p.grad.isfinite().all()


def test_a_candidate_that_cannot_be_sampled_neither_counts_nor_poisons_the_gradient():
    logits = torch.tensor([[[1.0, 0.5, -math.inf, 0.0]]], requires_grad=True)
    log_p = logits.log_softmax(-1)[..., :3]
    rewards = topk_rewards(log_p, torch.tensor([[[-1.0, -1.5, -2.0]]]), ONE, centered=True)
    loss, _ = topk_policy_gradient_loss(log_p, log_p.detach(), rewards, ONE)
    divergence = reverse_kl_loss(logits, torch.zeros(1, 1, 4), torch.ones(1, 1), ONE)
    (loss + divergence).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0, 2] == 0
    p = torch.softmax(torch.tensor([1.0, 0.5, 0.0]), 0).tolist()
    assert float(divergence.detach()) == pytest.approx(sum(a * math.log(a / 0.25) for a in p), abs=1e-6)


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 1e30])
def test_nothing_on_padding_reaches_value_or_gradient(rubbish):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    generator = torch.Generator().manual_seed(3)
    clean = [torch.randn(2, 3, 4, generator=generator) for _ in range(3)] + [torch.rand(2, 3, generator=generator)]
    dirty = [values.clone() for values in clean]
    for values in dirty:
        values[~mask] = rubbish

    def value_and_gradients(log_p, log_q, rewards, weights):
        log_p = log_p.clone().requires_grad_()
        policy_gradient = topk_policy_gradient_loss(log_p, log_q, rewards, mask)
        losses = [policy_gradient.loss, reverse_kl_loss(log_p, log_q, weights, mask)]
        gradients = [torch.autograd.grad(loss, log_p)[0] for loss in losses]
        assert not any(gradient[~mask].any() for gradient in gradients)
        return [*(loss.detach() for loss in losses), policy_gradient.clip_share, *gradients]

    torch.testing.assert_close(value_and_gradients(*dirty), value_and_gradients(*clean), rtol=0, atol=0)


@EXAMPLES
@given(st.lists(st.integers(0, 4), min_size=2, max_size=6).filter(any), st.integers(1, 5))
def test_micro_batches_add_up_to_the_batch(lengths, cut):
    mask = torch.arange(4) < torch.tensor(lengths).unsqueeze(-1)
    batch = len(lengths)
    log_p, old, rewards = torch.randn(3, batch, 4, 5)
    teacher_logits, weights = torch.randn(batch, 4, 5), torch.rand(batch, 4)

    def losses(rows, token_count):
        first = topk_policy_gradient_loss(log_p[rows], old[rows], rewards[rows], mask[rows], token_count=token_count)
        second = reverse_kl_loss(log_p[rows], teacher_logits[rows], weights[rows], mask[rows], token_count=token_count)
        return torch.stack([first.loss, second])

    parts = [losses(slice(begin, begin + cut), mask.sum()) for begin in range(0, batch, cut)]
    torch.testing.assert_close(sum(parts), losses(slice(None), None))


def test_a_micro_batch_without_tokens_has_a_loss_of_zero_that_can_be_differentiated():
    log_p, nothing = torch.randn(1, 2, 3, requires_grad=True), torch.zeros(1, 2, dtype=torch.bool)
    loss, clip_share = topk_policy_gradient_loss(log_p, log_p.detach(), torch.ones(1, 2, 3), nothing)
    loss = loss + reverse_kl_loss(log_p, torch.zeros(1, 2, 3), torch.ones(1, 2), nothing)
    loss.backward()
    assert (float(loss.detach()), float(clip_share), float(log_p.grad.abs().max())) == (0.0, 0.0, 0.0)
    assert float(token_mean(torch.ones(1, 2), nothing)) == 0


def entropy_and_topk_mass_after_training(centered, seed, *, k=4, vocab=64, updates=60):
    """Eight positions, each a free softmax over 64 tokens, trained towards a teacher on their own 4 likeliest tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(1, 8, vocab, generator=generator)).requires_grad_()
    log_q = (2 * torch.randn(1, 8, vocab, generator=generator)).log_softmax(-1)
    mask = torch.ones(1, 8, dtype=torch.bool)
    history = []
    for _ in range(updates):
        log_p = logits.log_softmax(-1)
        candidates, ids = log_p.topk(k)
        p = log_p.detach().exp()
        history.append((float(-(p * p.log()).sum(-1).mean()), float(candidates.detach().exp().sum(-1).mean())))
        rewards = topk_rewards(candidates, log_q.gather(-1, ids), mask, centered=centered)
        loss, _ = topk_policy_gradient_loss(candidates, candidates.detach(), rewards, mask, token_count=1.0)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits.detach() - 0.5 * gradient).requires_grad_()
    return history[0], history[-1]


@pytest.mark.parametrize("seed", range(3))
def test_the_literal_reward_with_few_candidates_leaks_mass_out_of_them_and_the_centred_one_does_not(seed):
    (entropy_before, mass_before), (entropy, mass) = entropy_and_topk_mass_after_training(False, seed)
    assert entropy > entropy_before + 0.3
    assert mass < 0.75 * mass_before
    _, (centred_entropy, centred_mass) = entropy_and_topk_mass_after_training(True, seed)
    assert centred_entropy < entropy - 0.5
    assert centred_mass > 0.95 * mass_before
