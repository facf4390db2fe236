"""Processors that may be shown the remaining rows alone."""

import pytest
import torch
from transformers.generation import SuppressTokensLogitsProcessor, TemperatureLogitsWarper

from prune_opd_hf.generation.logits_processors import is_row_local, with_standing_mask


@pytest.mark.parametrize("tokens", [[2], [0, 4, 4], [3, 99]])
def test_the_standing_mask_suppresses_what_the_original_does_at_every_step(tokens):
    original = SuppressTokensLogitsProcessor(tokens)  # ids beyond the vocabulary count for nothing
    standing = with_standing_mask(original)
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
        assert with_standing_mask(processor) is processor
    assert is_row_local(with_standing_mask(SuppressTokensLogitsProcessor([1])))
    assert is_row_local(TemperatureLogitsWarper(0.5))
    assert not is_row_local(Mine([1]))
