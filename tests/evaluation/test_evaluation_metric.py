r"""The `evaluate` module: loads offline by its path and says what the package says."""

import evaluate
import numpy as np
import pytest

from prune_opd_hf.errors import InputError
from prune_opd_hf.evaluation.grading import GradingPool, score_verdicts
from prune_opd_hf.evaluation.metric import METRIC_PATH

RESPONSES = [
    [r"\boxed{142}", r"\boxed{142.0}", r"\boxed{7}", r"\boxed{7}"],
    [r"\boxed{\frac{2}{4}}", "I give up", r"\boxed{0.5} or so", r"\boxed{5"],
    [r"\boxed{(2,1)}", r"\boxed{x}", r"\boxed{[1,2]}", r"\boxed{9^{9^{9^{9}}}}"],
]
GOLDS = ["142.0", r"\frac{1}{2}", "(1,2)"]


@pytest.fixture
def metric(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return evaluate.load(METRIC_PATH, cache_dir=str(tmp_path / "cache"))


def test_it_gives_the_packages_numbers(metric):
    result = metric.compute(predictions=RESPONSES, references=GOLDS, workers=1, cpu_seconds=1, pass_ks=[2])
    with GradingPool(1, cpu_seconds=1) as pool:
        verdicts = [pool.grade(row, [gold] * 4) for row, gold in zip(RESPONSES, GOLDS, strict=True)]
    scores = score_verdicts(verdicts, pass_ks=[2])
    for name in ("avg@4", "pass@2", "maj@4"):
        estimate = scores["metrics"][name]
        assert (result[name], result[f"{name}_low"], result[f"{name}_high"]) == (
            estimate.value,
            estimate.low,
            estimate.high,
        )
    assert (result["problems"], result["samples"]) == (3, 4)
    assert "bootstrap over problems" in result["interval_method"]


def test_the_numbers_are_those_computed_by_hand(metric):
    result = metric.compute(
        predictions=RESPONSES, references=GOLDS, workers=1, cpu_seconds=1, truncated=[[False] * 3 + [True]] * 3
    )
    assert result["avg@4"] == pytest.approx((2 / 4 + 2 / 4 + 0) / 3)
    assert result["pass@4"] == pytest.approx(2 / 3)
    assert result["maj@4"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert result["no_answer_share"] == pytest.approx(2 / 12)
    assert result["timed_out_share"] == pytest.approx(1 / 12)
    assert result["crashed_share"] == 0.0
    assert result["truncated_share"] == pytest.approx(1 / 4)


def test_one_response_a_problem_may_be_plain_text(metric):
    result = metric.compute(predictions=[r"\boxed{4}", r"\boxed{5}"], references=["4", "6"], truncated=[False, True])
    assert (result["avg@1"], result["maj@1"], result["samples"], result["truncated_share"]) == (0.5, 0.5, 1, 0.5)


def test_there_is_one_flag_of_truncation_for_each_response(metric):
    flags = np.array([True, False])
    assert metric.compute(predictions=["4", "5"], references=["4", "6"], truncated=flags)["truncated_share"] == 0.5
    for short in ([], [True], [[True], []]):
        with pytest.raises(InputError, match="one flag for each response"):
            metric.compute(predictions=["4", "5"], references=["4", "6"], truncated=short)


def test_batches_can_be_added_before_the_numbers_are_asked_for(metric):
    for row, gold in zip(RESPONSES[:2], GOLDS[:2], strict=True):
        metric.add(prediction=row, reference=gold)
    assert metric.compute(workers=1)["avg@4"] == pytest.approx(0.5)
