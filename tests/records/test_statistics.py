"""avg@k, pass@k and maj@k against slow, obvious enumerations; intervals against simulated benchmarks."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from prune_opd_hf.errors import InputError
from prune_opd_hf.records.statistics import estimate_mean, majority_vote, pass_at_k, score_problems


@pytest.mark.parametrize("samples", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples):
    for correct in range(samples + 1):
        flags = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(flags, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_exact_where_factorials_overflow():
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5, abs=1e-9)
    assert pass_at_k(100_000, 0, 100_000) == 0.0


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_outside_its_range_is_refused(samples, correct, k):
    with pytest.raises(InputError):
        pass_at_k(samples, correct, k)


def slow_majority(answers: list[str | None], gold: str) -> float:
    """Shuffle, take the first answer that no other beats, and average over every order of the votes."""
    votes = [answer for answer in answers if answer is not None]
    wins = []
    for order in itertools.permutations(votes):
        counts = Counter(order)
        winner = next((answer for answer in order if counts[answer] == max(counts.values())), None)
        wins.append(winner == gold)
    return sum(wins) / len(wins) if votes else 0.0


@given(st.lists(st.sampled_from(["1", "2", "3", None]), max_size=6))
def test_the_majority_vote_is_the_mean_over_all_orders_of_the_votes(answers):
    expected = slow_majority(answers, "1")
    assert majority_vote(answers, [answer == "1" for answer in answers]) == pytest.approx(expected)


def test_answers_that_are_none_do_not_vote():
    assert majority_vote([None, None, None, "7"], [False, False, False, True]) == 1.0
    assert majority_vote([None, None], [False, False]) == 0.0
    assert majority_vote([], []) == 0.0


def test_scores_of_problems_equal_slow_loops():
    rng = random.Random(0)
    answers = [[rng.choice(["1", "2", "3", None]) for _ in range(8)] for _ in range(20)]
    correct = [[answer == "1" for answer in row] for row in answers]
    scores = score_problems(correct, answers)
    assert list(scores) == ["avg@8", "pass@4", "pass@8", "maj@8"]
    for index, row in enumerate(correct):
        assert scores["avg@8"][index] == sum(row) / 8
        fours = list(itertools.combinations(row, 4))
        assert scores["pass@4"][index] == pytest.approx(sum(map(any, fours)) / len(fours))
        assert scores["pass@8"][index] == any(row)
        counts = Counter(answer for answer in answers[index] if answer)
        top = [answer for answer in counts if counts[answer] == max(counts.values())]
        assert scores["maj@8"][index] == (("1" in top) / len(top) if top else 0.0)


@pytest.mark.parametrize(
    ("samples", "names"),
    [
        (1, ["avg@1", "maj@1"]),
        (2, ["avg@2", "pass@2", "maj@2"]),
        (16, ["avg@16", "pass@4", "pass@16", "maj@16"]),
        (64, ["avg@64", "pass@4", "pass@16", "pass@64", "maj@64"]),
    ],
)
def test_the_metrics_that_are_reported_by_default(samples, names):
    assert list(score_problems([[True] * samples], [["1"] * samples])) == names


@pytest.mark.parametrize(
    ("correct", "answers"),
    [([], []), ([[]], [[]]), ([[True], [True, False]], [["1"], ["1", "2"]]), ([[True]], [["1"], ["1"]])],
)
def test_scores_need_the_same_number_of_samples(correct, answers):
    with pytest.raises(InputError):
        score_problems(correct, answers)


def test_for_scores_of_zero_and_one_the_interval_is_that_of_jeffreys():
    for right in (1, 5, 15, 29):
        estimate = estimate_mean([1.0] * right + [0.0] * (30 - right))
        posterior = stats.beta(right + 0.5, 30 - right + 0.5)
        assert (estimate.value, estimate.low, estimate.high) == (
            right / 30,
            pytest.approx(posterior.ppf(0.025), abs=0.006),
            pytest.approx(posterior.ppf(0.975), abs=0.006),
        )


def test_all_right_and_all_wrong_still_have_an_interval():
    right, wrong = estimate_mean([1.0] * 30), estimate_mean([0.0] * 30)
    assert (right.value, right.high) == (1.0, 1.0)
    assert 0.90 < right.low < 0.94
    assert (wrong.low, wrong.value) == (0.0, 0.0)
    assert 0.06 < wrong.high < 0.10
    one = estimate_mean([1.0])
    assert one.low < 0.2


def test_more_samples_of_the_same_problems_do_not_shrink_the_interval():
    scores = [0.0, 0.5, 1.0] * 10
    estimate = estimate_mean(scores)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * np.std(scores) / 30**0.5, rel=0.1)


def test_the_interval_does_not_depend_on_the_order():
    scores = list(np.random.default_rng(0).random(40))
    assert estimate_mean(scores) == estimate_mean(scores[::-1]) == estimate_mean(sorted(scores))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_the_interval_holds_the_mean_and_stays_in_range(scores):
    estimate = estimate_mean(scores)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.low < estimate.high


@pytest.mark.parametrize("scores", [[], [1.5], [-0.1], [float("nan")]])
def test_what_is_no_score_is_refused(scores):
    with pytest.raises(InputError):
        estimate_mean(scores)


def coverage(mean: float, concentration: float, metric: str, benchmarks: int = 2000) -> float:
    """Share of simulated benchmarks (30 problems, 16 samples, difficulty ~ Beta) whose interval holds the true score.

    The truth is the mean over a million problems of the exact expectation of the metric given the problem's difficulty.
    """
    rng = np.random.default_rng(7)
    alpha, beta = mean * concentration, (1 - mean) * concentration
    population = rng.beta(alpha, beta, 1_000_000)
    if metric == "avg@16":
        truth, score = mean, [count / 16 for count in range(17)]
    elif metric == "pass@4":
        truth, score = float((1 - (1 - population) ** 4).mean()), [pass_at_k(16, count, 4) for count in range(17)]
    else:  # one wrong answer only, so that the majority is a matter of counting
        counts = rng.binomial(16, population)
        score = [float(count > 8) + 0.5 * (count == 8) for count in range(17)]
        truth = float(np.asarray(score)[counts].mean())
    drawn = rng.binomial(16, rng.beta(alpha, beta, (benchmarks, 30)))
    estimates = [estimate_mean([score[count] for count in benchmark]) for benchmark in drawn]
    return sum(estimate.low <= truth <= estimate.high for estimate in estimates) / benchmarks


def test_95_percent_intervals_hold_the_truth_in_93_to_97_percent_of_2000_benchmarks():
    assert 0.93 <= coverage(mean=0.3, concentration=1.0, metric="avg@16") <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["avg@16", "pass@4", "maj@16"])
@pytest.mark.parametrize(
    ("mean", "concentration"),
    [(0.05, 0.3), (0.05, 4.0), (0.15, 1.0), (0.3, 4.0), (0.5, 0.3), (0.5, 1.0), (0.8, 1.0), (0.95, 1.0)],
)
def test_intervals_hold_the_truth_from_hard_to_easy_benchmarks(mean, concentration, metric):
    """Up to 99% where nearly every problem has the same score: an interval for a handful of 0/1 outcomes has to be coarse."""
    assert 0.93 <= coverage(mean, concentration, metric) <= (0.98 if metric == "avg@16" else 0.99)
