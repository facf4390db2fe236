"""Blocks of scores joined to the columns of a record, against a slow loop."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd_hf.generation.blocks import ScoredBlock, join_blocks

ROWS, K = 4, 3


@settings(max_examples=60)
@given(
    scored=st.lists(st.lists(st.integers(0, ROWS - 1), unique=True, min_size=1), min_size=1, max_size=5),
    widths=st.lists(st.integers(1, 4), min_size=5, max_size=5),
    lengths=st.lists(st.integers(0, 7), min_size=ROWS, max_size=ROWS),
)
def test_joined_columns_hold_what_each_block_says_of_a_row_within_its_length(scored, widths, lengths):
    generator = torch.Generator().manual_seed(0)
    tokens, blocks = torch.zeros(ROWS, dtype=torch.long), []  # rows go on where their last block ended
    expected: dict[tuple[int, int], tuple] = {}
    for rows, width in zip(scored, widths, strict=False):
        index = torch.tensor(rows)
        overlap = torch.rand(len(rows), width, generator=generator) + 0.1
        ids = torch.randint(1, 50, (len(rows), width, K), generator=generator)
        blocks.append(ScoredBlock(index, tokens[index], {"overlap": overlap, "teacher_topk_ids": ids}))
        for line, row in enumerate(rows):
            for column in range(width):
                expected[row, int(tokens[row]) + column] = (float(overlap[line, column]), ids[line, column].tolist())
        tokens[index] += width
    time = max(lengths)
    mask = torch.arange(time) < torch.tensor(lengths).unsqueeze(-1)
    joined = join_blocks(blocks, mask)
    assert joined["overlap"].shape == (ROWS, time)
    for row in range(ROWS):
        for column in range(time):
            inside = column < lengths[row] and (row, column) in expected
            value, ids = expected[row, column] if inside else (0.0, [0] * K)
            assert float(joined["overlap"][row, column]) == value
            assert joined["teacher_topk_ids"][row, column].tolist() == ids
