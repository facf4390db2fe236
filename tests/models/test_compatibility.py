"""Special tokens and context: one answer each, and one line where there is none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.models.compatibility import (
    check_context,
    context_length,
    ensure_pad_token,
    special_token_ids,
)

EXAMPLES = settings(max_examples=60)


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
