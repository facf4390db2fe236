"""The paired comparison: against a slow enumeration of signs, by simulation, and what it refuses."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from prune_opd_hf.errors import InputError
from prune_opd_hf.evaluation import BenchmarkResult, Estimate, EvaluationReport, SamplingSettings
from prune_opd_hf.evaluation.comparison import compare_reports, paired_test


def result(name: str, scores: tuple[float, ...], content: str = "a") -> BenchmarkResult:
    value = sum(scores) / len(scores)
    return BenchmarkResult(
        name=name,
        source=f"{name}.json",
        revision=None,
        content_hash="sha256:" + content * 64,
        problems=len(scores),
        num_generations=4,
        metrics={"avg@4": Estimate(value, 0.0, 1.0, "by hand"), "pass@4": Estimate(value, 0.0, 1.0, "by hand")},
        problem_scores={"avg@4": scores, "pass@4": scores},
        truncated_share=0.0,
        no_answer_share=0.0,
        timed_out_share=0.0,
        crashed_share=0.0,
        prompt_tokens=1,
        response_tokens=1,
        wall_seconds=1.0,
        prompt_suffix="",
        grader="by hand",
    )


def report(name: str, *results: BenchmarkResult) -> EvaluationReport:
    return EvaluationReport(
        model_name=name,
        model_hash="sha256:" + {"first": "1", "second": "2"}[name] * 64,
        sampling=SamplingSettings(temperature=1.0, top_p=0.95, max_completion_length=100, seed=0, num_generations=4),
        benchmarks=results,
        versions={},
        hardware="CPU",
        engine="by hand",
        dtype="float32",
        date="2026-11-23",
    )


def slow_p_value(differences: list[float]) -> float:
    observed = abs(sum(differences))
    flips = list(itertools.product((-1, 1), repeat=len(differences)))
    extreme = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True))) >= observed - 1e-9 for signs in flips
    ]
    return sum(extreme) / len(flips)


def test_the_p_value_counts_the_signs_that_are_as_extreme():
    rng = np.random.default_rng(0)
    for problems in (1, 2, 5, 9):
        for _ in range(5):
            differences = (rng.integers(-8, 9, problems) / 16).tolist()
            assert paired_test(differences)[2] == pytest.approx(slow_p_value(differences))


def test_the_interval_is_what_the_test_does_not_reject():
    rng = np.random.default_rng(1)
    for _ in range(10):
        differences = rng.uniform(-0.4, 0.5, 10)
        low, high, _ = paired_test(differences)
        for shift, rejected in ((low - 1e-6, True), (low + 1e-6, False), (high - 1e-6, False), (high + 1e-6, True)):
            assert (slow_p_value((differences - shift).tolist()) < 0.05) is rejected


def test_drawn_signs_agree_with_all_signs():
    differences = np.random.default_rng(2).uniform(-0.3, 0.5, 15)
    low, high, p_value = paired_test(differences)
    assert p_value == pytest.approx(slow_p_value(differences.tolist()), abs=0.02)
    assert low < differences.mean() < high


def test_equal_models_are_told_apart_in_no_more_than_5_percent_and_better_ones_often():
    rng = np.random.default_rng(3)

    def rejections(gain: float, runs: int = 500) -> float:
        rejected = 0
        for _ in range(runs):
            difficulty = rng.beta(0.6, 1.0, 30)
            better = np.clip(difficulty + gain, 0, 1)
            differences = (rng.binomial(16, better) - rng.binomial(16, difficulty)) / 16
            rejected += paired_test(differences)[2] < 0.05
        return rejected / runs

    assert rejections(0.0) < 0.065
    assert rejections(0.1) > 0.9


@pytest.mark.parametrize("amount", [0.0, 1.0, -1.0, 0.25])
def test_equal_differences_still_have_an_interval(amount):
    low, high, p_value = paired_test([amount] * 30)
    assert low <= amount <= high
    assert high - low > 0.05
    assert (p_value < 0.05) is (amount != 0)


def test_a_benchmark_of_two_problems_that_counts_for_half_leaves_the_mean_in_doubt():
    """60 problems of weight 1/120 and two of 1/4 say as much as 1 / (60 / 120^2 + 2 / 4^2) = 7.7 of equal weight."""
    low, high, _ = paired_test([0.0] * 62, [1 / 60] * 60 + [1 / 2] * 2)
    assert (low, high) == (pytest.approx(-(1 - 0.025 ** (1 / 7.74)), abs=0.005), pytest.approx(-low))
    assert paired_test([0.0] * 62)[1] < 0.06


@pytest.mark.parametrize("differences", [[], [1.5], [float("nan")]])
def test_what_is_no_difference_is_refused(differences):
    with pytest.raises(InputError):
        paired_test(differences)


def test_a_large_difference_is_larger_than_the_noise_and_a_small_one_is_not():
    low, high, middle = (0.25,) * 20, (0.75,) * 19 + (0.5,), (0.25,) * 18 + (0.5, 0.0)
    better = compare_reports(report("first", result("aime24", low)), report("second", result("aime24", high)))
    [difference] = better.differences
    assert difference.value == pytest.approx(0.4875)
    assert "the second is better than the first by 48.8 points" in difference.verdict
    assert "larger than the noise" in better.to_markdown()
    same = compare_reports(report("first", result("aime24", low)), report("second", result("aime24", middle)))
    assert not same.differences[0].is_larger_than_noise
    assert "within the noise of 20 problems" in same.differences[0].verdict


def test_swapping_the_reports_mirrors_the_comparison():
    a, b = (
        result("aime24", (0.0, 0.25, 0.5, 0.75, 1.0, 0.25) * 3),
        result("aime24", (0.5, 0.25, 0.75, 0.5, 1.0, 0.75) * 3),
    )
    [there] = compare_reports(report("first", a), report("second", b)).differences
    [back] = compare_reports(report("first", b), report("second", a)).differences
    assert (back.value, back.first, back.second) == (-there.value, there.second, there.first)
    assert (back.low, back.high) == (pytest.approx(-there.high, abs=0.02), pytest.approx(-there.low, abs=0.02))
    assert back.p_value == pytest.approx(there.p_value, abs=0.02)


def test_benchmarks_count_alike_in_their_mean():
    one = [result("aime24", (0.0,) * 10), result("amc23", (0.0,) * 40, "b")]
    two = [result("aime24", (0.5,) * 9 + (0.4,)), result("amc23", (0.1,) * 39 + (0.2,), "b")]
    *_, mean = compare_reports(report("first", *one), report("second", *two)).differences
    assert (mean.name, mean.problems) == ("mean of all", 50)
    assert mean.value == pytest.approx((0.49 + 0.1025) / 2)
    assert mean.low < mean.value < mean.high


def test_other_problems_under_the_same_name_are_refused():
    first, second = (
        report("first", result("amc23", (0.5,) * 40, "a")),
        report("second", result("amc23", (0.5,) * 83, "b")),
    )
    with pytest.raises(InputError, match=r"40 problems, sha256:a{12}, and amc23\.json, 83 problems, sha256:b{12}"):
        compare_reports(first, second)


def test_missing_benchmarks_and_metrics_are_refused():
    first, second = report("first", result("amc23", (0.5, 0.5))), report("second", result("aime24", (0.5, 0.5)))
    with pytest.raises(InputError, match="share no benchmark"):
        compare_reports(first, second)
    with pytest.raises(InputError, match="has no 'maj@4'"):
        compare_reports(first, first, metric="maj@4")


def test_another_engine_and_another_dtype_are_noted():
    first, second = (report(name, result("amc23", (0.5, 1.0))) for name in ("first", "second"))
    notes = compare_reports(first, replace(second, dtype="bfloat16", engine="another")).notes
    assert f"dtype differs: {first.dtype!r} and 'bfloat16'." in notes
    assert f"engine differs: {first.engine!r} and 'another'." in notes


def test_what_else_differs_is_noted():
    first = report("first", result("amc23", (0.5, 0.25)), result("aime24", (0.5, 0.5)))
    second = report("second", replace(result("amc23", (0.5, 0.5)), prompt_suffix="Think."))
    second = replace(second, sampling=replace(second.sampling, temperature=0.6))
    comparison = compare_reports(first, second, metric="pass@4")
    text = comparison.to_markdown()
    assert "temperature differs: 1.0 and 0.6." in text
    assert "prompt_suffix of amc23 differs" in text
    assert "aime24 is in the first report alone." in text
    assert "same weights" in compare_reports(first, first).to_markdown()
