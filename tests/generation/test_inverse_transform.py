"""Drawing by inverse transform against cumulative sums in exact arithmetic."""

from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prune_opd_hf.generation.draw as module
from prune_opd_hf.generation.draw import DIRECT_IDS, GROUP_IDS, inverse_transform

VOCABULARIES = [1, 2, 7, GROUP_IDS, DIRECT_IDS, DIRECT_IDS + 1, DIRECT_IDS + GROUP_IDS, 3 * DIRECT_IDS + 5]


def draw(probabilities, uniforms):
    rows = torch.tensor(uniforms, dtype=torch.float64)
    return inverse_transform(probabilities.expand(len(uniforms), -1), rows).tolist()


@settings(max_examples=60)
@given(
    vocabulary=st.sampled_from(VOCABULARIES),
    share_of_zeros=st.sampled_from([0.0, 0.5, 0.99]),
    seed=st.integers(0, 2**16),
    uniforms=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4),
)
def test_the_first_id_whose_cumulative_probability_exceeds_the_number_is_drawn(
    vocabulary, share_of_zeros, seed, uniforms
):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 64, (vocabulary,), generator=generator)
    counts[torch.rand(vocabulary, generator=generator) < share_of_zeros] = 0
    counts[seed % vocabulary] += 1  # whole numbers, so that every sum is exact, also in float32
    cumulative = list(accumulate(counts.tolist()))
    expected = [
        next(index for index, value in enumerate(cumulative) if value > Fraction(u) * total)
        for u, total in ((u, cumulative[-1]) for u in uniforms)
    ]
    # u * total is rounded to float64, so at a boundary the neighbour may be meant as well.
    for index, wanted, u in zip(draw(counts.float(), uniforms), expected, uniforms, strict=True):
        assert counts[index] > 0
        before = cumulative[index - 1] if index else 0
        assert index == wanted or abs(Fraction(u) * cumulative[-1] - before) < Fraction(cumulative[-1], 2**50)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_over_a_grid_of_numbers_every_id_is_drawn_as_often_as_its_probability_says(vocabulary):
    counts = torch.arange(vocabulary) % 3  # 0, 1, 2, 0, 1, 2, ...
    counts[0] = 1
    total = int(counts.sum())
    grid = (torch.arange(total, dtype=torch.float64) + 0.5) / total
    drawn = torch.cat(
        [inverse_transform(counts.float().expand(len(part), -1), part) for part in grid.split(64)]
    ).bincount(minlength=vocabulary)
    assert torch.equal(drawn, counts)


@pytest.mark.parametrize("vocabulary", [50, 20_000])
def test_neither_end_of_the_range_draws_an_id_without_probability(vocabulary):
    probabilities = torch.zeros(vocabulary)
    probabilities[[3, vocabulary - 9]] = torch.tensor([0.1, 0.7])  # 0.1 + 0.7 rounds
    below_one = 1 - 2**-53
    assert draw(probabilities, [0.0, below_one]) == [3, vocabulary - 9]


def test_a_tail_of_tiny_probabilities_keeps_its_mass():
    vocabulary, tail = 150_000, 0.25
    probabilities = torch.full((vocabulary,), tail / (vocabulary - 1))  # 1.7e-6 each
    probabilities[0] = 1 - tail
    uniforms = torch.linspace(0.75, 1, 402, dtype=torch.float64)[1:-1]
    drawn = torch.tensor(draw(probabilities, uniforms.tolist()))
    expected = (uniforms - 0.75) / tail * (vocabulary - 1)
    assert float((drawn - expected).abs().max()) <= 2  # float32 sums of 150,000 such numbers are off by hundreds


@pytest.mark.parametrize("vocabulary", [50, 20_000])
def test_a_row_with_nan_says_so_and_leaves_the_others_alone(vocabulary):
    probabilities = torch.full((3, vocabulary), 1 / vocabulary)
    probabilities[1] = float("nan")
    drawn = inverse_transform(probabilities, torch.full((3,), 0.5, dtype=torch.float64)).tolist()
    assert drawn[1] == vocabulary
    assert drawn[0] == drawn[2] == pytest.approx(vocabulary / 2, abs=1)


@pytest.mark.parametrize("vocabulary", [50, 20_000])
def test_devices_without_float64_draw_in_float32(monkeypatch, vocabulary):
    monkeypatch.setattr(module, "sum_dtype", lambda device: torch.float32)
    probabilities = torch.zeros(vocabulary)
    probabilities[[3, 20, vocabulary - 9]] = torch.tensor([0.1, 0.2, 0.7])
    uniforms = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 1 - 2**-24])
    drawn = inverse_transform(probabilities.expand(6, -1), uniforms).tolist()
    assert drawn == [3, 3, 20, 20, vocabulary - 9, vocabulary - 9]


def test_a_group_whose_own_sum_rounds_above_the_sum_of_its_ids_draws_its_last_id_with_probability():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.zeros(200, 2 * DIRECT_IDS)
    probabilities[:, :250] = torch.rand(200, 250, generator=generator)  # the first group, and 6 ids without probability
    sums = probabilities.view(200, -1, GROUP_IDS)[:, 0].sum(dim=-1).double()
    assert bool((sums > probabilities.double().sum(dim=-1)).any()), "no sum rounds up: the test shows nothing"
    drawn = inverse_transform(probabilities, torch.full((200,), 1 - 2**-53, dtype=torch.float64))
    assert bool((drawn == 249).all())
