"""The pair beside plain `generate`: contracts 1, 2, 3 and 4, against full forward passes."""

import pytest
import torch
from generation_helpers import CONFIG, generate, oracle, padded_prompts
from oracle import assert_record_equals
from tiny_models import FAMILIES, tiny_model

from prune_opd_hf import DriftConfig
from prune_opd_hf.generation import DriftMonitor


@pytest.mark.parametrize("check_every", [1, 5, 32])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_record_equals_two_full_forward_passes_for_every_block_size(family, check_every):
    student, teacher = tiny_model(family, 1), tiny_model(family, 2)
    ids, mask = padded_prompts([7, 3, 5, 1])
    untouched = generate(student, ids, mask, max_new_tokens=37)
    monitor = DriftMonitor(teacher, CONFIG, check_every=check_every, attention_mask=mask)
    rollouts = monitor.finish(generate(student, ids, mask, monitor, max_new_tokens=37))
    assert_record_equals(rollouts, oracle(student, teacher, ids, mask, untouched))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_record_equals_two_full_forward_passes_in_every_family(family):
    student, teacher = tiny_model(family, 1), tiny_model(family, 2)
    ids, mask = padded_prompts([9, 4, 6])
    untouched = generate(student, ids, mask, max_new_tokens=21)
    config = DriftConfig("overlap", top_k=4, threshold=0.5, weight_drop=0.1)
    monitor = DriftMonitor(teacher, config, check_every=6, attention_mask=mask)
    rollouts = monitor.finish(generate(student, ids, mask, monitor, max_new_tokens=21))
    assert_record_equals(rollouts, oracle(student, teacher, ids, mask, untouched, weight_drop=0.1))


@pytest.mark.parametrize("do_sample", [False, True])
def test_without_truncation_the_tokens_are_those_of_plain_generate(do_sample):
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    ids, mask = padded_prompts([4, 6])
    sampling = {"do_sample": do_sample, "max_new_tokens": 24, "num_return_sequences": 3 if do_sample else 1}
    torch.manual_seed(5)
    expected = generate(student, ids, mask, **sampling)
    torch.manual_seed(5)
    monitor = DriftMonitor(teacher, CONFIG, check_every=7, truncate=False, attention_mask=mask)
    received = generate(student, ids, mask, monitor, **sampling)
    assert torch.equal(received, expected)
    rollouts = monitor.finish(received)
    repeats = len(expected) // len(ids)
    rows = oracle(
        student,
        teacher,
        ids.repeat_interleave(repeats, 0),
        mask.repeat_interleave(repeats, 0),
        expected,
        truncate=False,
    )
    assert_record_equals(rollouts, rows)
