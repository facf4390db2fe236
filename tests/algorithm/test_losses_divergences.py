"""Divergences on candidates and over the vocabulary: against loops, against autograd of the written formula, and at the edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd_hf.algorithm.losses import generalized_jsd_loss, reverse_kl_loss, topk_kl_loss
from prune_opd_hf.algorithm.losses.divergences import SMALLEST_TAIL
from prune_opd_hf.algorithm.rewards import SUPPORTS, choose_candidates
from prune_opd_hf.errors import ConfigError

EXAMPLES = settings(max_examples=25)
ONE = torch.tensor([[True]])


def written_topk_kl(p, q, support, direction, tail):
    """The formula at one position, in probabilities: lists of scalar tensors in float64, so that autograd goes through it."""
    inside = [j for j, counts in enumerate(support) if counts and p[j] > 0 and q[j] > 0]
    if not inside:
        return torch.zeros((), dtype=torch.float64)
    ps, qs = [p[j] for j in inside], [q[j] for j in inside]
    if tail == "renormalize":
        ps, qs = [value / sum(ps) for value in ps], [value / sum(qs) for value in qs]
    else:
        ps, qs = [*ps, 1 - sum(ps)], [*qs, 1 - sum(qs)]
    if direction == "forward":
        return sum(b * torch.log(b / a) for a, b in zip(ps, qs, strict=True))
    return sum(a * torch.log(a / b) for a, b in zip(ps, qs, strict=True))


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@EXAMPLES
@given(
    batch=st.integers(1, 2),
    time=st.integers(1, 3),
    k=st.integers(1, 5),
    seed=st.integers(0, 9999),
    impossible=st.booleans(),
)
def test_topk_kl_and_its_gradient_equal_the_written_formula(direction, tail, batch, time, k, seed, impossible):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, time, 9, generator=generator)
    teacher_logits = torch.randn(batch, time, 9, generator=generator)
    if impossible:
        logits[..., 1], teacher_logits[..., 2] = -math.inf, -math.inf
    logits.requires_grad_()
    ids = torch.rand(batch, time, 9, generator=generator).argsort(-1)[..., :k]
    support = torch.rand(batch, time, k, generator=generator) < 0.7
    mask = torch.arange(time) < torch.randint(0, time + 1, (batch, 1), generator=generator)
    weights = torch.rand(batch, time, generator=generator) + 0.5
    log_p, log_q = logits.log_softmax(-1).gather(-1, ids), teacher_logits.log_softmax(-1).gather(-1, ids)
    loss = topk_kl_loss(log_p, log_q, weights, mask, direction=direction, tail=tail, support=support, token_count=7)
    (gradient,) = torch.autograd.grad(loss, logits)

    double = logits.detach().double().requires_grad_()
    expected = (0 * double.nan_to_num(neginf=0.0)).sum()
    for row, column in mask.nonzero().tolist():
        p = double[row, column].softmax(-1)[ids[row, column]]
        q = teacher_logits[row, column].double().softmax(-1)[ids[row, column]]
        part = written_topk_kl(list(p), list(q), support[row, column].tolist(), direction, tail)
        expected = expected + weights[row, column].double() * part / 7
    torch.testing.assert_close(loss.double(), expected, atol=2e-6, rtol=1e-5)
    written = torch.autograd.grad(expected, double)[0].nan_to_num()
    torch.testing.assert_close(gradient.double().nan_to_num(), written, atol=5e-6, rtol=1e-4)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_every_support_gives_the_kl_over_its_set(support, tail):
    generator = torch.Generator().manual_seed(2)
    p, q = torch.randn(2, 1, 1, 9, generator=generator).softmax(-1)
    s, t = p.topk(3).indices, q.topk(3).indices
    chosen = choose_candidates(s, q.log().gather(-1, s), t, q.log().gather(-1, t), support)
    loss = topk_kl_loss(
        p.log().gather(-1, chosen.ids),
        chosen.teacher_log_probs,
        torch.ones(1, 1),
        ONE,
        support=chosen.support,
        tail=tail,
    )
    sets = {"student": set(s.flatten().tolist()), "teacher": set(t.flatten().tolist())}
    sets |= {"intersection": sets["student"] & sets["teacher"], "union": sets["student"] | sets["teacher"]}
    assert 0 < len(sets["intersection"]) < 3
    inside = sorted(sets[support])
    expected = written_topk_kl(list(p[0, 0, inside]), list(q[0, 0, inside]), [True] * len(inside), "reverse", tail)
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)


@EXAMPLES
@given(seed=st.integers(0, 9999), k=st.integers(1, 8))
def test_with_a_tail_bucket_the_topk_kl_is_at_most_the_full_one_and_grows_with_k(seed, k):
    p, q = torch.randn(2, 1, 3, 9, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    weights, mask = torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)
    parts = [topk_kl_loss(p[..., :few], q[..., :few], weights, mask, tail="bucket") for few in (k, k + 1)]
    full = reverse_kl_loss(p, q, weights, mask)
    assert 0 <= parts[0] <= parts[1] + 1e-6
    assert parts[1] <= full + 1e-5


def test_the_whole_vocabulary_as_candidates_gives_the_full_kl():
    p, q = torch.randn(2, 2, 3, 9).log_softmax(-1)
    weights, mask = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for beta, direction in [(0, "forward"), (1, "reverse")]:
        full = generalized_jsd_loss(p, q, weights, mask, beta=beta)
        torch.testing.assert_close(topk_kl_loss(p, q, weights, mask, direction=direction), full)


def test_a_tail_below_what_float32_can_tell_stays_finite():
    # All mass on two candidates, to the last bit: the tail counts as SMALLEST_TAIL for both, and says nothing.
    log_p = torch.tensor([[[0.5, 0.5]]]).log().requires_grad_()
    log_q = torch.tensor([[[0.25, 0.75]]]).log()
    for direction, expected in [("reverse", 0.1438), ("forward", 0.1308)]:
        loss = topk_kl_loss(log_p, log_q, torch.ones(1, 1), ONE, direction=direction, tail="bucket")
        assert float(loss.detach()) == pytest.approx(expected, abs=1e-4)
        assert torch.autograd.grad(loss, log_p)[0].isfinite().all()
    wide = torch.tensor([[[0.2, 0.3]]]).log()  # the teacher holds half of its mass outside
    loss = topk_kl_loss(log_p, wide, torch.ones(1, 1), ONE, tail="bucket")
    tail = SMALLEST_TAIL * math.log(SMALLEST_TAIL / 0.5)
    assert float(loss.detach()) == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.3) + tail, abs=1e-5)


def test_mass_leaks_out_of_the_set_under_neither_form():
    # Eight free positions of 64 tokens on their own 4 likeliest, as in the leak of the literal reward (test_losses).
    for tail in ("renormalize", "bucket"):
        generator = torch.Generator().manual_seed(0)
        logits = (2 * torch.randn(1, 8, 64, generator=generator)).requires_grad_()
        log_q = (2 * torch.randn(1, 8, 64, generator=generator)).log_softmax(-1)
        mask, inside = torch.ones(1, 8, dtype=torch.bool), []
        for _ in range(60):
            log_p, ids = logits.log_softmax(-1).topk(4)
            inside.append(
                (float(log_p.detach().exp().sum(-1).mean()), float(log_q.gather(-1, ids).exp().sum(-1).mean()))
            )
            loss = topk_kl_loss(log_p, log_q.gather(-1, ids), torch.ones(1, 8), mask, tail=tail, token_count=1.0)
            logits = (logits.detach() - 0.5 * torch.autograd.grad(loss, logits)[0]).requires_grad_()
        if tail == "renormalize":
            assert inside[-1][0] > 0.95 * inside[0][0]
        else:  # the mass of the set is drawn to the teacher's instead
            assert abs(inside[-1][0] - inside[-1][1]) < 0.5 * abs(inside[0][0] - inside[0][1])


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@EXAMPLES
@given(seed=st.integers(0, 9999), temperature=st.sampled_from([1.0, 0.5, 2.0]), time=st.integers(1, 3))
def test_generalized_jsd_and_its_gradient_equal_the_written_formula(beta, seed, temperature, time):
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(2, time, 7, generator=generator)).requires_grad_()
    teacher_logits = 2 * torch.randn(2, time, 7, generator=generator)
    weights = torch.rand(2, time, generator=generator)
    mask = torch.arange(time) < torch.randint(0, time + 1, (2, 1), generator=generator)
    loss = generalized_jsd_loss(
        logits, teacher_logits, weights, mask, beta=beta, temperature=temperature, token_count=5
    )
    double = logits.detach().double().requires_grad_()
    expected = 0 * double.sum()
    for row, column in mask.nonzero().tolist():
        p = (double[row, column] / temperature).softmax(-1)
        q = (teacher_logits[row, column].double() / temperature).softmax(-1)
        m = (1 - beta) * p + beta * q
        part = {0.0: (q * (q / p).log()).sum(), 1.0: (p * (p / q).log()).sum()}.get(
            beta, beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()
        )
        expected = expected + weights[row, column].double() * part / 5
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-5)
    received, written = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, double)[0]
    torch.testing.assert_close(received.double(), written, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_a_token_impossible_for_both_counts_for_nothing_in_the_full_divergence(beta):
    logits = torch.tensor([[[1.0, 0.5, -math.inf, 0.0]]], requires_grad=True)
    teacher_logits = torch.tensor([[[0.0, 1.0, -math.inf, 2.0]]])
    weights, possible = torch.ones(1, 1), [0, 1, 3]
    loss = generalized_jsd_loss(logits, teacher_logits, weights, ONE, beta=beta)
    (gradient,) = torch.autograd.grad(loss, logits)
    without = logits.detach()[..., possible].requires_grad_()
    expected = generalized_jsd_loss(without, teacher_logits[..., possible], weights, ONE, beta=beta)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[..., possible], torch.autograd.grad(expected, without)[0])
    assert gradient[0, 0, 2] == 0


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_nothing_on_padding_reaches_value_or_gradient(rubbish):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    generator = torch.Generator().manual_seed(3)
    clean = [torch.randn(2, 3, 4, generator=generator) - 3 for _ in range(2)] + [torch.rand(2, 3, generator=generator)]
    dirty = [values.clone() for values in clean]
    for values in dirty:
        values[~mask] = rubbish

    def all_of(student, teacher, weights):
        student = student.clone().requires_grad_()
        losses = [
            topk_kl_loss(student, teacher, weights, mask, direction=direction, tail=tail)
            for direction in ("reverse", "forward")
            for tail in ("renormalize", "bucket")
        ]
        losses += [generalized_jsd_loss(student, teacher, weights, mask, beta=beta) for beta in (0, 0.5, 1)]
        return [*(loss.detach() for loss in losses), *(torch.autograd.grad(loss, student)[0] for loss in losses)]

    torch.testing.assert_close(all_of(*dirty), all_of(*clean), rtol=0, atol=0)


def test_bfloat16_inputs_are_worked_on_in_float32():
    p, q = torch.randn(2, 1, 2, 5).log_softmax(-1).bfloat16()
    weights, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for loss in (topk_kl_loss, generalized_jsd_loss):
        received = loss(p, q, weights, mask)
        assert received.dtype == torch.float32
        assert torch.equal(received, loss(p.float(), q.float(), weights, mask))


@EXAMPLES
@given(st.lists(st.integers(0, 4), min_size=2, max_size=5).filter(any), st.integers(1, 4))
def test_micro_batches_add_up_to_the_batch(lengths, cut):
    mask = torch.arange(4) < torch.tensor(lengths).unsqueeze(-1)
    p, q = torch.randn(2, len(lengths), 4, 5).log_softmax(-1)
    weights = torch.rand(len(lengths), 4)

    def losses(rows, token_count):
        given = p[rows], q[rows], weights[rows], mask[rows]
        first = topk_kl_loss(*given, token_count=token_count)
        return torch.stack([first, generalized_jsd_loss(*given, beta=0.5, token_count=token_count)])

    parts = [losses(slice(begin, begin + cut), mask.sum()) for begin in range(0, len(lengths), cut)]
    torch.testing.assert_close(sum(parts), losses(slice(None), None))


def test_unknown_words_and_settings_are_refused():
    log_p, weights = torch.zeros(1, 1, 2), torch.ones(1, 1)
    with pytest.raises(ConfigError, match="direction must be one of reverse, forward, got 'both'"):
        topk_kl_loss(log_p, log_p, weights, ONE, direction="both")
    with pytest.raises(ConfigError, match="tail must be one of renormalize, bucket, got 'cut'"):
        topk_kl_loss(log_p, log_p, weights, ONE, tail="cut")
    with pytest.raises(ConfigError, match="beta must lie in"):
        generalized_jsd_loss(log_p, log_p, weights, ONE, beta=-0.1)
    with pytest.raises(ConfigError, match="temperature"):
        generalized_jsd_loss(log_p, log_p, weights, ONE, temperature=0)
