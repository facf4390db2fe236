"""The tokenizer of the embedded task: one id a word, nothing lost on the way there and back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from prune_opd_hf.tasks import ChainTask, load_tokenizer
from prune_opd_hf.tasks.chain import FILLERS

TOKENIZER = load_tokenizer()
VOCABULARY = TOKENIZER.convert_ids_to_tokens(range(64))


def test_there_are_64_ids_one_for_each_word_and_the_special_ones_differ():
    assert len(TOKENIZER) == len(set(VOCABULARY)) == 64
    assert TOKENIZER.convert_tokens_to_ids(VOCABULARY) == list(range(64))
    assert len({TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id}) == 4


@settings(max_examples=50)
@given(operations=st.integers(1, 14), fillers=st.lists(st.sampled_from(FILLERS)), seed=st.integers(0, 2**32))
def test_prompts_and_responses_survive_encoding_and_decoding(operations, fillers, seed):
    task = ChainTask(operations=operations)
    [problem] = task.problems(1, seed)
    for trace in (problem.trace, problem.drifting_trace(operations // 2, fillers)):
        prompt_ids = TOKENIZER(problem.prompt).input_ids
        response_ids = TOKENIZER(trace, add_special_tokens=False).input_ids
        assert len(prompt_ids) == task.prompt_tokens
        assert prompt_ids[0] == TOKENIZER.bos_token_id
        assert TOKENIZER.decode(prompt_ids, skip_special_tokens=True) == problem.prompt
        assert TOKENIZER.decode(response_ids) == trace
        assert response_ids[-1] == TOKENIZER.eos_token_id
        assert TOKENIZER.unk_token_id not in prompt_ids + response_ids


def test_a_prompt_of_twelve_operations_has_27_ids_and_its_words_in_order():
    prompt = ChainTask().problems(1, 0)[0].prompt
    ids = TOKENIZER(prompt).input_ids
    assert len(ids) == 27
    assert [VOCABULARY[index] for index in ids] == ["<bos>", *prompt.split()]


def test_a_batch_is_padded_on_the_left_and_the_mask_says_so():
    batch = TOKENIZER([", +3 = 4", ", +3 , x7 = 4"], padding=True)
    assert [len(ids) for ids in batch.input_ids] == [7, 7]
    assert batch.input_ids[0][:2] == [TOKENIZER.pad_token_id] * 2
    assert batch.attention_mask == [[0, 0, 1, 1, 1, 1, 1], [1] * 7]


@pytest.mark.parametrize("class_name", ["AutoTokenizer", "PreTrainedTokenizerFast"])
def test_saving_and_loading_keeps_ids_tokens_padding_and_length(tmp_path, class_name):
    TOKENIZER.save_pretrained(tmp_path)
    loader = AutoTokenizer if class_name == "AutoTokenizer" else type(TOKENIZER)
    assert_same_tokenizer(loader.from_pretrained(tmp_path))


def test_a_word_it_does_not_know_becomes_the_unknown_token():
    assert TOKENIZER(", /2 = 4", add_special_tokens=False).input_ids[1] == TOKENIZER.unk_token_id


def assert_same_tokenizer(loaded):
    text = ", +3 , x7 = 4"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.special_tokens_map == TOKENIZER.special_tokens_map
    assert (loaded.padding_side, loaded.model_max_length) == ("left", 512)
    assert loaded.decode(loaded(text).input_ids) == f"<bos> {text}"
