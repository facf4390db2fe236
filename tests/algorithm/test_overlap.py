"""Overlap, nucleus and shared mass against sets, an explicit prefix loop, and sums over the whole vocabulary."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd_hf.algorithm.overlap import (
    mass_overlap,
    nucleus_accepts,
    tail_accepts,
    topk_overlap,
    weighted_overlap,
)

EXAMPLES = settings(max_examples=60)


def distinct_ids(k, vocab=24):
    return st.lists(st.integers(0, vocab - 1), min_size=k, max_size=k, unique=True)


@EXAMPLES
@given(st.integers(1, 9).flatmap(lambda k: st.tuples(distinct_ids(k), distinct_ids(k))))
def test_overlap_is_the_size_of_the_intersection_over_k_and_symmetric(sets):
    student, teacher = sets
    expected = len(set(student) & set(teacher)) / len(student)
    assert topk_overlap(torch.tensor(student), torch.tensor(teacher)).item() == pytest.approx(expected)
    assert topk_overlap(torch.tensor(teacher), torch.tensor(student)).item() == pytest.approx(expected)


@EXAMPLES
@given(st.permutations(range(5)), st.permutations(range(3, 8)))
def test_overlap_ignores_the_order_inside_each_set(student, teacher):
    assert topk_overlap(torch.tensor(student), torch.tensor(teacher)).item() == pytest.approx(2 / 5)  # {3, 4}


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 4)])
def test_overlap_works_on_any_leading_axes_and_returns_float32(leading):
    ids = torch.stack([torch.randperm(20)[:4] for _ in range(2 * math.prod(leading))]).reshape(2, *leading, 4)
    received = topk_overlap(ids[0], ids[1])
    rows = zip(ids[0].reshape(-1, 4).tolist(), ids[1].reshape(-1, 4).tolist(), strict=True)
    expected = [len(set(student) & set(teacher)) / 4 for student, teacher in rows]
    assert received.shape == leading
    assert received.dtype == torch.float32
    assert received.reshape(-1).tolist() == expected


def nucleus_by_loop(ids, probs, mass):
    """The smallest prefix whose summed probability reaches `mass`; everything where none does."""
    prefix, total = set(), 0.0
    for token, prob in zip(ids, probs, strict=True):
        prefix.add(token)
        total += prob
        if total >= mass:
            break
    return prefix


@EXAMPLES
@given(
    scores=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    share=st.sampled_from([1.0, 0.99, 0.5]),
    mass=st.sampled_from([1e-6, 0.1003, 0.4997, 0.9001, 0.98999, 0.99999]),
)
def test_nucleus_is_the_smallest_prefix_that_reaches_the_mass(scores, share, mass):
    probs = sorted((share * score / sum(scores) for score in scores), reverse=True)
    ids = [7 * (place + 1) % 29 for place in range(len(probs))]
    nucleus = nucleus_by_loop(ids, probs, mass)
    width = len(probs)
    received = nucleus_accepts(
        torch.arange(29), torch.tensor(ids).expand(29, width), torch.tensor(probs).log().expand(29, width), mass
    )
    assert set(received.nonzero().squeeze(-1).tolist()) == nucleus


def test_where_the_candidates_together_do_not_reach_the_mass_all_of_them_count():
    ids, log_q = torch.tensor([[3, 8, 5]]), torch.tensor([[0.4, 0.2, 0.1]]).log()  # .7 in all
    accepted = [bool(nucleus_accepts(torch.tensor([token]), ids, log_q, mass=0.9)) for token in (3, 8, 5, 0)]
    assert accepted == [True, True, True, False]


def test_a_mass_that_a_prefix_meets_exactly_takes_no_further_token():
    # In float32 .6 + .3 + .08 - .08 is not .6 + .3: the mass before a token must not be found by subtraction.
    probs = torch.tensor([[0.6, 0.3, 0.08]])
    log_q = probs.log()
    reached = float(log_q.exp()[0, :2].sum())
    ids = torch.tensor([[0, 1, 2]])
    accepted = [bool(nucleus_accepts(torch.tensor([token]), ids, log_q, mass=reached)) for token in (0, 1, 2)]
    assert accepted == [True, True, False]


def test_a_teacher_in_bfloat16_is_summed_in_float32():
    # 256 equal candidates of .0039: bfloat16 sums stop growing at .5 + .002, so that the mass .9 were never reached.
    log_q = torch.full((1, 256), math.log(1 / 256)).bfloat16()
    each = float(log_q.float().exp()[0, 0])
    inside = math.ceil(0.9 / each)
    accepted = nucleus_accepts(torch.arange(256), torch.arange(256).expand(256, 256), log_q.expand(256, 256), mass=0.9)
    assert int(accepted.sum()) == inside
    assert inside < 256


@st.composite
def two_distributions(draw, vocab=9):
    """p and q over a small vocabulary, from nearly uniform to nearly deterministic, and a k."""
    sharpness = st.sampled_from([0.1, 1.0, 6.0, 30.0])
    logits = [draw(st.lists(st.floats(-1, 1), min_size=vocab, max_size=vocab)) for _ in range(2)]
    probs = [(draw(sharpness) * torch.tensor(row, dtype=torch.float64)).softmax(-1) for row in logits]
    return (*probs, draw(st.integers(1, vocab)))


@EXAMPLES
@given(two_distributions())
def test_mass_and_weighted_overlap_are_loops_over_the_students_candidates_and_mass_is_bounded_as_stated(distributions):
    p, q, k = distributions
    student, teacher = p.topk(k).indices, q.topk(k).indices
    received = float(mass_overlap(p[student].log(), q[student].log()))
    own = sum(float(p[v]) for v in student.tolist())
    assert received == pytest.approx(sum(min(float(p[v]), float(q[v])) for v in student.tolist()) / own, abs=1e-6)
    weighted = float(weighted_overlap(student, p[student].log(), teacher))
    both = set(student.tolist()) & set(teacher.tolist())
    assert weighted == pytest.approx(sum(float(p[v]) for v in both) / own, abs=1e-6)
    union = sum(min(float(p[v]), float(q[v])) for v in set(student.tolist()) | set(teacher.tolist()))
    one_minus_tv = 1 - 0.5 * float((p - q).abs().sum())
    bounds = [own * received, union, one_minus_tv, own * received + 1 - own]
    assert all(lower <= upper + 1e-6 for lower, upper in itertools.pairwise(bounds))


@EXAMPLES
@given(two_distributions())
def test_where_both_models_are_one_they_agree_fully_however_unsure_they_are(distributions):
    p, _, k = distributions
    ids, log_p = p.topk(k).indices, p.topk(k).values.log()
    for agreement in (topk_overlap(ids, ids), weighted_overlap(ids, log_p, ids), mass_overlap(log_p, log_p)):
        assert float(agreement) == pytest.approx(1, abs=1e-6)


@EXAMPLES
@given(two_distributions(), st.integers(0, 8), st.floats(0.05, 0.999))
def test_the_tail_is_the_nucleus_where_k_candidates_can_tell_and_holds_no_more_than_stated(distributions, token, mass):
    _, q, k = distributions
    top, y = q.topk(k), torch.tensor(token)
    accepted = bool(tail_accepts(y, top.indices, top.values.log(), q[token].log(), mass))
    if float(top.values.sum()) >= mass + 1e-6:
        assert accepted == bool(nucleus_accepts(y, top.indices, top.values.log(), mass))
    rejected = [
        v for v in range(9) if not tail_accepts(torch.tensor(v), top.indices, top.values.log(), q[v].log(), mass)
    ]
    assert float(q[rejected].sum()) <= 1 - mass + 1e-6


@EXAMPLES
@given(two_distributions())
def test_over_the_whole_vocabulary_the_mass_is_one_minus_the_total_variation_in_any_order(distributions):
    p, q, _ = distributions
    order = torch.randperm(len(p))
    expected = 1 - 0.5 * float((p - q).abs().sum())
    assert float(mass_overlap(p[order].log(), q[order].log())) == pytest.approx(expected, abs=1e-6)
    assert float(mass_overlap(q.log(), p.log())) == pytest.approx(expected, abs=1e-6)


def test_a_noisy_tail_changes_the_overlap_and_neither_its_weighted_form_nor_the_mass():
    # Both give token 0 all but a thousandth; what little is left lies on different tokens.
    log_p = torch.tensor([0.999, 0.0005, 0.0005, 0.0, 0.0]).log()
    log_q = torch.tensor([0.999, 0.0, 0.0, 0.0005, 0.0005]).log()
    student, teacher = torch.tensor([0, 1, 2]), torch.tensor([0, 3, 4])
    assert float(topk_overlap(student, teacher)) == pytest.approx(1 / 3)
    assert float(weighted_overlap(student, log_p[student], teacher)) == pytest.approx(0.999)
    assert float(mass_overlap(log_p[student], log_q[student])) == pytest.approx(0.999)


def test_mass_is_summed_in_float32_whatever_it_gets():
    # 1,024 candidates of 1/1024 each, of which the teacher gives the second half nothing: sums in bfloat16 would stop at .25.
    log_p = torch.full((1024,), math.log(1 / 1024)).bfloat16()
    log_q = torch.cat([log_p[:512], torch.full((512,), -float("inf")).bfloat16()])
    received = mass_overlap(log_p, log_q)
    assert received.dtype == torch.float32
    assert float(received) == pytest.approx(0.5, rel=1e-4)
