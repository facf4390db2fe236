"""The growing cache layer against Transformers' own dynamic layer, under the same operations."""

import itertools

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging import version
from tiny_models import tiny_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from prune_opd_hf.models.kv_cache import (
    SPARE_TOKENS,
    GrowingLayer,
    RowMoves,
    keep_rows_inplace,
    kept_order,
    use_growing_layers_inplace,
)

EXAMPLES = settings(max_examples=60)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.sampled_from([1, 1, 1, 2, 7, SPARE_TOKENS + 3])),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 99), min_size=1, max_size=6)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 99), min_size=1, max_size=6)),
        st.tuples(st.just("crop"), st.integers(0, 9)),
        st.tuples(st.just("reset"), st.none()),
    ),
    max_size=14,
)


def states(rows, tokens, width):
    return torch.randn(rows, 2, tokens, width)


@EXAMPLES
@given(st.integers(1, 5), OPERATIONS)
def test_a_growing_layer_holds_what_a_dynamic_layer_holds(rows, operations):
    growing, dynamic = GrowingLayer(), DynamicLayer()
    for name, argument in [("update", 3), *operations, ("update", 1)]:
        if name == "update":
            new = states(rows, argument, 4), states(rows, argument, 6)  # keys and values need not have one width
            returned, expected = growing.update(*new), dynamic.update(*new)
            assert all(map(torch.equal, returned, expected))
        elif name == "crop":
            growing.crop(-argument)
            if dynamic.get_seq_length():  # below Transformers 5.23 an empty one raises
                dynamic.crop(-argument)
        elif name == "reset":
            growing.reset()
            dynamic.reset()
        else:
            kept = torch.tensor([index % rows for index in argument[:rows]])  # repeats, as beam search may ask for
            for layer in (growing, dynamic):
                layer.reorder_cache(kept) if name == "reorder" else layer.batch_select_indices(kept)
            rows = len(kept) if dynamic.get_seq_length() else rows
        assert growing.get_seq_length() == dynamic.get_seq_length()
        if dynamic.get_seq_length():
            assert torch.equal(growing.keys, dynamic.keys)
            assert torch.equal(growing.values, dynamic.values)
        assert growing.get_mask_sizes(1) == dynamic.get_mask_sizes(1)


def test_tokens_are_appended_without_moving_the_earlier_ones_while_there_is_room():
    layer = GrowingLayer()
    layer.update(states(2, 3, 4), states(2, 3, 4))
    places = set()
    for _ in range(SPARE_TOKENS):
        layer.update(states(2, 1, 4), states(2, 1, 4))
        places.add(layer.keys.data_ptr())
    assert len(places) == 1


def test_the_buffers_grow_a_number_of_times_that_is_logarithmic_in_the_length():
    layer, places = GrowingLayer(), []
    for _ in range(4000):
        keys, _ = layer.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
        places.append(keys.data_ptr())
    moves = sum(1 for before, after in itertools.pairwise(places) if before != after)
    assert moves <= 16  # by 128 tokens up to 640, then by a quarter: 640 * 1.25 ** 9 > 4000


def test_rows_that_leave_an_empty_layer_leave_nothing_behind():
    layer = GrowingLayer()
    layer.reorder_cache(torch.tensor([1]))
    layer.crop(-1)
    assert layer.get_seq_length() == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_of_another_number_of_rows_are_refused(rows):
    growing, dynamic = GrowingLayer(), DynamicLayer()
    for layer in (growing, dynamic):
        layer.update(states(2, 3, 4), states(2, 3, 4))
        layer.crop(-3)
        layer.reorder_cache(torch.tensor([1]))  # nothing leaves what holds nothing
        with pytest.raises((ValueError, RuntimeError)):
            layer.update(states(rows, 1, 4), states(rows, 1, 4))
        assert layer.update(states(2, 1, 4), states(2, 1, 4))[0].shape == (2, 2, 1, 4)


def test_only_plain_layers_that_hold_nothing_are_replaced():
    model = tiny_model("gemma2", 1)  # one sliding layer, one full
    cache = DynamicCache(config=model.config)
    kinds = [type(layer) for layer in cache.layers]
    use_growing_layers_inplace(cache)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer if kind is DynamicLayer else kind for kind in kinds]
    assert GrowingLayer in {type(layer) for layer in cache.layers}
    filled = DynamicCache(config=tiny_model("llama", 1).config)
    filled.update(states(1, 2, 4), states(1, 2, 4), 0)
    use_growing_layers_inplace(filled)
    assert [type(layer) for layer in filled.layers] == [DynamicLayer, GrowingLayer]


@torch.no_grad()
def test_a_model_decodes_the_same_with_growing_layers_while_rows_leave():
    model = tiny_model("llama", 1)
    ids = torch.randint(3, 48, (4, 20))
    plain, growing = (DynamicCache(config=model.config) for _ in range(2))
    use_growing_layers_inplace(growing)
    begin = 0
    for end, kept in [(5, [0, 3, 2]), (6, [1, 2]), (9, [1]), (20, [0])]:
        logits = [model(ids[:, begin:end], past_key_values=cache).logits for cache in (plain, growing)]
        assert torch.equal(*logits)
        for cache in (plain, growing):
            cache.reorder_cache(torch.tensor(kept))
        ids, begin = ids[kept], end


@EXAMPLES
@given(st.lists(st.booleans(), max_size=12))
def test_kept_order_keeps_every_staying_row_once_and_moves_only_into_freed_places(leaving):
    order = kept_order(leaving)
    assert sorted(order) == [row for row, leaves in enumerate(leaving) if not leaves]
    for place, row in enumerate(order):
        assert row == place or (leaving[place] and row >= len(order))


@EXAMPLES
@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_rows_move_to_where_the_order_says(leaving):
    order = kept_order(leaving)
    values = torch.arange(len(leaving) * 2).reshape(-1, 2)
    expected = [[2 * row, 2 * row + 1] for row in order]
    RowMoves.to(torch.tensor(order, dtype=torch.long)).apply_inplace(values)
    assert values[: len(order)].tolist() == expected


def test_a_cache_of_mixed_layers_keeps_the_rows_that_its_layers_would_keep():
    model = tiny_model("gemma2", 1)  # one sliding layer, one full
    plain, growing = (DynamicCache(config=model.config) for _ in range(2))
    use_growing_layers_inplace(growing)
    new, order = (states(4, 3, 4), states(4, 3, 4)), torch.tensor([0, 3, 2])
    for index in range(2):
        plain.update(*new, index)
        growing.update(*new, index)
    plain.reorder_cache(order)
    keep_rows_inplace(growing, order, RowMoves.to(order))
    assert all(torch.equal(*(layer.keys for layer in pair)) for pair in zip(plain.layers, growing.layers, strict=True))


def test_rows_that_swap_places_do_not_overwrite_each_other():
    values = torch.tensor([10, 11, 12])
    RowMoves.to(torch.tensor([2, 0, 1])).apply_inplace(values)
    assert values.tolist() == [12, 10, 11]


@pytest.mark.parametrize("kind", [GrowingLayer, DynamicLayer])
def test_cropping_by_a_positive_number_is_refused_as_in_transformers(kind):
    if kind is DynamicLayer and version.parse(transformers.__version__) < version.parse("5.18"):
        pytest.skip("Transformers before 5.18 only warns")
    layer = kind()
    layer.update(states(1, 3, 4), states(1, 3, 4))
    with pytest.raises(ValueError, match="negative"):
        layer.crop(1)
