"""The response budget against the reference's rule, re-implemented with counters and plain arithmetic."""

import math
from fractions import Fraction

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd_hf.algorithm.budget import ResponseBudget
from prune_opd_hf.errors import ConfigError, InputError

EXAMPLES = settings(max_examples=60)


@st.composite
def settings_and_steps(draw):
    """Settings of a budget, and a few steps of (effective length, ended naturally) for each sequence."""
    minimum = draw(st.integers(1, 60))
    maximum = minimum + draw(st.integers(0, 200))
    arguments = {
        "minimum": minimum,
        "maximum": maximum,
        "initial": draw(st.integers(minimum, maximum)),
        "step": draw(st.integers(1, 70)),
        "hit_ratio": draw(st.sampled_from([0.0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.9, 1.0])),
        "margin": draw(st.integers(0, 80)),
        "patience": draw(st.integers(1, 4)),
    }
    sequence = st.tuples(st.integers(0, 280), st.booleans())
    steps = draw(st.lists(st.lists(sequence, min_size=1, max_size=10), min_size=1, max_size=12))
    return arguments, [([length for length, _ in step], [natural for _, natural in step]) for step in steps]


def lengths_by_the_rule(arguments, steps, *, leave_out_natural_ends):
    """The cap after every step: section 2 of the paper's reference, one `if` after the other."""
    cap, misses, caps = arguments["initial"], 0, []
    for lengths, natural in steps:
        boundary = max(arguments["minimum"], cap - arguments["margin"])
        hits = judged = 0
        for length, by_itself in zip(lengths, natural, strict=True):
            if leave_out_natural_ends and by_itself and length < boundary:
                continue
            judged += 1
            hits += length >= boundary
        if judged == 0:
            pass
        elif Fraction(hits, judged) >= Fraction(arguments["hit_ratio"]).limit_denominator(100):  # .1 is 1/10
            cap, misses = min(cap + arguments["step"], arguments["maximum"]), 0
        else:
            misses += 1
            if misses == arguments["patience"]:
                cap, misses = max(cap - arguments["step"], arguments["minimum"]), 0
        caps.append(cap)
    return caps


@EXAMPLES
@given(settings_and_steps())
def test_counting_natural_ends_as_misses_is_the_rule_of_the_reference(case):
    arguments, steps = case
    budget = ResponseBudget(**arguments, natural_ends="miss")
    received = [budget.update(*step)["budget/length"] for step in steps]
    assert received == lengths_by_the_rule(arguments, steps, leave_out_natural_ends=False)
    assert budget.length == received[-1]


@EXAMPLES
@given(settings_and_steps())
def test_by_default_natural_ends_before_the_boundary_are_left_out(case):
    arguments, steps = case
    budget = ResponseBudget(**arguments)
    received = [budget.update(*step)["budget/length"] for step in steps]
    assert received == lengths_by_the_rule(arguments, steps, leave_out_natural_ends=True)
    assert all(arguments["minimum"] <= length <= arguments["maximum"] for length in received)


@EXAMPLES
@given(settings_and_steps(), st.data())
def test_a_resumed_budget_continues_as_the_uninterrupted_one(case, data):
    arguments, steps = case
    cut = data.draw(st.integers(0, len(steps)))
    whole, first = ResponseBudget(**arguments), ResponseBudget(**arguments)
    expected = [whole.update(*step) for step in steps]
    received = [first.update(*step) for step in steps[:cut]]
    second = ResponseBudget(**arguments)
    second.load_state_dict(first.state_dict())
    received += [second.update(*step) for step in steps[cut:]]
    assert str(received) == str(expected)  # as text, since NaN differs from itself
    assert second.state_dict() == whole.state_dict()


def test_short_answers_that_ended_by_themselves_shrink_only_the_budget_of_the_reference():
    natural, lengths = [True] * 4, [30, 50, 20, 40]  # the boundary is 400 - 100
    ours, reference = (ResponseBudget(400, 100, 1000, natural_ends=kind) for kind in ("ignore", "miss"))
    for _ in range(3):
        metrics = ours.update(lengths, natural)
        reference.update(lengths, natural)
    assert (ours.length, reference.length) == (400, 300)
    assert math.isnan(metrics["budget/hit_share"])
    assert metrics["budget/judged_share"] == 0
    assert metrics["budget/misses"] == 0


def test_metrics_tell_what_was_judged():
    budget = ResponseBudget(400, 100, 1000, hit_ratio=0.5)
    # reached; reached and ended by itself, which counts; left out; a miss
    metrics = budget.update(torch.tensor([300, 350, 299, 299]), torch.tensor([False, True, True, False]))
    assert metrics == {
        "budget/length": 500.0,
        "budget/hit_share": pytest.approx(2 / 3),
        "budget/judged_share": 0.75,
        "budget/misses": 0.0,
    }


def test_a_hit_forgets_the_misses_before_it():
    budget = ResponseBudget(400, 100, 1000, patience=2)
    caps = [budget.update([length], [False])["budget/length"] for length in (0, 300, 0, 0)]
    assert caps == [400, 500, 500, 400]


def test_a_held_step_neither_counts_as_a_miss_nor_forgets_one():
    budget = ResponseBudget(400, 100, 1000, patience=2)
    caps = [budget.update([10], [natural])["budget/length"] for natural in (False, True, False)]
    assert caps == [400, 400, 300]


def test_the_boundary_never_lies_below_the_minimum():
    assert ResponseBudget(initial=150, minimum=100, maximum=1000, margin=100).boundary == 100


@pytest.mark.parametrize(
    "change",
    [
        {"minimum": 0},
        {"minimum": 401},
        {"maximum": 399},
        {"initial": math.nan},
        {"initial": 400.5},
        {"initial": "400"},
        {"maximum": None},
        {"minimum": True},
        *({"step": value} for value in (0, -1, 1.5, True, None, math.nan)),
        *({"hit_ratio": value} for value in (-0.1, 1.1, math.nan, True, "0.1", None)),
        *({"margin": value} for value in (-1, 0.5, False, None, math.inf)),
        *({"patience": value} for value in (0, 2.5, True, None)),
        *({"natural_ends": value} for value in ("hit", "", None)),
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused_by_name(change, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checker
    (name,) = change
    with pytest.raises(ConfigError, match=name):
        ResponseBudget(**({"initial": 400, "minimum": 100, "maximum": 1000} | change))


@pytest.mark.parametrize(
    "state",
    [
        {"length": 99, "misses": 0},
        {"length": 1001, "misses": 0},
        {"length": 400, "misses": 3},
        {"length": 400, "misses": -1},
        {"length": 400.7, "misses": 0},
        {"length": math.nan, "misses": 0},
        {"length": "long", "misses": 0},
        {"length": None, "misses": 0},
        {"length": 400},
        {},
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state):
    budget = ResponseBudget(initial=500, minimum=100, maximum=1000)
    with pytest.raises(ConfigError, match="saved budget"):
        budget.load_state_dict(state)
    assert budget.state_dict() == {"length": 500, "misses": 0}


@pytest.mark.parametrize(("lengths", "natural"), [([], []), ([1, 2], [True]), ([1], [])])
def test_a_step_without_sequences_or_flags_is_refused(lengths, natural):
    with pytest.raises(InputError, match="one effective length and one flag"):
        ResponseBudget(400, 100, 1000).update(lengths, natural)
