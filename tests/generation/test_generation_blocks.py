"""Blocks of scores: spread over the batch, joined to columns, against slow loops."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd_hf.generation.blocks import ScoredBlock, join_blocks

K = 3


def columns(rows, time, with_student, generator):
    ids = torch.randint(1, 50, (rows, time), generator=generator)
    wide_ids = torch.randint(1, 50, (rows, time, K), generator=generator)
    numbers = -torch.rand(rows, time, generator=generator) - 0.1
    wide_numbers = -torch.rand(rows, time, K, generator=generator) - 0.1
    made = {
        "token_ids": ids,
        "teacher_token_log_probs": numbers,
        "teacher_topk_ids": wide_ids,
        "teacher_topk_log_probs": wide_numbers,
        "drift_events": torch.rand(rows, time, generator=generator) < 0.5,
    }
    if with_student:
        made |= {
            "token_log_probs": numbers - 1,
            "student_topk_ids": wide_ids + 1,
            "student_topk_log_probs": wide_numbers - 1,
            "teacher_log_probs": wide_numbers - 2,
            "overlap": -numbers,
        }
    return made


@settings(deadline=None, max_examples=40)
@given(
    followed=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4),
    times=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    lengths=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    with_student=st.booleans(),
)
def test_joined_columns_are_what_each_block_said_of_each_row_within_its_length(followed, times, lengths, with_student):
    generator = torch.Generator().manual_seed(0)
    blocks, said = [], []
    for follows, time in zip(followed, times, strict=False):
        rows = torch.tensor([row for row in range(4) if follows[row]], dtype=torch.long)
        if len(rows) == 0:
            blocks.append(ScoredBlock.empty(4, time, K, torch.device("cpu"), with_student=with_student))
            said.append((rows.tolist(), time, {}))
        else:
            made = columns(len(rows), time, with_student, generator)
            blocks.append(ScoredBlock.spread(made, rows, 4))
            said.append((rows.tolist(), time, made))
    width = min(sum(time for _, time, _ in said), 6)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(-1)
    joined = join_blocks(blocks, mask)
    assert ("overlap" in joined) is with_student
    assert "token_ids" not in joined
    for name, values in joined.items():
        begin = 0
        for rows, time, made in said:
            for offset in range(min(time, width - begin)):
                for row in range(4):
                    expected = torch.zeros_like(values[0, 0])
                    if row in rows and begin + offset < lengths[row]:
                        expected = made[name][rows.index(row), offset]
                    assert torch.equal(values[row, begin + offset], expected), (name, row, begin + offset)
            begin += time
