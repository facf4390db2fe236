"""The grader: the digit just before the first end, in text and in token ids alike."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd_hf.tasks import ChainTask, build_tokenizer, correct_tokens, extract_answer, is_correct, is_drifting
from prune_opd_hf.tasks.tokenizer import VOCABULARY

TOKENIZER = build_tokenizer()


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("+3 7 x7 9 <eos>", "9"),
        ("+3 7 x7 9 <eos> <pad> <pad>", "9"),
        ("HMM wait so ANS 4 <eos>", "4"),
        ("HMM wait 4 <eos>", "4"),
        ("7 <eos>", "7"),
        ("+3 7 <eos> 8 <eos>", "7"),
        ("+3 7 x7 9", None),
        ("+3 7 x7 9 <pad>", None),
        ("+3 7 x7 <eos>", None),
        ("<eos>", None),
        ("<eos> 7 <eos>", None),
        ("", None),
    ],
)
def test_the_answer_is_the_digit_before_the_first_end(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "ended", "answer"),
    [
        ("+3 7 x7 9", True, "9"),
        ("+3 7 x7 9", False, None),
        ("+3 7 x7", True, None),
        ("", True, None),
        ("+3 7 <eos>", True, "7"),
        ("+3 7 <eos>", False, None),
    ],
)
def test_text_without_special_tokens_needs_to_be_told_that_it_ended(response, ended, answer):
    assert extract_answer(response, ended=ended) == answer


@pytest.mark.parametrize("answer", ["7", "+7", " 7", ""])
def test_only_the_exact_digit_is_correct(answer):
    assert is_correct("+3 7 <eos>", answer) == (answer == "7")
    assert not is_correct("+3 7", answer)


def test_every_trace_of_either_style_is_correct_and_only_style_b_is_drifting():
    task = ChainTask(operations=4)
    problems = task.problems(60, 0)
    for problem, trace in zip(problems, task.mixed_traces(problems, 0), strict=True):
        assert is_correct(problem.trace, problem.answer)
        assert is_correct(trace, problem.answer)
        assert is_drifting(trace) == (trace != problem.trace)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(st.sampled_from([0, 2, 6, 10, 11, 20]), max_size=6), min_size=1, max_size=5),
    answer=st.sampled_from(["2", "3"]),
)
def test_token_ids_are_graded_like_their_text(rows, answer):
    """Ids: 0 padding, 2 the end, 6 HMM, 10 and 11 the digits 2 and 3, 20 an operation."""
    assert [VOCABULARY[index] for index in (0, 2, 6, 10, 11, 20)] == ["<pad>", "<eos>", "HMM", "2", "3", "+3"]
    width = 1 + max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[position < len(row) for position in range(width)] for row in rows])
    answer_ids = torch.full((len(rows),), VOCABULARY.index(answer))
    expected = [is_correct(TOKENIZER.decode(row), answer) for row in rows]
    assert correct_tokens(ids, mask, answer_ids, eos_token_id=2).tolist() == expected


def test_tokens_outside_the_mask_do_not_count():
    ids = torch.tensor([[10, 2], [10, 2], [10, 2]])
    mask = torch.tensor([[True, True], [True, False], [False, True]])
    assert correct_tokens(ids, mask, torch.tensor([10, 10, 10]), eos_token_id=2).tolist() == [True, False, False]
