"""Policy gradients over several updates of one batch, and the sampled-token estimators against sums over the vocabulary."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd_hf.algorithm.losses import LOG_RATIO_LIMIT, sampled_token_loss, topk_policy_gradient_loss
from prune_opd_hf.algorithm.rewards import topk_rewards
from prune_opd_hf.errors import ConfigError

EXAMPLES = settings(max_examples=40)
ONE = torch.tensor([[True]])


def written_surrogate(log_p, old, reward, low=0.2, high=0.2, dual=3.0):
    """max(-r ratio, -r clip(ratio)), for r < 0 at most -dual r; scalar tensors, so that autograd goes through it."""
    ratio = torch.exp(log_p - old)
    clipped = ratio if 1 - low <= ratio <= 1 + high else torch.tensor(1 - low if ratio < 1 else 1 + high)
    value = -reward * ratio if -reward * ratio >= -reward * clipped else -reward * clipped
    return value if reward >= 0 or value <= -dual * reward else torch.as_tensor(-dual * reward)


@pytest.mark.parametrize("centered", [False, True])
@EXAMPLES
@given(batch=st.integers(1, 2), time=st.integers(1, 3), k=st.integers(1, 4), seed=st.integers(0, 9999))
def test_later_updates_of_one_batch_follow_the_written_surrogate(centered, batch, time, k, seed):
    # The student has moved since it generated: rewards and old log-probs are those of then.
    generator = torch.Generator().manual_seed(seed)
    old_logits = torch.randn(batch, time, 6, generator=generator)
    logits = (old_logits + 0.5 * torch.randn(batch, time, 6, generator=generator)).requires_grad_()
    log_q = torch.randn(batch, time, 6, generator=generator).log_softmax(-1)
    mask = torch.arange(time) < torch.randint(1, time + 1, (batch, 1), generator=generator)
    weights = torch.rand(batch, time, generator=generator) + 0.5
    old, ids = old_logits.log_softmax(-1).topk(k)
    rewards = topk_rewards(old, log_q.gather(-1, ids), mask, centered=centered) * weights.unsqueeze(-1)
    loss, _ = topk_policy_gradient_loss(logits.log_softmax(-1).gather(-1, ids), old, rewards, mask, token_count=9)

    double = logits.detach().double().requires_grad_()
    expected = 0 * double.sum()
    for row, column in mask.nonzero().tolist():
        log_p = double[row, column].log_softmax(-1)
        for j, token in enumerate(ids[row, column].tolist()):
            reward = float(rewards[row, column, j])
            expected = expected + written_surrogate(log_p[token], old[row, column, j].double(), reward) / 9
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-5)
    received, written = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, double)[0]
    torch.testing.assert_close(received.double(), written, atol=1e-6, rtol=1e-4)


def exact_reverse_kl(logits, log_q):
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def mean_over_samples(logits, log_q, loss_of_sample):
    """Value and gradient of a sampled loss, averaged exactly: each token weighed by its probability."""
    log_p = logits.log_softmax(-1)
    value, gradient = 0.0, torch.zeros_like(logits)
    for token, p in enumerate(log_p.detach().exp().tolist()):
        loss = loss_of_sample(log_p[token].reshape(1, 1), log_q[token].reshape(1, 1))
        value += p * float(loss.detach())
        gradient += p * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    return value, gradient


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@EXAMPLES
@given(seed=st.integers(0, 9999))
def test_the_mean_over_samples_is_the_reverse_kl_and_its_gradient(estimator, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, generator=generator, requires_grad=True)
    log_q = torch.randn(7, generator=generator).log_softmax(-1)
    expected = exact_reverse_kl(logits, log_q)
    value, gradient = mean_over_samples(
        logits,
        log_q,
        lambda p, q: sampled_token_loss(p, p.detach(), q, torch.ones(1, 1), ONE, estimator=estimator).loss,
    )
    assert value == pytest.approx(float(expected.detach()), abs=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], atol=1e-5, rtol=1e-4)


def test_the_estimators_differentiated_as_they_stand_would_learn_nothing_or_something_else():
    # Why sampled_token_loss does not: the traps that its docstring names.
    logits, log_q = torch.randn(7, requires_grad=True), torch.randn(7).log_softmax(-1)
    _, naive = mean_over_samples(logits, log_q, lambda p, q: (p - q).sum())
    torch.testing.assert_close(naive, torch.zeros(7), atol=1e-6, rtol=0)
    _, naive = mean_over_samples(logits, log_q, lambda p, q: ((q - p).exp() - 1 - (q - p)).sum())
    forward = (log_q.exp() * (log_q - logits.log_softmax(-1))).sum()
    torch.testing.assert_close(naive, torch.autograd.grad(forward, logits)[0], atol=1e-6, rtol=1e-4)


def test_sampled_token_losses_in_numbers():
    # p = .5, .2, .8 against q = .25, .4, .8: d = log 2, -log 2, 0; weights 1, .5, 1; the last position is padding.
    log_p = torch.tensor([[0.5, 0.2, 0.8, 0.1]]).log()
    log_q = torch.tensor([[0.25, 0.4, 0.8, 0.9]]).log()
    weights, mask = torch.tensor([[1.0, 0.5, 1.0, 7.0]]), torch.tensor([[True, True, True, False]])
    values = [
        float(sampled_token_loss(log_p, log_p, log_q, weights, mask, estimator=name).loss) for name in ("k1", "k3")
    ]
    assert values[0] == pytest.approx((math.log(2) - 0.5 * math.log(2)) / 3)
    assert values[1] == pytest.approx(((0.5 - 1 + math.log(2)) + 0.5 * (2 - 1 - math.log(2))) / 3)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@EXAMPLES
@given(seed=st.integers(0, 9999), time=st.integers(1, 4))
def test_later_updates_weigh_samples_by_the_ratio_within_the_clips(estimator, seed, time):
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(2, time, generator=generator) - 3
    log_p = (old + 0.5 * torch.randn(2, time, generator=generator)).requires_grad_()
    log_q, weights = torch.randn(2, time, generator=generator) - 3, torch.rand(2, time, generator=generator)
    mask = torch.arange(time) < torch.randint(0, time + 1, (2, 1), generator=generator)
    loss, _ = sampled_token_loss(log_p, old, log_q, weights, mask, estimator=estimator, token_count=5)
    value, gradient = 0.0, torch.zeros(2, time)
    for at in map(tuple, mask.nonzero().tolist()):
        d = float((old if estimator == "k1" else log_p.detach())[at] - log_q[at])
        moving = log_p.detach()[at].requires_grad_()
        surrogate = written_surrogate(moving, old[at], -float(weights[at]) * d)
        if surrogate.requires_grad:
            gradient[at] = torch.autograd.grad(surrogate, moving)[0] / 5
        k3 = float(weights[at]) * math.exp(float(log_p.detach()[at] - old[at])) * (math.exp(-d) - 1 + d)
        value += (float(surrogate.detach()) if estimator == "k1" else k3) / 5
    assert float(loss.detach()) == pytest.approx(value, abs=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, log_p)[0], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_a_sampled_token_that_the_teacher_rules_out_is_pushed_down_with_finite_force(estimator):
    log_p = torch.tensor([[-1.0]], requires_grad=True)
    loss, clip_share = sampled_token_loss(
        log_p, log_p.detach(), torch.tensor([[-math.inf]]), torch.ones(1, 1), ONE, estimator=estimator
    )
    assert loss.isfinite()
    assert float(torch.autograd.grad(loss, log_p)[0]) == pytest.approx(LOG_RATIO_LIMIT)
    assert clip_share == 0


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_nothing_on_padding_reaches_value_or_gradient(rubbish, estimator):
    mask = torch.tensor([[True, True, False], [False, False, False]])
    generator = torch.Generator().manual_seed(3)
    clean = [torch.randn(2, 3, generator=generator) - 2 for _ in range(3)] + [torch.rand(2, 3, generator=generator)]
    dirty = [values.masked_fill(~mask, rubbish) for values in clean]

    def all_of(log_p, old, log_q, weights):
        log_p = log_p.clone().requires_grad_()
        loss, clip_share = sampled_token_loss(log_p, old, log_q, weights, mask, estimator=estimator)
        return [loss.detach(), clip_share, torch.autograd.grad(loss, log_p)[0]]

    torch.testing.assert_close(all_of(*dirty), all_of(*clean), rtol=0, atol=0)


def test_bfloat16_inputs_are_worked_on_in_float32():
    log_p, old, log_q = (torch.randn(3, 1, 2) - 3).bfloat16()
    mask = torch.ones(1, 2, dtype=torch.bool)
    for estimator in ("k1", "k3"):
        loss, _ = sampled_token_loss(log_p, old, log_q, torch.ones(1, 2), mask, estimator=estimator)
        assert loss.dtype == torch.float32
        wide, _ = sampled_token_loss(
            log_p.float(), old.float(), log_q.float(), torch.ones(1, 2), mask, estimator=estimator
        )
        torch.testing.assert_close(loss, wide)


def test_unknown_estimators_are_refused():
    log_p = torch.zeros(1, 1)
    with pytest.raises(ConfigError, match="estimator must be one of k1, k3, got 'k2'"):
        sampled_token_loss(log_p, log_p, log_p, torch.ones(1, 1), ONE, estimator="k2")
