r"""The grading pool: real golds, hostile answers, processes that hang or die, and verdicts that depend on nothing else."""

import json
import random
import re
import signal
import threading
import time

import pytest
from evaluation_helpers import BENCHMARK_FILES, adversarial_answers, benchmark_folder

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.evaluation.grading import GradingPool, Verdict
from prune_opd_hf.evaluation.grading import pool as grading_pool
from prune_opd_hf.evaluation.grading.math_grader.equivalence import judge
from prune_opd_hf.evaluation.grading.pool import GraderStartError, GradingProcess, ProcessDiedError, _compare_numbers

HANGS = "9^{9^{9^{9}}}"


@pytest.fixture(scope="module")
def pool():
    with GradingPool(2, cpu_seconds=2) as shared:
        yield shared


@pytest.fixture(params=BENCHMARK_FILES)
def golds(request) -> list[str]:
    return [row["answer"] for row in json.loads((benchmark_folder() / request.param).read_text())]


def test_every_real_gold_is_right_however_it_is_written(pool, golds):
    forms = [
        lambda gold: rf"\boxed{{{gold}}}",
        lambda gold: rf"The answer is ${gold}$.",
        lambda gold: rf"So \[ \boxed{{  {gold}  }} \] which is what was asked for.",
        lambda gold: rf"First \boxed{{977}}, then $\boxed{{ {gold.replace(',', ' , ')} }}$.",
        lambda gold: rf"**Final answer:** \( {gold} \)",
        lambda gold: gold,
    ]
    responses = [form(gold) for gold in golds for form in forms]
    verdicts = pool.grade(responses, [gold for gold in golds for _ in forms])
    assert [response for response, verdict in zip(responses, verdicts, strict=True) if not verdict.correct] == []


def test_no_near_miss_of_a_real_gold_is_right(pool, golds):
    misses = [(miss, gold) for gold in golds for miss in near_misses(gold)]
    verdicts = pool.grade([rf"\boxed{{{miss}}}" for miss, _ in misses], [gold for _, gold in misses])
    assert len(misses) > 3 * len(golds)
    assert [miss for miss, verdict in zip(misses, verdicts, strict=True) if verdict.correct] == []


def near_misses(gold: str) -> set[str]:
    """gold + 1, signs flipped, numerator and denominator swapped, one digit changed, an element more or less."""
    elements = gold.split(",")
    misses = {",".join([*elements[:-1], f"{elements[-1]}+1"]), ",".join([*elements, "977"])}
    swapped = re.sub(r"\\d?frac\{(.*?)\}\{([^{}]*)\}", r"\\frac{\2}{\1}", gold)
    if swapped != gold:
        misses.add(swapped)
    if len(elements) > 1:
        misses.add(",".join(elements[:-1]))
        for place, element in enumerate(elements):
            if element.strip(" ()[]") != "0" and "(" not in gold:
                misses.add(",".join([*elements[:place], f"-({element})", *elements[place + 1 :]]))
    elif not re.fullmatch(r"-?0[.0]*", gold):
        misses |= {
            f"-({gold})",
            f"-{gold}",
            f"2({gold})",
            f"\\frac{{1}}{{{gold}}}" if gold not in ("1.0", "-1.0") else "2",
        }
    for digit in re.finditer(r"\d", gold):
        misses.add(gold[: digit.start()] + str((int(digit[0]) + 1) % 10) + gold[digit.end() :])
    return misses


def test_verdicts_do_not_depend_on_order_threads_or_workers(pool):
    rng = random.Random(1)
    answers = [
        "42",
        "42.0",
        r"\frac{84}{2}",
        "6*7",
        "41",
        r"\sqrt{1764}",
        "x",
        "(1,2)",
        "no",
        "",
        "4 2",
        "5%",
        HANGS,
        "21!",
    ]
    golds = ["42", r"\sqrt{1764}", "(1,2)"]
    questions = [(rf"\boxed{{{answer}}}", gold) for answer in answers for gold in golds]
    expected = dict(zip(questions, pool.grade(*zip(*questions, strict=True)), strict=True))
    assert sum(verdict.correct for verdict in expected.values()) == 11

    def check(shared: GradingPool) -> None:
        shuffled = rng.sample(questions, len(questions))
        verdicts = shared.grade(*zip(*shuffled, strict=True))
        assert verdicts == [expected[question] for question in shuffled]

    for workers in (1, 3):
        with GradingPool(workers, cpu_seconds=0.5) as shared:
            failures: list[BaseException] = []

            def run(shared: GradingPool = shared, failures: list[BaseException] = failures) -> None:
                try:
                    check(shared)
                except BaseException as failure:
                    failures.append(failure)

            threads = [threading.Thread(target=run) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert failures == []


def test_numbers_need_no_process_and_get_the_same_verdict():
    numbers = ["0", "-0", "42", "42.0", "042", "+42", "-42", "41.999", "4.20", "9" * 300, "0." + "0" * 299 + "1"]
    pool = GradingPool(1)
    for answer in numbers:
        for gold in numbers:
            [verdict] = pool.grade([answer], [gold])
            judgement = judge(answer, gold)
            assert (
                verdict == _compare_numbers(answer, gold) == Verdict(judgement.correct, judgement.canonical, "graded")
            )
    assert pool._processes[0]._process is None


def test_an_answer_that_hangs_is_wrong_and_the_others_are_graded():
    responses = [
        r"\boxed{\frac{84}{2}}",
        rf"\boxed{{{HANGS}}}",
        r"\boxed{6 \cdot 7}",
        r"\boxed{2^{2^{2^{2^{2^2}}}}}",
        r"\boxed{40+x}",
    ]
    with GradingPool(1, cpu_seconds=1) as pool:
        verdicts = pool.grade(responses, ["42"] * 5)
    assert [verdict.status for verdict in verdicts] == ["graded", "timed_out", "graded", "timed_out", "graded"]
    assert [verdict.correct for verdict in verdicts] == [True, False, True, False, False]


def test_the_callers_alarm_is_left_alone(pool):
    rung = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert pool.grade([r"\boxed{x+1}"], ["1+x"])[0].correct
        while not rung:
            time.sleep(0.01)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_process_killed_from_outside_is_replaced_and_the_answer_graded():
    with GradingPool(1) as pool:
        assert pool.grade([r"\boxed{x+1}"], ["1+x"])[0].correct
        process = pool._processes[0]._process
        assert process is not None
        process.kill()
        process.wait()
        assert pool.grade([r"\boxed{x+2}"], ["2+x"])[0].correct


DIES_OF = """
import json, os, sys
json.loads(sys.stdin.readline())
print('"ready"', flush=True)
for line in sys.stdin:
    if "die" in line:
        os._exit(3)
    print('[true, "x"]', flush=True)
"""


def test_an_answer_that_crashes_is_wrong_and_the_others_are_graded(monkeypatch):
    monkeypatch.setattr(grading_pool, "_BOOTSTRAP", DIES_OF)
    with GradingPool(1) as pool:
        verdicts = pool.grade([r"\boxed{live}", r"\boxed{die}", r"\boxed{live on}"], ["x"] * 3)
    assert [verdict.status for verdict in verdicts] == ["graded", "crashed", "graded"]
    assert not verdicts[1].correct


def test_a_process_that_waits_instead_of_working_is_stopped_by_the_wall_limit(monkeypatch):
    monkeypatch.setattr(grading_pool, "_BOOTSTRAP", DIES_OF.replace("os._exit(3)", "__import__('time').sleep(3600)"))
    monkeypatch.setattr(grading_pool, "WALL_FACTOR", 1.0)
    process = GradingProcess(cpu_seconds=0.5)
    with pytest.raises(ProcessDiedError) as death:
        process.ask("die", "x")
    assert death.value.timed_out
    assert process.ask("live", "x") == (True, "x")
    process.stop()


def test_a_grader_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(grading_pool, "_BOOTSTRAP", "raise ImportError('no module named antlr4')")
    with GradingPool(1) as pool, pytest.raises(GraderStartError, match="no module named antlr4"):
        pool.grade([r"\boxed{x}"], ["x"])


def test_equal_answers_are_compared_once(monkeypatch, pool):
    asked = []
    monkeypatch.setattr(GradingProcess, "ask", lambda self, answer, gold: asked.append((answer, gold)) or (True, "1"))
    assert [verdict.correct for verdict in pool.grade([r"\boxed{x}"] * 100, ["x"] * 100)] == [True] * 100
    assert asked == [("x", "x")]


def test_a_pool_can_be_closed_twice_and_used_again():
    pool = GradingPool(1)
    for _ in range(2):
        assert pool.grade([r"\boxed{1+x}"], ["x+1"])[0].correct
        pool.close()
        pool.close()


def test_nothing_to_grade_gives_nothing(pool):
    assert pool.grade([], []) == []
    with pytest.raises(InputError, match="1 responses, 2 golds"):
        pool.grade(["1"], ["1", "2"])


@pytest.mark.parametrize("settings", [{"workers": 0}, {"cpu_seconds": 0.0}, {"cpu_seconds": float("inf")}])
def test_impossible_pools_are_refused(settings):
    with pytest.raises(ConfigError):
        GradingPool(**settings)


@pytest.mark.parametrize(
    ("correct", "answer", "status"),
    [(True, None, "no_answer"), (False, "1", "timed_out"), (False, None, "graded"), (False, None, "ok")],
)
def test_contradictory_verdicts_are_refused(correct, answer, status):
    with pytest.raises(ConfigError):
        Verdict(correct, answer, status)


@pytest.mark.parametrize(("count", "seed"), [(1000, 0), pytest.param(5000, 1, marks=pytest.mark.slow)])
def test_adversarial_answers_neither_hang_nor_crash(count, seed):
    answers = adversarial_answers(count, seed)
    with GradingPool(2, cpu_seconds=0.5) as pool:
        verdicts = pool.grade([rf"\boxed{{{answer}}}" for answer in answers], ["977"] * count)
        assert pool.grade([r"\boxed{\frac{84}{2}}"], ["42"])[0].correct
    assert [answer for answer, verdict in zip(answers, verdicts, strict=True) if verdict.status == "crashed"] == []
    assert [answer for answer, verdict in zip(answers, verdicts, strict=True) if verdict.correct] == []
    assert sum(verdict.status == "timed_out" for verdict in verdicts) < 25 + count / 50


def test_adversarial_golds_and_whole_responses_do_not_crash_either(pool):
    answers = [answer for answer in adversarial_answers(400, seed=1) if "^" not in answer and "!" not in answer][30:]
    verdicts = pool.grade(answers, answers[::-1])
    assert {verdict.status for verdict in verdicts} <= {"graded", "no_answer", "timed_out"}
