"""Which tokens end a response: whatever student or teacher names, as far as both know it, with who names it."""

from types import SimpleNamespace

import pytest
from tiny_models import tiny_model

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.models.end_tokens import find_end_tokens


def model_that_ends(generation_config, config=None):
    model = tiny_model("qwen3", 0, eos=config)
    model.generation_config.eos_token_id = generation_config
    return model


def tokenizer(eos):
    return SimpleNamespace(eos_token_id=eos, convert_ids_to_tokens=lambda token: f"<{token}>" if token < 30 else None)


# modelscope/ms-swift#9526 (Base student, Instruct teacher), QwenLM/Qwen3#927 (config and tokenizer of one model differ),
# huggingface/open-r1#663 (a student trained to end turns whose generation config does not say so)
@pytest.mark.parametrize(
    ("student", "its_tokenizer", "teacher", "teachers_tokenizer", "expected"),
    [
        ([2], None, [6, 2], None, (2, 6)),
        ([2], 6, [2], 6, (2, 6)),
        (2, 6, (), None, (2, 6)),  # the teacher names none, as a served one may
        ([2], 2, [2], 2, (2,)),
        (None, None, [6], None, (6,)),
        (0, None, (), None, (0,)),  # token 0 is a token
        ([], 3, (), None, (3,)),
        ([7, 5], 3, [5], 9, (7, 5, 3, 9)),
    ],
)
def test_a_response_ends_where_student_or_teacher_ends_one(
    student, its_tokenizer, teacher, teachers_tokenizer, expected
):
    end_tokens = find_end_tokens(
        model_that_ends(student),
        tokenizer(its_tokenizer),
        role="student",
        teacher_ids=teacher,
        teacher_tokenizers=[tokenizer(teachers_tokenizer)],
        shared=40,
    )
    assert end_tokens.token_ids == expected


def test_each_end_says_who_names_it():
    end_tokens = find_end_tokens(
        model_that_ends([2]),
        tokenizer(6),
        role="student",
        teacher_ids=[6, 2],
        teacher_tokenizers=[tokenizer(6)],
        shared=9,
    )
    assert end_tokens.describe(tokenizer(6)) == (
        "'<2>' 2 (the student's generation config, the teacher), "
        "'<6>' 6 (the student's tokenizer, the teacher, the teacher's tokenizer)"
    )
    assert (end_tokens.named_by_role("student"), end_tokens.named_by_role("teacher")) == ((2, 6), (2, 6))


def test_a_role_is_not_taken_for_another_whose_name_begins_alike():
    found = find_end_tokens(model_that_ends([2]), role="teacher's successor", teacher_ids=[6], shared=9)
    assert (found.named_by_role("teacher"), found.named_by_role("teacher's successor")) == ((6,), (2,))


def test_every_tokenizer_of_several_teachers_is_asked():
    tokenizers = [tokenizer(6), None, tokenizer(8), tokenizer(6)]
    found = find_end_tokens(model_that_ends([2]), tokenizer(2), role="student", teacher_tokenizers=tokenizers, shared=9)
    assert found.token_ids == (2, 6, 8)


def test_the_models_config_is_asked_only_where_nothing_else_names_an_end():
    assert find_end_tokens(model_that_ends(None, config=2)).token_ids == (2,)
    assert find_end_tokens(model_that_ends(None, config=2), tokenizer(3)).token_ids == (3,)
    assert find_end_tokens(model_that_ends(7, config=2)).token_ids == (7,)


def test_an_end_that_not_both_know_is_left_out_and_named():
    end_tokens = find_end_tokens(model_that_ends([3, 40]), tokenizer(3), role="student", teacher_ids=[50], shared=40)
    assert end_tokens.token_ids == (3,)
    assert end_tokens.describe(tokenizer(3)).endswith("left out, since not both models know it: 40, 50")


def test_the_setting_takes_the_place_of_everybody_else():
    given = {"teacher_ids": [6], "shared": 40}
    assert find_end_tokens(model_that_ends([2]), tokenizer(3), given=9, **given).token_ids == (9,)
    assert find_end_tokens(model_that_ends([2]), tokenizer(3), given=[9, 2], **given).token_ids == (9, 2)
    for nonsense in ([], [40]):
        with pytest.raises(ConfigError, match="eos_token_id must name tokens below 40"):
            find_end_tokens(model_that_ends([2]), tokenizer(3), given=nonsense, **given)


def test_a_model_that_nobody_knows_an_end_of_is_refused():
    with pytest.raises(ConfigError, match="names a token that ends a response"):
        find_end_tokens(model_that_ends(None), tokenizer(None))


def test_ends_of_which_both_models_know_none_are_refused():
    with pytest.raises(ConfigError, match="token 40, which lies outside the 40 ids"):
        find_end_tokens(model_that_ends([40, 41]), role="student", shared=40)
