"""The generator of the embedded task: right answers, two styles, repeatable draws, and splits that never meet."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.tasks.chain import FILLERS, OPERATIONS, SPLITS, ChainTask, Problem


@st.composite
def tasks(draw):
    operations = draw(st.integers(1, 16))
    prefix_min = draw(st.integers(0, operations - 1))
    filler_min = draw(st.integers(0, 10))
    return ChainTask(
        operations=operations,
        modulus=draw(st.integers(2, 10)),
        drift_first=draw(st.floats(0, 1)),
        drift_later=draw(st.floats(0, 1)),
        prefix_min=prefix_min,
        prefix_max=draw(st.none() | st.integers(prefix_min, operations - 1)),
        filler_min=filler_min,
        filler_max=draw(st.integers(filler_min, 12)),
        filler_kinds=draw(st.integers(1, len(FILLERS))),
    )


def work_out(prompt: str, modulus: int) -> list[int]:
    """The values of a chain from its text alone, by counting: x7 adds the value seven times."""
    *operations, start = prompt.replace(",", " ").replace("=", " ").split()
    value, values = int(start), []
    for word in operations:
        kind, operand = word[0], int(word[1:])
        total = value if kind == "+" else 0
        for _ in range(operand):
            total += 1 if kind == "+" else value
        while total >= modulus:
            total -= modulus
        value = total
        values.append(value)
    return values


@settings(max_examples=40, deadline=None)
@given(task=tasks(), seed=st.integers(0, 2**32), split=st.sampled_from(SPLITS))
def test_every_trace_works_the_chain_of_its_prompt_and_ends_with_the_answer(task, seed, split):
    for problem in task.problems(8, seed, split):
        values = work_out(problem.prompt, task.modulus)
        words = problem.trace.split()
        assert words[0:-1:2] == list(problem.operations)
        assert words[1:-1:2] == [str(value) for value in values]
        assert words[-1] == "<eos>"
        assert problem.answer == words[-2] == str(values[-1])


@settings(max_examples=40, deadline=None)
@given(task=tasks(), seed=st.integers(0, 2**32))
def test_a_drifting_trace_is_a_clean_prefix_then_fillers_then_the_right_answer(task, seed):
    problems = task.problems(8, seed)
    for problem, trace in zip(problems, task.mixed_traces(problems, seed), strict=True):
        words = trace.split()
        assert len(words) <= task.longest_response_tokens
        if "HMM" not in words:
            assert trace == problem.trace
            continue
        turn = words.index("HMM")
        fillers, ending = words[turn + 1 : -3], words[-3:]
        assert words[:turn] == problem.trace.split()[:turn]
        assert turn % 2 == 0
        assert task.prefix_min <= turn // 2 <= task.last_prefix
        assert task.filler_min <= len(fillers) <= task.filler_max
        assert set(fillers) <= set(FILLERS[: task.filler_kinds])
        assert ending == ["ANS", problem.answer, "<eos>"]


@settings(max_examples=40, deadline=None)
@given(task=tasks(), seed=st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_and_a_longer_draw_begins_with_the_shorter(task, seed):
    long, short = task.problems(70, seed), task.problems(8, seed)
    assert long[:8] == short
    assert task.mixed_traces(short, seed) == task.mixed_traces(short, seed)


def test_another_seed_gives_other_problems_and_other_traces():
    task = ChainTask()
    problems = task.problems(50, 0)
    assert set(problems).isdisjoint(task.problems(50, 1))
    assert task.mixed_traces(problems, 0) != task.mixed_traces(problems, 1)


def test_a_generator_goes_on_where_it_was_and_repeats_from_its_seed():
    task = ChainTask(operations=3)
    generator = torch.Generator().manual_seed(7)
    first, second = task.problems(10, generator), task.problems(10, generator)
    assert first == task.problems(10, 7)
    assert first != second


def test_no_prompt_is_in_both_splits_even_where_the_seeds_exhaust_all_prompts():
    """One operation: 12 x 10 = 120 prompts. 1,000 draws from either split see all of its own and none of the other."""
    task = ChainTask(operations=1)
    train = {problem.prompt for problem in task.problems(1000, 0, "train")}
    evaluation = {problem.prompt for problem in task.problems(1000, 0, "evaluation")}
    every = {Problem(start, (word,)).prompt for start, word in itertools.product(range(10), OPERATIONS)}
    assert train.isdisjoint(evaluation)
    assert train | evaluation == every
    assert len(every) == 120


@pytest.mark.parametrize("modulus", range(2, 11))
def test_both_splits_have_prompts_even_for_the_shortest_chain(modulus):
    task = ChainTask(operations=1, modulus=modulus)
    assert all(len(task.problems(1, 0, split)) == 1 for split in SPLITS)


def test_one_prompt_in_eight_is_for_evaluation_and_the_split_does_not_favour_any_answer():
    """All 1,440 prompts of two operations. A share of 1/8 among n has the standard error sqrt(7 / 64 / n)."""
    problems = [Problem(start, chain) for start in range(10) for chain in itertools.product(OPERATIONS, repeat=2)]
    evaluation = [problem for problem in problems if problem.split == "evaluation"]
    assert abs(len(evaluation) / len(problems) - 1 / 8) < 4 * (7 / 64 / len(problems)) ** 0.5
    answers = Counter(problem.answer for problem in evaluation)
    expected = {answer: count / 8 for answer, count in Counter(problem.answer for problem in problems).items()}
    assert all(abs(answers[digit] - count) < 5 * count**0.5 for digit, count in expected.items())


def test_the_share_of_drifting_traces_is_the_one_the_probabilities_give():
    """Passing all 12 opportunities: .2 x .95^11 = .114, so .886 drift; the standard error over 1,500 traces is .0082."""
    task = ChainTask()
    traces = task.mixed_traces(task.problems(1500, 0), 0)
    turns = [trace.split().index("HMM") // 2 for trace in traces if "HMM" in trace.split()]
    assert task.drifting_share == pytest.approx(1 - 0.2 * 0.95**11)
    assert len(turns) / 1500 == pytest.approx(task.drifting_share, abs=4 * 0.0082)
    assert turns.count(0) / 1500 == pytest.approx(0.8, abs=4 * 0.0103)
    assert turns.count(1) / 1500 == pytest.approx(0.2 * 0.05, abs=4 * 0.0026)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 30)])
def test_probabilities_of_zero_and_one_give_no_and_only_drifting_traces(share, expected):
    task = ChainTask(operations=4, drift_first=share, drift_later=share)
    traces = task.mixed_traces(task.problems(30, 0), 0)
    assert sum(trace.startswith("HMM") for trace in traces) == expected


def test_the_longest_response_is_reached_and_never_passed():
    """Drift only before the last of 4 operations with 9 fillers: 3 x 2 + HMM + 9 + ANS, digit, end = 19 tokens."""
    task = ChainTask(operations=4, drift_first=1, prefix_min=3, filler_min=9, filler_max=9)
    lengths = {len(trace.split()) for trace in task.mixed_traces(task.problems(30, 0), 0)}
    assert lengths == {task.longest_response_tokens} == {19}


def test_the_dataset_holds_the_problems_as_text():
    task = ChainTask(operations=5)
    problems = task.problems(40, 3, "evaluation")
    dataset = task.dataset(40, 3, "evaluation")
    assert dataset.column_names == ["prompt", "answer", "trace"]
    assert [tuple(row.values()) for row in dataset] == [(p.prompt, p.answer, p.trace) for p in problems]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operations": 0}, "operations must be at least 1, got 0"),
        ({"operations": True}, "operations must be a whole number, got True"),
        ({"modulus": 11}, r"modulus must lie in \[2, 10\]"),
        ({"modulus": True}, "modulus must be a whole number, got True"),
        ({"drift_first": 1.5}, r"drift_first is a probability .* got 1.5"),
        ({"drift_later": float("nan")}, r"drift_later is a probability .* got nan"),
        ({"prefix_min": -1}, "0 <= prefix_min"),
        ({"prefix_min": 3, "prefix_max": 2}, "prefix_min 3, prefix_max 2"),
        ({"prefix_max": 12}, "prefix_max 12, operations 12"),
        ({"prefix_max": False}, "prefix_max must be a whole number, got False"),
        ({"filler_min": 5, "filler_max": 4}, "got 5 and 4"),
        ({"filler_kinds": 0}, r"filler_kinds must lie in \[1, 34\], got 0"),
        ({"filler_kinds": 35}, r"filler_kinds must lie in \[1, 34\], got 35"),
    ],
)
def test_settings_outside_their_range_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        ChainTask(**settings)


def test_wrong_arguments_are_refused():
    task = ChainTask(operations=2)
    with pytest.raises(InputError, match="split must be one of train, evaluation, got 'test'"):
        task.problems(1, 0, "test")
    with pytest.raises(InputError, match="at least 0, got -1"):
        task.problems(-1, 0)
    with pytest.raises(InputError, match=r"\[0, 2\], the operations, got 3"):
        task.problems(1, 0)[0].drifting_trace(3, [])
