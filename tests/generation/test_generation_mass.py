"""The metric "mass" while generating: contracts 2 and 3 in both loops, for every `check_every`, and for the criterion alone."""

import pytest
import torch
from generation_helpers import generate, oracle, padded_prompts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_record_equals
from tiny_models import tiny_model

from prune_opd_hf import DriftConfig, DriftMonitor, DriftStoppingCriteria, Rollouts, Teacher
from prune_opd_hf.algorithm.drift import ScoredPositions, find_drift_events
from prune_opd_hf.errors import ConfigError


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    check_every=st.integers(1, 20),
    max_new_tokens=st.integers(1, 24),
    top_k=st.integers(1, 6),
    threshold=st.sampled_from([0.15, 0.3, 0.6]),
    weight_drop=st.sampled_from([0.0, 0.09, 1 / 3, 1.0]),
    min_length=st.integers(0, 12),
    loop=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_stop_pattern_equals_two_full_forward_passes(
    lengths, check_every, max_new_tokens, top_k, threshold, weight_drop, min_length, loop, seed
):
    student, teacher = tiny_model("qwen3", seed, vocab_size=24), tiny_model("qwen3", 10 + seed, vocab_size=24)
    ids, mask = padded_prompts(lengths, vocab=24, seed=seed)
    untouched = generate(student, ids, mask, max_new_tokens=max_new_tokens)
    config = DriftConfig("mass", top_k, threshold, weight_drop, min_length=min_length)
    monitor = DriftMonitor(teacher, config, check_every=check_every, attention_mask=mask)
    sequences = generate(student, ids, mask, monitor, loop=loop, max_new_tokens=max_new_tokens)
    expected = {"metric": "mass", "k": top_k, "threshold": threshold}
    expected |= {"weight_drop": weight_drop, "min_length": min_length}
    assert_record_equals(monitor.finish(sequences), oracle(student, teacher, ids, mask, untouched, **expected))


def test_the_criterion_alone_scores_the_students_side_itself():
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    ids, mask = padded_prompts([5, 3, 4])
    config = DriftConfig("mass", top_k=4, threshold=0.3, weight_drop=0.25)
    untouched = generate(student, ids, mask, max_new_tokens=25)
    criterion = DriftStoppingCriteria(teacher, config, student=student, check_every=4, attention_mask=mask)
    rollouts = criterion.finish(generate(student, ids, mask, max_new_tokens=25, stopping_criteria=[criterion]))
    assert_record_equals(rollouts, oracle(student, teacher, ids, mask, untouched, metric="mass", k=4, threshold=0.3))
    assert "drift" in rollouts.stop_reason
    with pytest.raises(ConfigError, match="'mass' needs the student's side"):
        DriftStoppingCriteria(teacher, config)


def test_candidates_beyond_the_metrics_own_are_recorded_and_change_nothing(tmp_path):
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    ids, mask = padded_prompts([5, 3, 4])
    config = DriftConfig("mass", top_k=2, threshold=0.2, weight_drop=0.2)
    records = []
    for recorded in (2, 9):
        monitor = DriftMonitor(Teacher(teacher, top_k=recorded), config, check_every=6, attention_mask=mask)
        records.append(monitor.finish(generate(student, ids, mask, monitor, loop=True, max_new_tokens=25)))
    narrow, wide = records
    assert torch.equal(narrow.drift_events, wide.drift_events)
    assert torch.equal(narrow.response_mask, wide.response_mask)
    wide.save(tmp_path / "rollouts.safetensors")
    loaded = Rollouts.load(tmp_path / "rollouts.safetensors")
    columns = {name: value for name, value in loaded.tensors().items() if "topk" in name or name == "teacher_log_probs"}
    again = find_drift_events(loaded.config, loaded.response_mask, ScoredPositions(loaded.response_ids, **columns))
    assert torch.equal(again, loaded.drift_events)
