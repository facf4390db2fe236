"""Replay equals generation: settings replayed from a stored record give what a run with these settings leaves."""

import pytest
import torch
from fake_vllm import FakeVLLM
from generation_helpers import generate, padded_prompts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from prune_opd_hf import DriftConfig, DriftMonitor, Rollouts, Teacher
from prune_opd_hf.algorithm.drift import METRICS, Stops
from prune_opd_hf.errors import InputError
from prune_opd_hf.preflight.replay import bills_of_reading_anew, drift_events, find_stops, replay, token_bills
from prune_opd_hf.teachers.served import ServedTeacher

RECORDED = 6


def record(student, teacher, ids, mask, *, loop, max_new_tokens, check_every=8, **sampling):
    """Unpruned, as a preflight makes it."""
    config = DriftConfig("overlap", top_k=RECORDED, weight_drop=0.0)
    monitor = DriftMonitor(teacher, config, check_every=check_every, truncate=False, attention_mask=mask)
    return monitor.finish(generate(student, ids, mask, monitor, loop=loop, max_new_tokens=max_new_tokens, **sampling))


def stops_of(full, config):
    return find_stops(full, config, drift_events(full, config))


def assert_same(replayed, generated):
    assert replayed.stop_reason == generated.stop_reason
    assert replayed.config == generated.config
    assert replayed.tensors().keys() == generated.tensors().keys()
    for name, expected in generated.tensors().items():
        received = replayed.tensors()[name]
        if name.endswith(
            "topk_ids"
        ):  # two ids may change places where their log-probabilities are the same to rounding
            values = generated.tensors()[name.replace("_ids", "_log_probs")]
            gaps = values[..., :-1] - values[..., 1:]
            lone = torch.ones_like(values, dtype=torch.bool)
            lone[..., :-1] &= gaps > 4e-4
            lone[..., 1:] &= gaps > 4e-4
            lone[..., -1] = False
            assert torch.equal(received[lone], expected[lone]), name
        elif expected.dtype.is_floating_point:
            torch.testing.assert_close(received, expected, atol=2e-4, rtol=1e-4, msg=name)
        else:
            assert torch.equal(received, expected), name


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    metric=st.sampled_from(sorted(METRICS)),
    top_k=st.integers(1, RECORDED),
    threshold=st.sampled_from([0.2, 0.35, 0.5, 0.75, 1.0]),
    weight_drop=st.sampled_from([0.0, 0.09, 1 / 3, 1.0]),
    min_length=st.integers(0, 12),
    check_every=st.integers(1, 20),
    recorded_by_loop=st.booleans(),
    loop=st.booleans(),
    seed=st.integers(0, 3),
)
def test_replay_equals_a_run_with_these_settings(
    lengths, metric, top_k, threshold, weight_drop, min_length, check_every, recorded_by_loop, loop, seed
):
    student, teacher = tiny_model("qwen3", seed, vocab_size=24), tiny_model("qwen3", 10 + seed, vocab_size=24)
    ids, mask = padded_prompts(lengths, vocab=24, seed=seed)
    full = record(student, teacher, ids, mask, loop=recorded_by_loop, max_new_tokens=24)
    config = DriftConfig(metric, top_k, threshold, weight_drop, min_length=min_length)
    monitor = DriftMonitor(Teacher(teacher, top_k=RECORDED), config, check_every=check_every, attention_mask=mask)
    sequences = generate(student, ids, mask, monitor, loop=loop, max_new_tokens=24)
    generated = monitor.finish(sequences)
    replayed = replay(full, config)
    assert_same(replayed, generated)
    stops = stops_of(full, config)
    assert torch.equal(stops.lengths, generated.lengths)
    assert stops.drifted.tolist() == [reason == "drift" for reason in generated.stop_reason]
    [bill] = token_bills(stops, full.lengths, batch_size=8, check_every=check_every)
    assert bill.kept == int(generated.lengths.sum())
    assert bill.positions <= full.response_mask.shape[1]


def test_sampled_rollouts_stop_where_the_same_random_numbers_would_have_stopped_them():
    student, teacher = tiny_model("qwen3", 1, eos=None), tiny_model("qwen3", 2, eos=None)
    ids, mask = padded_prompts([5, 3, 4])
    torch.manual_seed(7)
    full = record(student, teacher, ids, mask, loop=False, max_new_tokens=24, do_sample=True)
    config = DriftConfig("mass", 3, 0.3, 0.2)
    torch.manual_seed(7)
    monitor = DriftMonitor(Teacher(teacher, top_k=RECORDED), config, check_every=4, attention_mask=mask)
    generated = monitor.finish(generate(student, ids, mask, monitor, max_new_tokens=24, do_sample=True))
    assert "drift" in generated.stop_reason
    assert_same(replay(full, config), generated)


def test_the_bill_counts_what_the_loop_samples_beyond_each_stop():
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    ids, mask = padded_prompts([5, 3, 4, 2, 6])
    config = DriftConfig("overlap", 4, 0.5, 1 / 3)
    full = record(student, teacher, ids, mask, loop=True, max_new_tokens=30)
    for check_every in (1, 3, 8, 40):
        seen = []
        monitor = DriftMonitor(
            Teacher(teacher, top_k=RECORDED), config, check_every=check_every, attention_mask=mask, on_check=seen.append
        )
        monitor.finish(generate(student, ids, mask, monitor, loop=True, max_new_tokens=30))
        [bill] = token_bills(stops_of(full, config), full.lengths, batch_size=8, check_every=check_every)
        assert bill.sampled == seen[-1].kept_tokens + seen[-1].discarded_tokens
        assert bill.kept == seen[-1].kept_tokens
        assert bill.positions == seen[-1].tokens


@pytest.mark.parametrize("weight_drop", [0.0, 0.1, 1 / 3])
def test_the_bill_of_a_teacher_on_a_server_is_what_the_server_reads(weight_drop):
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    ids, mask = padded_prompts([5, 3, 4, 2, 6])
    config = DriftConfig("overlap", 4, 0.5, weight_drop)
    full = record(student, teacher, ids, mask, loop=True, max_new_tokens=120)
    events = drift_events(full, config)
    for check_every in (1, 3, 8, 40):
        seen = []
        with FakeVLLM(teacher) as server:
            remote = ServedTeacher(server.url, top_k=RECORDED)
            before, on_check = server.read, seen.append
            watched = {"check_every": check_every, "attention_mask": mask, "on_check": on_check}
            monitor = DriftMonitor(remote, config, **watched)
            monitor.finish(generate(student, ids, mask, monitor, loop=True, max_new_tokens=120))
            read = server.read - before
        settings = {"batch_size": 8, "check_every": check_every}
        [bill] = bills_of_reading_anew(full, config, events, find_stops(full, config, events), **settings)
        assert bill.read == read
        assert bill.sampled == seen[-1].kept_tokens + seen[-1].discarded_tokens
        assert bill.kept == seen[-1].kept_tokens
        assert bill.read <= 2.2 * (bill.sampled + int(mask.sum()))


def test_a_record_cut_by_drift_answers_only_for_stricter_settings():
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    ids, mask = padded_prompts([5, 3, 4, 2])
    monitor = DriftMonitor(teacher, DriftConfig("overlap", 4, 0.5, 0.25), check_every=4, attention_mask=mask)
    pruned = monitor.finish(generate(student, ids, mask, monitor, loop=True, max_new_tokens=30))
    assert "drift" in pruned.stop_reason
    assert_same(replay(pruned, pruned.config), pruned)
    stricter = DriftConfig("overlap", 4, 0.5, 0.5)
    assert (replay(pruned, stricter).lengths <= pruned.lengths).all()
    with pytest.raises(InputError, match="truncate=False"):
        replay(pruned, DriftConfig("overlap", 4, 0.5, 0.1))


def test_what_a_record_cannot_answer_is_refused():
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    ids, mask = padded_prompts([5, 3])
    full = record(student, teacher, ids, mask, loop=True, max_new_tokens=8)
    with pytest.raises(InputError, match=f"compare 9 candidates, and {RECORDED} were recorded"):
        replay(full, DriftConfig("overlap", top_k=9))
    fields = {name: value for name, value in vars(full).items() if not name.startswith("student")}
    unobserved = Rollouts(**{**fields, "token_log_probs": None, "teacher_log_probs": None, "overlap": None})
    assert replay(unobserved, DriftConfig("nucleus", 4, 0.5)).overlap is None
    with pytest.raises(InputError, match="needs the student's candidates"):
        replay(unobserved, DriftConfig("mass", 4, 0.5))


def test_each_generation_has_its_own_bill():
    # Lengths 2 (stopped, its block of 4 runs on to its own third token), 5 (ended), 1 (stopped, its block runs to 4).
    stops = Stops(torch.tensor([2, 5, 1]), torch.tensor([True, False, True]))
    lengths = torch.tensor([3, 5, 9])
    assert token_bills(stops, lengths, batch_size=3, check_every=4) == [(3 + 5 + 4, 2 + 5 + 1, 5, 3 + 5 + 4)]
    assert token_bills(stops, lengths, batch_size=2, check_every=4) == [(3 + 5, 2 + 5, 5, 3 + 5), (4, 1, 4, 4)]
