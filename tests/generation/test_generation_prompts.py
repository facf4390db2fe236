"""Prompts: special tokens, repeats and padding, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_opd_hf.errors import InputError
from prune_opd_hf.generation.prompts import mask_from_padding, repeat_for_sequences


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 3))
def test_the_mask_found_from_padding_is_the_one_it_was_padded_with(lengths, pad):
    width = max(lengths)
    ids = torch.full((len(lengths), width), pad)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.arange(10, 10 + length)
        mask[row, width - length :] = 1
    assert torch.equal(mask_from_padding(ids, pad, [7], [8]), mask)


def test_padding_that_is_also_an_end_or_a_beginning_of_text_is_refused_only_where_a_prompt_begins_with_it():
    padded, unpadded = torch.tensor([[0, 5], [6, 7]]), torch.tensor([[5, 0], [6, 7]])
    for ends, starts in (([0], []), ([], [0])):
        with pytest.raises(InputError, match="pass attention_mask"):
            mask_from_padding(padded, 0, ends, starts)
    assert mask_from_padding(unpadded, 0, [0], []).tolist() == [[1, 1], [1, 1]]
    with pytest.raises(InputError, match="padded on the left"):
        mask_from_padding(unpadded, 0, [], [])
    assert mask_from_padding(unpadded, None, [], []).tolist() == [[1, 1], [1, 1]]


@given(st.integers(1, 4), st.integers(1, 3))
def test_one_line_a_prompt_becomes_one_line_a_sequence(prompts, copies):
    prompt_ids = torch.arange(prompts).unsqueeze(-1).repeat_interleave(copies, dim=0)
    values = torch.arange(prompts).unsqueeze(-1) * 10
    expected = [[10 * row] for row in range(prompts) for _ in range(copies)]
    assert repeat_for_sequences(values, prompt_ids, "attention_mask").tolist() == expected


@pytest.mark.parametrize(
    ("given", "message"), [(0, "0 rows for 4"), (3, "3 rows for 4"), (2, "not 2 prompts repeated 2 times")]
)
def test_lines_that_fit_no_repetition_of_the_prompts_are_refused(given, message):
    prompt_ids = torch.tensor([[1], [2], [3], [4]])
    with pytest.raises(InputError, match=message):
        repeat_for_sequences(torch.zeros(given, 1, dtype=torch.long), prompt_ids, "attention_mask")
