"""The generator of the embedded task: right answers, two styles, repeatable draws, and splits that never meet."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.tasks.chain import OPERATIONS, SPLITS, ChainTask, Problem

TASKS = st.integers(1, 16).flatmap(
    lambda longest: st.builds(
        ChainTask, operations=st.just(longest), operations_min=st.none() | st.integers(1, longest)
    )
)


def work_out(prompt: str) -> list[int]:
    """The values of a chain from its text alone, by counting: x7 adds the value seven times."""
    *operations, start = prompt.replace(",", " ").replace("=", " ").split()
    value, values = int(start), []
    for word in operations:
        kind, operand = word[0], int(word[1:])
        total = value if kind == "+" else 0
        for _ in range(operand):
            total += 1 if kind == "+" else value
        while total >= 10:
            total -= 10
        value = total
        values.append(value)
    return values


@settings(max_examples=40)
@given(task=TASKS, seed=st.integers(0, 2**32), split=st.sampled_from(SPLITS))
def test_every_trace_works_the_chain_of_its_prompt_and_ends_with_the_answer(task, seed, split):
    for problem in task.problems(8, seed, split):
        values = work_out(problem.prompt)
        words = problem.trace.split()
        assert words[0:-1:2] == list(problem.operations)
        assert words[1:-1:2] == [str(value) for value in values]
        assert words[-1] == "<eos>"
        assert problem.answer == words[-2] == str(values[-1])


@settings(max_examples=40)
@given(task=TASKS, seed=st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_and_a_longer_draw_begins_with_the_shorter(task, seed):
    assert task.problems(70, seed)[:8] == task.problems(8, seed)


def test_another_seed_gives_other_problems():
    task = ChainTask()
    assert set(task.problems(50, 0)).isdisjoint(task.problems(50, 1))


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


def test_one_prompt_in_eight_is_for_evaluation_and_the_split_does_not_favour_any_answer():
    """All 1,440 prompts of two operations. A share of 1/8 among n has the standard error sqrt(7 / 64 / n)."""
    problems = [Problem(start, chain) for start in range(10) for chain in itertools.product(OPERATIONS, repeat=2)]
    evaluation = [problem for problem in problems if problem.split == "evaluation"]
    assert abs(len(evaluation) / len(problems) - 1 / 8) < 4 * (7 / 64 / len(problems)) ** 0.5
    answers = Counter(problem.answer for problem in evaluation)
    expected = {answer: count / 8 for answer, count in Counter(problem.answer for problem in problems).items()}
    assert all(abs(answers[digit] - count) < 5 * count**0.5 for digit, count in expected.items())


def test_chains_of_different_lengths_are_as_likely_and_their_prompts_tell_them_apart():
    """5 lengths, 2,000 chains: 400 each, with a standard error of 18."""
    task = ChainTask(operations=6, operations_min=2)
    lengths = Counter(len(problem.operations) for problem in task.problems(2000, 0))
    assert sorted(lengths) == [2, 3, 4, 5, 6]
    assert all(abs(count - 400) < 90 for count in lengths.values())


def test_the_dataset_holds_the_problems_as_text():
    task = ChainTask(operations=5)
    problems = task.problems(40, 3, "evaluation")
    dataset = task.dataset(40, 3, "evaluation")
    assert dataset.column_names == ["prompt", "answer", "trace"]
    assert [tuple(row.values()) for row in dataset] == [(p.prompt, p.answer, p.trace) for p in problems]


def test_wrong_arguments_are_refused():
    with pytest.raises(ConfigError, match="operations must be at least 1, got 0"):
        ChainTask(operations=0)
    with pytest.raises(ConfigError, match=r"operations_min must lie in \[1, 3\], got 4"):
        ChainTask(operations=3, operations_min=4)
    task = ChainTask(operations=2)
    with pytest.raises(InputError, match="split must be one of train, evaluation, got 'test'"):
        task.problems(1, 0, "test")
    with pytest.raises(InputError, match="at least 0, got -1"):
        task.problems(-1, 0)
