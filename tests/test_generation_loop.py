"""The decoding loop that drops finished rows: contracts 1 to 4, against plain `generate` and full forward passes."""

import pytest
import torch
from generation_helpers import CONFIG, generate, oracle, padded_prompts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_record_equals
from tiny_models import FAMILIES, tiny_model
from transformers import LogitsProcessor, StoppingCriteria

from prune_opd_hf import DriftConfig
from prune_opd_hf.generation import DriftMonitor


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_tokens_equal_plain_generate(family):
    student = tiny_model(family, 1)
    ids, mask = padded_prompts([9, 4, 6, 1, 5])
    expected = generate(student, ids, mask, max_new_tokens=40)
    received = generate(student, ids, mask, loop=True, max_new_tokens=40)
    assert torch.equal(received, expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_record_equals_two_full_forward_passes_in_every_family(family):
    student, teacher = tiny_model(family, 1), tiny_model(family, 2)
    ids, mask = padded_prompts([9, 4, 6, 1])
    untouched = generate(student, ids, mask, max_new_tokens=33)
    config = DriftConfig(top_k=4, threshold=0.5, weight_drop=0.1)
    monitor = DriftMonitor(teacher, config, check_every=4)
    sequences = generate(student, ids, mask, monitor, loop=True, max_new_tokens=33)
    rollouts = monitor.finish(sequences)
    assert_record_equals(rollouts, oracle(student, teacher, ids, mask, untouched, weight_drop=0.1))
    width = rollouts.response_ids.shape[1]
    assert torch.equal(sequences[:, ids.shape[1] :], rollouts.response_ids)
    assert width == int(rollouts.lengths.max())


def test_sampling_equals_plain_generate_while_no_row_has_left():
    student = tiny_model("qwen3", 1, eos=None)
    ids, mask = padded_prompts([4, 6])
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 24, "num_return_sequences": 3}
    torch.manual_seed(5)
    expected = generate(student, ids, mask, **sampling)
    torch.manual_seed(5)
    assert torch.equal(generate(student, ids, mask, loop=True, **sampling), expected)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    check_every=st.integers(1, 20),
    max_new_tokens=st.integers(1, 30),
    threshold=st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    weight_drop=st.sampled_from([0.0, 0.09, 1 / 3, 1.0]),
    min_length=st.integers(0, 12),
    metric=st.sampled_from(["overlap", "nucleus"]),
    loop=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_stop_pattern_equals_the_oracle(
    lengths, check_every, max_new_tokens, threshold, weight_drop, min_length, metric, loop, seed
):
    student, teacher = tiny_model("qwen3", seed, vocab_size=24), tiny_model("qwen3", 10 + seed, vocab_size=24)
    ids, mask = padded_prompts(lengths, vocab=24, seed=seed)
    untouched = generate(student, ids, mask, max_new_tokens=max_new_tokens)
    config = DriftConfig(metric, 4, threshold, weight_drop, min_length=min_length)
    monitor = DriftMonitor(teacher, config, check_every=check_every, attention_mask=mask)
    sequences = generate(student, ids, mask, monitor, loop=loop, max_new_tokens=max_new_tokens)
    rows = oracle(
        student,
        teacher,
        ids,
        mask,
        untouched,
        metric=metric,
        threshold=threshold,
        weight_drop=weight_drop,
        min_length=min_length,
    )
    assert_record_equals(monitor.finish(sequences), rows)


class FavourRowNumber(LogitsProcessor):
    """Knows rows by their number, as a prefix constraint does."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row in range(len(scores)):
            scores[row, 3 + row] += 3.0
        return scores


class StopAtToken(StoppingCriteria):
    def __init__(self, token, rows):
        self.token, self.rows = token, rows

    def __call__(self, input_ids, scores, **kwargs):
        assert len(input_ids) == self.rows
        return input_ids[:, -1] == self.token


def test_processors_and_criteria_that_know_rows_by_number_see_the_whole_batch():
    student = tiny_model("qwen3", 1)
    ids, mask = padded_prompts([3, 5, 2, 4])
    arguments = {"max_new_tokens": 30, "repetition_penalty": 1.2, "min_new_tokens": 3}
    custom = {"logits_processor": [FavourRowNumber()], "stopping_criteria": [StopAtToken(5, 4)]}
    expected = generate(student, ids, mask, **arguments, **custom)
    assert (expected[:, -1] == 0).any(), "no row ended early: the test shows nothing"
    assert torch.equal(generate(student, ids, mask, loop=True, **arguments, **custom), expected)


def test_a_row_that_another_criterion_ends_is_recorded_up_to_there():
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    ids, mask = padded_prompts([3, 5, 2, 4])
    plain = generate(student, ids, mask, max_new_tokens=30, stopping_criteria=[StopAtToken(5, 4)])
    monitor = DriftMonitor(teacher, CONFIG, check_every=4, truncate=False)
    arguments = {"max_new_tokens": 30, "stopping_criteria": [StopAtToken(5, 4)]}
    rollouts = monitor.finish(generate(student, ids, mask, monitor, loop=True, **arguments))
    for row, response in enumerate(plain[:, 5:].tolist()):
        expected = next((n + 1 for n, token in enumerate(response) if token in (1, 5)), 30)
        assert int(rollouts.lengths[row]) == expected


@pytest.mark.parametrize(("ours", "theirs"), [([1, *range(5, 20)], [1]), ([1], [1, *range(5, 20)])])
def test_the_loop_ends_rows_at_the_students_eos_whatever_the_teachers_is(ours, theirs):
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    student.generation_config.eos_token_id, teacher.generation_config.eos_token_id = ours, theirs
    ids, mask = padded_prompts([3, 5, 2, 4])
    expected = generate(student, ids, mask, max_new_tokens=16)
    monitor = DriftMonitor(teacher, CONFIG, check_every=4, truncate=False)
    sequences = generate(student, ids, mask, monitor, loop=True, max_new_tokens=16)
    assert torch.equal(sequences, expected)
    rows = oracle(student, teacher, ids, mask, expected, eos=tuple(ours), truncate=False)
    assert_record_equals(monitor.finish(sequences), rows)


def test_position_ids_given_to_generate_go_on_from_where_they_end():
    student = tiny_model("qwen3", 1)
    ids, mask = padded_prompts([5, 5, 5])
    positions = torch.tensor([[0, 2, 4, 6, 8], [0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    expected = generate(student, ids, mask, max_new_tokens=20, position_ids=positions)
    assert not torch.equal(expected, generate(student, ids, mask, max_new_tokens=20)), "positions change nothing here"
    assert torch.equal(generate(student, ids, mask, loop=True, max_new_tokens=20, position_ids=positions), expected)
