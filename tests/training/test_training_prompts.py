"""Prompts as token ids."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from prune_opd_hf.errors import InputError
from prune_opd_hf.generation.prompts import left_padded
from prune_opd_hf.tasks import ChainTask, load_tokenizer
from prune_opd_hf.training.prompts import (
    DroppedPrompts,
    RepeatSampler,
    prompt_token_ids,
    repeat_rows,
    tokenize_prompts,
    unpadded_prompts,
)

PROMPTS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5)


@given(PROMPTS, PROMPTS)
def test_padded_batches_hold_their_prompts(first, second):
    batches = []
    for prompts in (first, second):
        ids, mask = left_padded(prompts, 0, torch.device("cpu"))
        batches.append({"input_ids": ids, "attention_mask": mask})
    assert unpadded_prompts(batches) == [tuple(prompt) for prompt in first + second]


@pytest.mark.parametrize("prompt", [7, ["text"], [{"content": "no role"}], None])
def test_a_prompt_that_is_neither_text_nor_messages_is_refused(prompt):
    with pytest.raises(InputError, match="text or a list of messages"):
        prompt_token_ids(prompt, load_tokenizer(), {})


def test_a_dataset_without_prompts_names_its_columns():
    with pytest.raises(InputError, match="it has question"):
        tokenize_prompts(
            Dataset.from_dict({"question": ["a"]}), load_tokenizer(), max_prompt_length=None, chat_template_kwargs={}
        )


def test_a_streamed_dataset_is_tokenized_and_filtered_as_it_comes():
    stream = ChainTask(operations=3).dataset(4, seed=0).to_iterable_dataset()
    kept = tokenize_prompts(stream, load_tokenizer(), max_prompt_length=9, chat_template_kwargs={})
    assert [len(row["input_ids"]) for row in kept] == [9] * 4  # 3 + 2 x 3
    with pytest.raises(InputError, match="all 4 have more than max_prompt_length=8"):
        tokenize_prompts(stream, load_tokenizer(), max_prompt_length=8, chat_template_kwargs={})


def test_a_stream_counts_what_it_drops(caplog):
    mixed = Dataset.from_list(
        [{"prompt": ChainTask(operations=n).problems(1, seed=0)[0].prompt} for n in (3, 9, 3, 9, 9)]
    )
    dropped = DroppedPrompts()
    stream = tokenize_prompts(
        mixed.to_iterable_dataset(), load_tokenizer(), max_prompt_length=9, chat_template_kwargs={}, dropped=dropped
    )
    assert (len(list(stream)), dropped.count) == (2, 3)


@given(st.lists(st.integers(0, 99), max_size=8), st.integers(1, 4))
def test_each_index_is_repeated_in_place(indices, repeats):
    sampler = RepeatSampler(indices, repeats)
    assert list(sampler) == [index for index in indices for _ in range(repeats)]
    assert len(sampler) == len(indices) * repeats


@given(st.lists(st.integers(0, 99), min_size=3, max_size=9), st.integers(1, 3), st.integers(1, 3), st.integers(2, 3))
def test_a_step_of_prompts_is_repeated_whole_and_a_rest_left_out(indices, repeats, rows_of_step, steps):
    sampler = RepeatSampler(indices, repeats, rows_of_step=rows_of_step, steps=steps)
    expected = []
    for first in range(0, len(indices) - rows_of_step + 1, rows_of_step):
        step = [index for index in indices[first : first + rows_of_step] for _ in range(repeats)]
        expected += step * steps
    assert list(sampler) == expected
    assert len(sampler) == len(expected)
    stream = Dataset.from_dict({"x": indices}).to_iterable_dataset()
    rows = repeat_rows(stream, repeats, rows_of_step=rows_of_step, steps=steps).take(2 * len(expected))
    assert [row["x"] for row in rows] == expected * 2  # and from the beginning again


def test_too_few_prompts_for_one_reused_step_are_refused():
    with pytest.raises(InputError, match="has 2 prompts and one step takes 3"):
        RepeatSampler([1, 2], 1, rows_of_step=3, steps=2)
