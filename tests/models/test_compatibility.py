"""The vocabulary check: ids against ids, whatever the sizes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd_hf.errors import VocabularyMismatchError
from prune_opd_hf.models.compatibility import shared_vocabulary_size

EXAMPLES = settings(deadline=None, max_examples=60)


class Tokenizer:
    """All that the check may ask of a tokenizer."""

    def __init__(self, ids_of_tokens):
        self.ids_of_tokens = ids_of_tokens

    def get_vocab(self):
        return dict(self.ids_of_tokens)


def words(count):
    return {f"word{index}": index for index in range(count)}


@EXAMPLES
@given(st.integers(1, 30), st.integers(1, 30))
def test_one_vocabulary_may_go_on_beyond_the_other(student, teacher):
    assert shared_vocabulary_size(Tokenizer(words(student)), Tokenizer(words(teacher))) == min(student, teacher)


@EXAMPLES
@given(st.sets(st.integers(0, 19), min_size=1), st.booleans())
def test_the_first_id_that_differs_is_named_with_both_meanings(changed, student_differs):
    plain = words(20)
    other = {f"other{index}" if index in changed else token: index for token, index in plain.items()}
    pair = [Tokenizer(other), Tokenizer(plain)] if student_differs else [Tokenizer(plain), Tokenizer(other)]
    first = min(changed)
    meanings = [f"other{first}", f"word{first}"] if student_differs else [f"word{first}", f"other{first}"]
    message = f"token id {first} is {meanings[0]!r} for the student and {meanings[1]!r} for the teacher"
    with pytest.raises(VocabularyMismatchError, match=message):
        shared_vocabulary_size(*pair)


def test_the_order_in_which_a_vocabulary_is_listed_does_not_matter():
    backwards = dict(reversed(words(9).items()))
    assert shared_vocabulary_size(Tokenizer(words(9)), Tokenizer(backwards)) == 9


def test_an_id_that_neither_uses_is_shared_and_one_that_only_one_uses_is_not():
    with_hole = {"a": 0, "c": 2}
    assert shared_vocabulary_size(Tokenizer(with_hole), Tokenizer(with_hole)) == 3
    with pytest.raises(VocabularyMismatchError, match="token id 1 is None for the student and 'b' for the teacher"):
        shared_vocabulary_size(Tokenizer(with_hole), Tokenizer({"a": 0, "b": 1, "c": 2}))


def test_equal_size_does_not_prove_equal_vocabulary():
    swapped = {"word1": 0, "word0": 1}
    with pytest.raises(VocabularyMismatchError, match="token id 0"):
        shared_vocabulary_size(Tokenizer(words(2)), Tokenizer(swapped))
