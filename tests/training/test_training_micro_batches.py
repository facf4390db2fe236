"""Micro-batches of so many tokens: how rows are divided, and that a step is the same however they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer_helpers import make_trainer

from prune_opd_hf import PruneOPDConfig
from prune_opd_hf.errors import ConfigError
from prune_opd_hf.training.micro_batches import rows_by_tokens

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=20)


@given(lengths=LENGTHS, limit=st.integers(1, 200), packed=st.booleans(), least=st.integers(1, 25))
def test_every_row_is_in_one_part_and_no_part_of_several_rows_is_beyond_the_limit(lengths, limit, packed, least):
    parts = rows_by_tokens(lengths, limit, packed=packed, least=least)
    assert sorted(row for rows in parts for row in rows) == list(range(len(lengths)))
    assert all(parts)
    assert len(parts) >= min(least, len(lengths))
    for rows in parts:
        each = [lengths[row] for row in rows]
        assert len(rows) == 1 or (sum(each) if packed else len(each) * max(each)) <= limit


@given(lengths=LENGTHS, limit=st.integers(60, 200))
def test_packed_parts_are_few_and_of_like_size(lengths, limit):
    """Longest first to the shortest part: sizes differ by at most the longest row; at least total / limit parts are needed, and
    full ones are more than limit - 60 tokens long."""
    parts = rows_by_tokens(lengths, limit, packed=True)
    sizes = [sum(lengths[row] for row in rows) for rows in parts]
    assert max(sizes) - min(sizes) <= max(lengths)
    assert len(parts) >= -(-sum(lengths) // limit)
    if len(parts) > 1:
        fewer = rows_by_tokens(lengths, 10**6, packed=True, least=len(parts) - 1)
        assert max(sum(lengths[row] for row in rows) for rows in fewer) > limit or sum(lengths) > limit * len(fewer)


def step_of(folder, **changes):
    """The weights after one step of plain gradient descent, its rollouts' lengths, and rows and columns of every forward pass."""
    trainer = make_trainer(folder, optim="sgd", learning_rate=0.1, weight_decay=0.0, **changes)
    shapes = []

    def note(module, arguments, keywords):
        if module.training:
            shapes.append(tuple(keywords["input_ids"].shape))

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    rollouts = trainer.step.rollouts
    lengths = (rollouts.prompt_mask.sum(-1) + rollouts.lengths).tolist()
    return dict(trainer.model.named_parameters()), lengths, shapes, trainer.state.log_history[0]


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_step_is_the_same_in_micro_batches_of_rows_and_of_tokens(tmp_path, iterations):
    changes = {"num_iterations": iterations, "max_steps": iterations}
    by_rows, lengths, shapes, logged = step_of(tmp_path / "rows", **changes)
    assert len(shapes) == 2 * iterations  # gradient_accumulation_steps
    longest = max(lengths)
    for limit in (longest, 2 * longest, 10**6):
        by_tokens, same, shapes, also = step_of(tmp_path / str(limit), max_tokens_per_micro_batch=limit, **changes)
        assert same == lengths
        parts = rows_by_tokens(lengths, limit, packed=True)
        assert shapes == [(1, sum(lengths[row] for row in rows)) for rows in parts] * iterations
        for name, weight in by_rows.items():
            torch.testing.assert_close(by_tokens[name], weight, atol=2e-6, rtol=2e-5, msg=name)
        for name in ("loss", "grad_norm", "kl", "overlap", "student/entropy"):
            if name in logged:
                assert also[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_of_no_tokens_is_refused(tmp_path, value):
    with pytest.raises(ConfigError, match="max_tokens_per_micro_batch"):
        PruneOPDConfig(output_dir=str(tmp_path), max_tokens_per_micro_batch=value)
