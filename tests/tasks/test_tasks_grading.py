"""The grader: the digit just before the first end."""

import pytest

from prune_opd_hf.tasks import extract_answer, is_correct


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
