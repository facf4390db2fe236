"""Vocabulary, special tokens, context and loading: one answer each, and one line where there is none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from prune_opd_hf.errors import ConfigError, InputError, VocabularyMismatchError
from prune_opd_hf.models.compatibility import (
    check_context,
    context_length,
    ensure_pad_token,
    load_causal_lm,
    load_tokenizer,
    published_name,
    shared_vocabulary_size,
    special_token_ids,
)

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


class Ends:
    """A tokenizer's special tokens."""

    def __init__(self, eos_token_id=None, pad_token_id=None):
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id
        self.eos_token = None if eos_token_id is None else f"<{eos_token_id}>"

    @property
    def pad_token(self):
        return None if self.pad_token_id is None else f"<{self.pad_token_id}>"

    @pad_token.setter
    def pad_token(self, token):
        self.pad_token_id = None if token is None else int(token[1:-1])


@pytest.mark.parametrize(
    ("generation_config", "tokenizer", "config", "expected"),
    [
        ([7, 5], 3, 2, (7, 5)),
        (7, 3, 2, (7,)),
        (0, 3, 2, (0,)),  # token 0 is a token
        (None, 3, 2, (3,)),
        ([], 3, 2, (3,)),  # an empty list names none
        (None, None, 2, (2,)),
        (None, None, None, ()),
    ],
)
def test_special_tokens_come_from_the_first_that_names_any(generation_config, tokenizer, config, expected):
    model = tiny_model("qwen3", 0, eos=config)
    model.generation_config.eos_token_id = generation_config
    assert special_token_ids("eos_token_id", model, Ends(tokenizer)) == expected
    assert special_token_ids("eos_token_id", model, Ends(tokenizer), given=[]) == ()  # the user chose that nothing ends


def test_a_tokenizer_without_padding_pads_with_its_end():
    tokenizer = Ends(eos_token_id=5)
    assert ensure_pad_token(tokenizer) == tokenizer.pad_token_id == 5
    assert ensure_pad_token(Ends(eos_token_id=5, pad_token_id=0)) == 0
    with pytest.raises(ConfigError, match="neither a padding nor an EOS token"):
        ensure_pad_token(Ends())


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_the_context_is_found_by_whatever_name_the_family_gives_it(family):
    assert context_length(tiny_model(family, 0, max_position_embeddings=96)) == 96


@EXAMPLES
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60))
def test_what_fits_a_context_passes_and_the_cap_that_a_refusal_names_fits(prompt, completion, context):
    if prompt + completion <= context:
        check_context(context, prompt, completion, role="student")
        return
    with pytest.raises(ConfigError, match=f"student's context of {context}") as refusal:
        check_context(context, prompt, completion, role="student")
    if prompt < context:
        room = int(str(refusal.value).rpartition("lower max_completion_length to ")[2])
        check_context(context, prompt, room, role="student")
        with pytest.raises(ConfigError):
            check_context(context, prompt, room + 1, role="student")
    else:
        assert "no room for a response" in str(refusal.value)


def test_a_model_without_a_limit_takes_any_length():
    check_context(None, 10**9, 10**9, role="teacher")


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
@pytest.mark.parametrize(
    "config",
    ["{", "[]", "null", "{}", '{"model_type": "no such model"}', '{"model_type": "qwen3", "hidden_size": "a"}'],
)
def test_what_cannot_be_loaded_is_one_line_that_names_it(tmp_path, load, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match="cannot load the teacher") as refusal:
        load(tmp_path, "teacher")
    assert str(tmp_path) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert refusal.value.__cause__ is not None


@pytest.mark.parametrize("name", ["./nothing", "../nothing", "~/nothing", "runs/a/nothing", "/nothing", "."])
def test_a_path_without_a_folder_is_no_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refusal:
        load_causal_lm(name)
    reason = "no such folder" if name != "." else "Unrecognized model"
    assert str(refusal.value).startswith(f"cannot load the model {name!r}: {reason}")


def test_a_file_is_no_model_folder(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(InputError, match=r"model\.bin': it is a file, no folder"):
        load_causal_lm(tmp_path / "model.bin")


def test_weights_cut_short_are_one_line(tmp_path):
    tiny_model("qwen3", 0).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot load the student"):
        load_causal_lm(tmp_path, "student")


def test_arguments_reach_the_loader(tmp_path):
    saved = tiny_model("qwen3", 0)
    saved.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.get_input_embeddings().weight, saved.get_input_embeddings().weight.bfloat16())


def test_a_published_name_holds_no_path_of_this_machine(tmp_path, monkeypatch):
    folder = tmp_path / "team" / "student"
    folder.mkdir(parents=True)
    assert published_name("owner/model") == "owner/model"
    assert published_name("gpt2") == "gpt2"
    monkeypatch.chdir(tmp_path)
    for name in (
        folder,
        "team/student",
        "./team/student/",
        "~/elsewhere/student",
    ):  # the second has the form of a Hub id
        assert published_name(name) == "student"
    monkeypatch.chdir(folder)
    assert published_name(".") == "student"
    model = tiny_model("qwen3", 0)
    assert published_name(model) is None
    model.config._name_or_path = str(folder)
    assert published_name(model) == "student"
