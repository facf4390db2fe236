"""Which ids student and teacher share, by their tokenizers: ordinary tokens must agree, renamed special ones may be left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import SPECIAL, byte_tokenizer

from prune_opd_hf.errors import VocabularyMismatchError
from prune_opd_hf.models.vocabulary import RenamedToken, id_tensor, shared_vocabulary, without_ids

EXAMPLES = settings(max_examples=60)


class Tokenizer:
    """All that the check may ask of a tokenizer."""

    def __init__(self, ids_of_tokens, special=(), eos=None):
        self.ids_of_tokens, self.added_tokens_decoder, self.eos_token_id = ids_of_tokens, dict.fromkeys(special), eos

    def get_vocab(self):
        return dict(self.ids_of_tokens)


def words(count):
    return {f"word{index}": index for index in range(count)}


@EXAMPLES
@given(st.integers(1, 30), st.integers(1, 30))
def test_one_vocabulary_may_go_on_beyond_the_other(student, teacher):
    shared = shared_vocabulary(Tokenizer(words(student)), Tokenizer(words(teacher)))
    assert (shared.size, shared.excluded_ids) == (min(student, teacher), ())


@EXAMPLES
@given(st.sets(st.integers(0, 19), min_size=1), st.booleans(), st.booleans())
def test_the_first_ordinary_id_that_differs_is_named_with_both_meanings(changed, student_differs, allowed):
    plain = words(20)
    other = {f"other{index}" if index in changed else token: index for token, index in plain.items()}
    pair = [Tokenizer(other), Tokenizer(plain)] if student_differs else [Tokenizer(plain), Tokenizer(other)]
    first = min(changed)
    meanings = [f"other{first}", f"word{first}"] if student_differs else [f"word{first}", f"other{first}"]
    message = f"token id {first} is {meanings[0]!r} for the student and {meanings[1]!r} for the teacher"
    with pytest.raises(VocabularyMismatchError, match=message) as refusal:
        shared_vocabulary(*pair, allow_renamed_special_tokens=allowed)
    assert "allow_renamed" not in str(refusal.value)  # which would not help


def test_the_order_in_which_a_vocabulary_is_listed_does_not_matter():
    backwards = dict(reversed(words(9).items()))
    assert shared_vocabulary(Tokenizer(words(9)), Tokenizer(backwards)).size == 9


def test_an_id_that_neither_uses_is_shared_and_one_that_only_one_uses_is_not():
    with_hole = {"a": 0, "c": 2}
    assert shared_vocabulary(Tokenizer(with_hole), Tokenizer(with_hole)).size == 3
    with pytest.raises(VocabularyMismatchError, match="token id 1 is None for the student and 'b' for the teacher"):
        shared_vocabulary(Tokenizer(with_hole), Tokenizer({"a": 0, "b": 1, "c": 2}))


def test_equal_size_does_not_prove_equal_vocabulary():
    swapped = {"word1": 0, "word0": 1}
    with pytest.raises(VocabularyMismatchError, match="token id 0"):
        shared_vocabulary(Tokenizer(words(2)), Tokenizer(swapped))


# ---------------------------------------------------------------------- renamed special tokens: trl 4562, trl 3028, R1 30


@EXAMPLES
@given(st.sets(st.integers(0, 19)), st.sets(st.integers(0, 19)), st.sets(st.integers(0, 19)))
def test_only_ids_that_are_special_wherever_they_are_known_may_be_renamed(changed, of_student, of_teacher):
    plain, other = words(20), {f"other{index}" if index in changed else f"word{index}": index for index in range(20)}
    pair = Tokenizer(plain, of_student), Tokenizer(other, of_teacher)
    if changed <= of_student & of_teacher:
        shared = shared_vocabulary(*pair, allow_renamed_special_tokens=True)
        assert shared.renamed == tuple(
            RenamedToken(index, f"word{index}", f"other{index}") for index in sorted(changed)
        )
        assert (shared.size, shared.excluded_ids) == (20, tuple(sorted(changed)))
        return
    first = min(changed - (of_student & of_teacher))
    with pytest.raises(VocabularyMismatchError, match=f"token id {first} is 'word{first}'"):
        shared_vocabulary(*pair, allow_renamed_special_tokens=True)


def test_an_added_token_of_one_where_the_other_has_none_is_left_out():
    known, with_hole = {"a": 0, "<x>": 1, "c": 2}, {"a": 0, "c": 2}
    for pair in ((Tokenizer(known, [1]), Tokenizer(with_hole)), (Tokenizer(with_hole), Tokenizer(known, [1]))):
        assert shared_vocabulary(*pair, allow_renamed_special_tokens=True).excluded_ids == (1,)


def test_a_pair_that_differs_in_special_tokens_alone_is_told_of_the_option():
    other = byte_tokenizer(special=[*SPECIAL[:2], "<|human|>", *SPECIAL[3:]])
    with pytest.raises(VocabularyMismatchError) as refusal:
        shared_vocabulary(byte_tokenizer(), other)
    assert "token id 2 is '<|user|>' for the student and '<|human|>' for the teacher" in str(refusal.value)
    assert "1 added or special tokens alone: set allow_renamed_special_tokens" in str(refusal.value)
    shared = shared_vocabulary(byte_tokenizer(), other, allow_renamed_special_tokens=True)
    assert (shared.size, shared.excluded_ids) == (len(SPECIAL) + 256, (2,))
    assert "token id 2 is '<|user|>' for the student and '<|human|>'" in shared.describe()


def test_what_ends_a_response_of_both_is_shared_whatever_it_is_called():
    plain, other = {"a": 0, "</s>": 1, "<x>": 2}, {"a": 0, "<eos>": 1, "<y>": 2}
    ends_differ = Tokenizer(plain, [1, 2], eos=1), Tokenizer(other, [1, 2], eos=2)
    both_end = Tokenizer(plain, [1, 2], eos=1), Tokenizer(other, [1, 2], eos=1)
    allowed = {"allow_renamed_special_tokens": True}
    assert shared_vocabulary(*ends_differ, **allowed).excluded_ids == (1, 2)
    assert shared_vocabulary(*both_end, **allowed).excluded_ids == (2,)
    assert shared_vocabulary(*ends_differ, **allowed).with_shared({1}).excluded_ids == (2,)


def test_many_renamed_tokens_are_counted_and_the_first_named():
    plain, other = words(30), {f"other{index}": index for index in range(30)}
    shared = shared_vocabulary(
        Tokenizer(plain, range(30)), Tokenizer(other, range(30)), allow_renamed_special_tokens=True
    )
    assert "30 renamed special tokens" in shared.describe()
    assert "token id 11 is" in shared.describe()
    assert "token id 12 is" not in shared.describe()
    assert "and 18 more" in shared.describe()


def test_logits_without_ids_are_those_of_a_smaller_vocabulary():
    logits = torch.randn(2, 6)
    assert without_ids(logits, id_tensor((), logits.device)) is logits
    kept = [0, 1, 3, 5]
    probs = without_ids(logits, id_tensor((2, 4), logits.device)).softmax(-1)
    torch.testing.assert_close(probs[:, kept], logits[:, kept].softmax(-1))
    assert not probs[:, [2, 4]].any()
