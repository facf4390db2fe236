"""At which lengths a teacher that reads everything anew is asked: never more than 2.2 times in all, whatever ends when."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd_hf.algorithm.drift import DriftConfig
from prune_opd_hf.generation.check_lengths import MOST_READ, EveryBlock, GrowingLengths, RowLengths

CONFIG = DriftConfig(weight_drop=0.25, min_length=6)  # four events use a row up


def rows_of(*rows):
    return RowLengths(*(torch.tensor(column) for column in zip(*rows, strict=True)))


def test_every_block_is_due_where_scoring_costs_no_more():
    lengths = EveryBlock(4)
    assert lengths.block_width(rows_of((3, 8, 0, 0))) == 4
    assert lengths.due(rows_of((3, 8, 4, 0), (3, 8, 3, 0))).tolist() == [True, False]
    # a server sent one token, then three and another four: blocks end at 4 and 8, not at 5 and 9
    assert lengths.due(rows_of((3, 0, 1, 0), (3, 0, 4, 0), (3, 5, 3, 0), (3, 5, 2, 0))).tolist() == [
        False,
        True,
        True,
        False,
    ]


def test_a_row_is_not_read_before_it_may_be_stopped():
    lengths = GrowingLengths(CONFIG, 2, truncate=True)
    assert lengths.due(rows_of((3, 0, 5, 0), (3, 0, 6, 0))).tolist() == [False, True]  # min_length 6
    # two events so far: two more tokens at least; it has grown from 11 tokens, to 16 and to 17
    assert lengths.due(rows_of((3, 8, 5, 2), (3, 8, 6, 2))).tolist() == [False, True]
    assert lengths.block_width(rows_of((3, 0, 0, 0), (5, 0, 0, 0))) == 6


def test_nothing_is_read_before_its_end_where_nothing_is_stopped():
    for lengths in (
        GrowingLengths(CONFIG, 2, truncate=False),
        GrowingLengths(DriftConfig(weight_drop=0.0), 2, truncate=True),
    ):
        assert not lengths.due(rows_of((3, 0, 500, 0))).any()
        assert lengths.block_width(rows_of((3, 0, 0, 0))) > 10**6


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 300)), min_size=1, max_size=8),
    st.lists(st.integers(1, 9), min_size=8, max_size=8),
)
def test_rows_of_their_own_pace_are_read_at_most_2_2_times_in_all(rows, paces):
    """Simulated: rows of a prompt and a final length grow at different paces; a row that has ended is read once more."""
    lengths, read = GrowingLengths(DriftConfig(weight_drop=1.0), 4, truncate=True), 0
    tokens, scored = [0] * len(rows), [0] * len(rows)
    running = set(range(len(rows)))
    while running:
        for row in running:
            tokens[row] = min(tokens[row] + paces[row], rows[row][1])
        going = [row for row in sorted(running) if tokens[row] < rows[row][1]]
        ended = [row for row in running if tokens[row] == rows[row][1]]
        due = []
        if going:
            state = rows_of(*((rows[row][0], scored[row], tokens[row] - scored[row], 0) for row in going))
            due = [row for row, is_due in zip(going, lengths.due(state).tolist(), strict=True) if is_due]
        asked = due + ended
        totals = torch.tensor([rows[row][0] + tokens[row] for row in asked], dtype=torch.long)
        lengths.note_read(totals, torch.tensor([row in ended for row in asked], dtype=torch.bool))
        read += int(totals.sum())
        for row in asked:
            scored[row] = tokens[row]
        running -= set(ended)
    assert read <= MOST_READ * sum(prompt + final for prompt, final in rows)
