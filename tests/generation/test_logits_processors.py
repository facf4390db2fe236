"""Processors that may be shown the remaining rows alone."""

import pytest
import torch
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from prune_opd_hf.generation.logits_processors import efficient_processor, exclude_padding_inplace, is_row_local


@pytest.mark.parametrize("tokens", [[2], [0, 4, 4], [3, 99]])
def test_the_standing_mask_suppresses_what_the_original_does_at_every_step(tokens):
    original = SuppressTokensLogitsProcessor(tokens)  # ids beyond the vocabulary count for nothing
    standing = efficient_processor(original)
    for rows in (3, 2):
        scores = torch.randn(rows, 5)
        before = scores.clone()
        ids = torch.zeros(rows, 1, dtype=torch.long)
        assert torch.equal(standing(ids, scores), original(ids, before))
        assert torch.equal(scores, before)


def test_other_processors_stay_what_they_are():
    class Mine(SuppressTokensLogitsProcessor):
        pass

    for processor in (TemperatureLogitsWarper(0.5), Mine([1])):
        assert efficient_processor(processor) is processor
    assert is_row_local(efficient_processor(SuppressTokensLogitsProcessor([1])))
    assert is_row_local(TemperatureLogitsWarper(0.5))
    assert not is_row_local(Mine([1]))


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.8, 0.95, 0.9999])
@pytest.mark.parametrize("least", [1, 100])
@pytest.mark.parametrize(("vocabulary", "spread"), [(50, 3.0), (600, 3.0), (3000, 3.0), (3000, 0.01)])
def test_the_nucleus_is_that_of_the_original_without_a_sort(top_p, least, vocabulary, spread):
    scores = torch.randn(5, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * spread
    ids = torch.zeros(5, 1, dtype=torch.long)
    original = TopPLogitsWarper(top_p, min_tokens_to_keep=least)
    ours = efficient_processor(original)
    assert type(ours) is not TopPLogitsWarper
    assert torch.equal(ours(ids, scores.clone()), original(ids, scores.clone()))


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_is_that_of_the_original_over_each_row_without_its_padding(penalty):
    generator = torch.Generator().manual_seed(1)
    ids, scores = torch.randint(0, 12, (3, 7), generator=generator), torch.randn(3, 12, generator=generator)
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, :2] = mask[2, :4] = 0  # two columns of prompt are padded in one row, four in another
    ours = efficient_processor(RepetitionPenaltyLogitsProcessor(penalty))
    exclude_padding_inplace([ours], mask)
    found = ours(ids, scores.clone())
    for row, begins in enumerate((0, 2, 4)):
        original = RepetitionPenaltyLogitsProcessor(penalty)(ids[row : row + 1, begins:], scores[row : row + 1].clone())
        assert torch.equal(found[row : row + 1], original)
