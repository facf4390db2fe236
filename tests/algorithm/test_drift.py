"""Drift, reliability and lengths against slow loops over one token after the other."""

import math
from fractions import Fraction

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from record_helpers import random_record

from prune_opd_hf.algorithm.drift import (
    METRICS,
    DriftConfig,
    ScoredPositions,
    agreement,
    drift_stops,
    effective_length,
    events_to_exhaustion,
    find_drift_events,
    loss_weights,
    reliability,
    reliability_of_counts,
)
from prune_opd_hf.errors import ConfigError, InputError

EXAMPLES = settings(max_examples=60)
WEIGHT_DROPS = (0.0, 1e-3, 0.01, 1 / 49, 0.07, 0.1, 0.25, 1 / 3, 0.5, 0.99, 1.0)


@st.composite
def batches(draw):
    """Drift flags of a few rows and how many response tokens each row has; flags may stand on padding too."""
    rows, time = draw(st.integers(1, 4)), draw(st.integers(1, 14))
    flags = draw(st.lists(st.lists(st.booleans(), min_size=time, max_size=time), min_size=rows, max_size=rows))
    lengths = draw(st.lists(st.integers(0, time), min_size=rows, max_size=rows))
    mask = torch.arange(time).expand(rows, time) < torch.tensor(lengths).unsqueeze(-1)
    return torch.tensor(flags), mask


def reliability_by_loop(flags, length, weight_drop):
    """R of every position in exact arithmetic: R <= 1e-8 counts as 0, padding is 0."""
    values, count = [], 0
    for position, flag in enumerate(flags):
        count += flag
        value = 1 - Fraction(str(weight_drop)) * count
        inside = position < length and value > Fraction(1, 10**8)
        values.append(float(value) if inside else 0.0)
    return values


@EXAMPLES
@given(batches(), st.sampled_from(WEIGHT_DROPS))
def test_reliability_equals_a_loop_in_exact_arithmetic_and_never_rises(batch, weight_drop):
    flags, mask = batch
    received = reliability(flags, mask, weight_drop)
    lengths = mask.sum(-1).tolist()
    expected = [
        reliability_by_loop(row, length, weight_drop) for row, length in zip(flags.tolist(), lengths, strict=True)
    ]
    torch.testing.assert_close(received, torch.tensor(expected))
    assert torch.equal(received == 0, torch.tensor(expected) == 0)
    assert (received[:, 1:] <= received[:, :-1]).all()
    assert received.dtype == torch.float32


@EXAMPLES
@given(batches(), st.sampled_from(WEIGHT_DROPS), st.integers(0, 16))
def test_lengths_equal_loops_over_the_tokens(batch, weight_drop, min_length):
    flags, mask = batch
    values = reliability(flags, mask, weight_drop)
    stops = drift_stops(flags, mask, DriftConfig(weight_drop=weight_drop, min_length=min_length))
    for row, length in enumerate(mask.sum(-1).tolist()):
        exact = reliability_by_loop(flags[row].tolist(), length, weight_drop)
        effective = sum(1 for value in exact[:length] if value > 0)
        kept, drifted = length, False
        for position in range(length):
            if exact[position] == 0 and position + 1 >= min_length:
                kept, drifted = position + 1, True
                break
        assert int(effective_length(values, mask)[row]) == effective
        assert (int(stops.lengths[row]), bool(stops.drifted[row])) == (kept, drifted)


@EXAMPLES
@given(batches(), st.floats(0, 2))
def test_loss_weight_is_reliability_plus_base_on_the_response_and_zero_on_padding(batch, base):
    flags, mask = batch
    values = reliability(flags, mask, 0.25)
    received = loss_weights(values, mask, base)
    for row, column in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        expected = float(values[row, column]) + base if mask[row, column] else 0.0
        assert float(received[row, column]) == pytest.approx(expected, abs=1e-6)


def test_no_response_columns_at_all_gives_lengths_of_zero():
    nothing, mask = torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)
    assert reliability(mask, mask, 0.5).shape == (2, 0)
    assert effective_length(nothing, mask).tolist() == [0, 0]
    assert drift_stops(mask, mask, DriftConfig()).lengths.tolist() == [0, 0]


@EXAMPLES
@given(batches(), st.sampled_from(WEIGHT_DROPS), st.integers(0, 16), st.integers(1, 5), st.data())
def test_judging_block_by_block_stops_rows_where_judging_the_whole_does(batch, weight_drop, min_length, width, data):
    flags, mask = batch
    config = DriftConfig(weight_drop=weight_drop, min_length=min_length)
    ended = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(mask), max_size=len(mask))))
    whole = drift_stops(flags, mask, config, ended=ended)
    totals = mask.sum(-1)
    lengths, drifted = totals.clone(), torch.zeros(len(mask), dtype=torch.bool)
    tokens, events = torch.zeros_like(totals), torch.zeros_like(totals)
    for first in range(0, mask.shape[1], width):
        part, seen = flags[:, first : first + width], mask[:, first : first + width]
        ends_here = ended & (totals <= first + width)
        stops = drift_stops(part, seen, config, ended=ends_here, events_before=events, tokens_before=tokens)
        newly = stops.drifted & ~drifted & seen.any(-1)
        lengths, drifted = torch.where(newly, stops.lengths, lengths), drifted | newly
        tokens, events = tokens + seen.sum(-1), events + (part & seen).sum(-1)
    assert lengths.tolist() == whole.lengths.tolist()
    assert drifted.tolist() == whole.drifted.tolist()


def test_a_row_whose_own_end_is_its_exhausted_token_has_ended_by_itself():
    events, mask = torch.tensor([[True, True]]), torch.tensor([[True, True]])
    config = DriftConfig(weight_drop=0.5)
    assert drift_stops(events, mask, config).drifted.tolist() == [True]
    assert drift_stops(events, mask, config, ended=torch.tensor([True])).drifted.tolist() == [False]


@pytest.mark.parametrize("k", range(1, 33))
def test_an_overlap_equal_to_the_threshold_is_no_drift_for_any_k(k):
    shared = torch.arange(k + 1)
    teacher = torch.arange(k).expand(1, k + 1, k)
    student = torch.where(torch.arange(k) < shared.unsqueeze(-1), teacher, teacher + k)  # `shared` of k in common
    positions = ScoredPositions(torch.zeros(1, k + 1, dtype=torch.long), teacher, 0.0 * teacher, student, 0.0 * student)
    for needed in range(1, k + 1):
        config = DriftConfig("overlap", k, threshold=needed / k)
        events = find_drift_events(config, torch.ones(1, k + 1, dtype=torch.bool), positions)
        assert events[0].tolist() == [count < needed for count in shared.tolist()]


def test_padding_never_drifts():
    mask = torch.tensor([[True, True, False, False]])
    ids = torch.zeros(1, 4, 1, dtype=torch.long)
    positions = ScoredPositions(ids[..., 0], ids, 0.0 * ids, ids + 1, 0.0 * ids)  # nothing in common anywhere
    assert find_drift_events(DriftConfig("overlap", 1), mask, positions).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    ("weight_drop", "expected"),
    [
        (1 / 3, 3),
        (1 / 49, 49),
        (0.01, 100),
        (0.07, 15),  # 14 events leave .02
        (0.02, 50),
        (0.3, 4),
        (0.1, 10),
        (1e-3, 1000),
        (0.33333333, 3),  # leaves 1e-8, which counts as nothing
        (0.3333333, 4),  # leaves 1e-7, which does not
        (0.5, 2),
        (0.9999999, 2),
        (1.0, 1),
        (0.0, None),
    ],
)
def test_reliability_is_used_up_by_exactly_the_expected_number_of_events(weight_drop, expected):
    assert events_to_exhaustion(weight_drop) == expected
    assert DriftConfig(weight_drop=weight_drop).events_to_exhaustion == expected
    events = torch.ones(1, 1100, dtype=torch.bool)
    values = reliability(events, events, weight_drop)
    alive = 1100 if expected is None else expected - 1
    assert int(effective_length(values, events)) == alive
    stops = drift_stops(events, events, DriftConfig(weight_drop=weight_drop))
    assert (int(stops.lengths), bool(stops.drifted)) == ((1100, False) if expected is None else (expected, True))


@EXAMPLES
@given(st.integers(1, 3000))
def test_one_over_n_is_used_up_by_n_events(n):
    assert events_to_exhaustion(1 / n) == n
    left = reliability_of_counts(torch.tensor([n - 1, n, n + 1]), 1 / n)
    assert left.tolist() == pytest.approx([1 / n if n > 1 else 1.0, 0.0, 0.0], abs=1e-6)


@EXAMPLES
@given(st.floats(0, 1, exclude_min=True))
def test_any_weight_drop_exhausts_at_its_count_and_not_one_event_before(weight_drop):
    limit = events_to_exhaustion(weight_drop)
    left = 1 - Fraction(str(weight_drop)) * limit
    assert left <= Fraction(1, 10**8) < left + Fraction(str(weight_drop))
    if limit < 2**24:
        values = reliability_of_counts(torch.tensor([limit - 1, limit]), weight_drop)
        assert values[0] > 1e-8
        assert values[1] == 0


@pytest.mark.parametrize("weight_drop", [1e-17, 1e-300, 5e-324])
def test_a_vanishing_weight_drop_never_exhausts_anything(weight_drop):
    assert reliability_of_counts(torch.tensor([0, 1, 10_000]), weight_drop).tolist() == [1.0, 1.0, 1.0]


def test_counts_go_on_beyond_256_events():
    # A count in bfloat16 stops at 256 and reliability would stay at .5 for ever.
    events = torch.ones(1, 2000, dtype=torch.bool)
    values = reliability(events, events, 1 / 512)
    assert values[0, [255, 256, 383, 510, 511]].tolist() == [1 / 2, 255 / 512, 1 / 4, 1 / 512, 0.0]


@pytest.mark.parametrize(
    "change",
    [
        *({"metric": value} for value in ("Overlap", "", None, 3, ["overlap"])),
        *({"top_k": value} for value in (0, -1, 2.0, "16", None, True, math.nan)),
        *({"threshold": value} for value in (0.0, -0.1, 1.001, math.nan, math.inf, True, "0.7")),
        *({"weight_drop": value} for value in (-0.01, 1.001, math.nan, math.inf, True, "0.01", None)),
        *({"weight_base": value} for value in (-0.5, math.nan, math.inf, -math.inf, False, "0.5", None)),
        *({"min_length": value} for value in (-1, 1.5, "0", None, False, math.nan)),
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused_by_name(change, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checker
    (name,) = change
    with pytest.raises(ConfigError, match=name):
        DriftConfig(**change)


def test_settings_at_the_ends_of_their_range_are_accepted():
    DriftConfig(metric="nucleus", top_k=1, threshold=1, weight_drop=0, weight_base=0, min_length=0)
    DriftConfig(threshold=5e-324, weight_drop=1, weight_base=1e30, min_length=10**9)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_events_of_every_metric_equal_a_loop_over_the_first_k_candidates(metric, k):
    record, p, q = random_record()
    mask = torch.arange(7) < torch.tensor([[7], [4], [0]])
    seen = set()
    record["teacher_token_log_probs"][:, ::2] -= 40  # as of tokens that the teacher never says
    for threshold in (0.2, 0.5, 0.8):
        received = find_drift_events(DriftConfig(metric, k, threshold), mask, ScoredPositions(**record))
        for row, column in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
            student, teacher = (record[f"{who}_topk_ids"][row, column, :k].tolist() for who in ("student", "teacher"))
            if metric == "overlap":
                event = len(set(student) & set(teacher)) / k < threshold
            elif metric in ("mass", "weighted_overlap"):
                own = sum(p[row, column, v] for v in student)
                if metric == "mass":
                    shared = sum(min(p[row, column, v], q[row, column, v]) for v in student)
                else:
                    shared = sum(p[row, column, v] for v in student if v in teacher)
                event = shared / own < threshold
            else:
                before = [sum(float(q[row, column, v]) for v in teacher[:place]) for place in range(k)]
                nucleus = [v for v, mass in zip(teacher, before, strict=True) if mass < threshold]
                y = int(record["token_ids"][row, column])
                event = y not in nucleus
                if metric == "tail" and before[-1] + float(q[row, column, teacher[-1]]) < threshold:
                    event &= (
                        y in teacher
                        or 2**18 * math.exp(record["teacher_token_log_probs"][row, column]) <= 1 - threshold
                    )
            assert bool(received[row, column]) == (bool(event) and bool(mask[row, column]))
            seen.add(bool(event))
    assert seen == {True, False}


@pytest.mark.parametrize("metric", METRICS)
def test_a_threshold_that_is_left_out_is_the_metrics_own(metric):
    assert DriftConfig(metric, threshold=0.3).threshold == 0.3
    if metric == "nucleus":
        with pytest.raises(
            ConfigError, match=r"'nucleus' has no threshold of its own.*choose metric='tail', or give a"
        ):
            DriftConfig(metric)
    else:
        expected = {"overlap": 0.7, "weighted_overlap": 0.5, "mass": 0.5, "tail": 0.99}
        assert DriftConfig(metric).threshold == expected[metric]


def test_a_model_drifts_from_itself_no_more_than_its_metric_states():
    """p = q, from sharp to flat. 40,000 tokens are sampled from q; "tail" at .99 rejects at most 1 % of them, up to four standard
    errors of .0005. The published nucleus rejects what is outside of k candidates at any threshold: most of a flat distribution."""
    generator = torch.Generator().manual_seed(0)
    sharpness = torch.tensor([0.0, 0.3, 1.0, 3.0]).repeat_interleave(25)[:, None]
    log_p = (torch.randn(100, 200, generator=generator) * sharpness).log_softmax(-1)
    tokens = log_p.exp().multinomial(400, replacement=True, generator=generator)
    top = log_p.topk(16)
    ids, log_probs = (values[:, None].expand(100, 400, 16) for values in (top.indices, top.values))
    at = ScoredPositions(tokens, ids, log_probs, ids, log_probs, log_probs, log_p.gather(-1, tokens))
    mask = torch.ones(100, 400, dtype=torch.bool)
    configs = {metric: DriftConfig(metric) for metric in METRICS if metric != "nucleus"}
    configs["nucleus"] = DriftConfig("nucleus", threshold=1)
    flagged = {metric: float(find_drift_events(config, mask, at).float().mean()) for metric, config in configs.items()}
    assert flagged["overlap"] == flagged["weighted_overlap"] == flagged["mass"] == 0
    assert flagged["tail"] <= 0.01 + 4 * 0.0005
    assert flagged["nucleus"] > 0.3


def test_what_the_record_lacks_is_named():
    record, *_ = random_record()
    mask = torch.ones(3, 7, dtype=torch.bool)
    without_student = {name: record[name] for name in ("token_ids", "teacher_topk_ids", "teacher_topk_log_probs")}
    find_drift_events(DriftConfig("nucleus", 5, 0.9), mask, ScoredPositions(**without_student))
    with pytest.raises(InputError, match=r"tail.*needs the teacher's score of the sampled token"):
        find_drift_events(DriftConfig("tail", 5), mask, ScoredPositions(**without_student))
    for metric in ("overlap", "weighted_overlap", "mass"):
        with pytest.raises(InputError, match=f"{metric}.*needs the student's candidates"):
            find_drift_events(DriftConfig(metric, 2), mask, ScoredPositions(**without_student))
    for metric in METRICS:
        with pytest.raises(InputError, match="compare 6 candidates, and 5 were recorded"):
            find_drift_events(DriftConfig(metric, 6, 0.5), mask, ScoredPositions(**record))
    unscored = ScoredPositions(**{name: value for name, value in record.items() if name != "teacher_log_probs"})
    find_drift_events(DriftConfig("overlap", 2), mask, unscored)
    with pytest.raises(InputError, match="'mass' needs the teacher's scores of the student's candidates"):
        find_drift_events(DriftConfig("mass", 2), mask, unscored)
    with pytest.raises(
        ConfigError, match="overlap, weighted_overlap, mass measure agreement by a number, got 'nucleus'"
    ):
        agreement("nucleus", 2, ScoredPositions(**record))
