"""What a run counts and logs, on a rollout made by hand."""

import json
from dataclasses import replace

import torch

from prune_opd_hf import DriftConfig
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.training.metrics import MetricMeans, TokenCounts, rollout_metrics, stopped_by_pruning


def by_hand():
    """Row 0: 2 tokens, drifted. Row 1: 4 tokens, ended. Overlaps 1, .5 and 1, 1, 0, 1."""
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    overlap = torch.tensor([[1.0, 0.5, 0, 0], [1.0, 1.0, 0.0, 1.0]])
    events = (overlap < 0.7) & mask
    reliability = torch.tensor([[1.0, 0.0, 0, 0], [1.0, 1.0, 0.0, 0.0]])
    zeros = torch.zeros(2, 4)
    return Rollouts(
        prompt_ids=torch.ones(2, 3, dtype=torch.long),
        prompt_mask=torch.ones(2, 3, dtype=torch.bool),
        response_ids=torch.ones(2, 4, dtype=torch.long),
        response_mask=mask,
        teacher_token_log_probs=zeros,
        teacher_topk_ids=torch.zeros(2, 4, 2, dtype=torch.long),
        teacher_topk_log_probs=torch.zeros(2, 4, 2),
        drift_events=events,
        reliability=reliability,
        stop_reason=("drift", "eos"),
        config=DriftConfig(top_k=2, weight_drop=1.0),
        overlap=overlap,
    )


def test_counts_of_a_step():
    # Under a cap of 10 the drifted row kept 2 tokens and 3 more were discarded: 10 - 2 - 3 were never sampled.
    counts = TokenCounts.of(by_hand(), cap=10, discarded=3)
    assert counts == TokenCounts(rollouts=2, generated=9, kept=6, saved=5)
    assert counts.plus(counts) == TokenCounts(4, 18, 12, 10)
    assert TokenCounts.from_list(counts.as_list()) == counts


def test_means_over_the_kept_tokens():
    metrics = rollout_metrics(by_hand(), cap=10, longest=24)  # 24 positions in 12 bins of 2
    assert metrics["prune/overlap"] == (4.5 / 6, 6.0)
    assert metrics["prune/reliability"] == (0.5, 6.0)  # 3 of 6
    assert metrics["prune/stopped_share"] == metrics["prune/ended_share"] == (0.5, 2.0)
    assert metrics["prune/effective_length_mean"] == (1.5, 2.0)
    assert metrics["prune/overlap_by_position/00000"] == (3.5 / 4, 4.0)
    assert metrics["prune/overlap_by_position/00002"] == (0.5, 2.0)


def test_rows_cut_below_the_cap_count_as_stopped_and_as_saving():
    cut = replace(by_hand(), stop_reason=("length", "length"))  # 2 and 4 tokens
    assert stopped_by_pruning(cut, cap=4).tolist() == [True, False]
    assert TokenCounts.of(cut, cap=4, discarded=0).saved == 2
    assert TokenCounts.of(cut, cap=10, discarded=0).saved == 14


def test_means_leave_out_what_is_not_a_number():
    means = MetricMeans()
    means.add("a", float("nan"))
    means.add("a", 2.0, weight=0)
    means.add("a", 4.0)
    assert means.take() == {"a": 4.0}


def test_processes_are_averaged_by_weight_and_maxima_are_kept():
    first, second = MetricMeans(), MetricMeans()
    first.add("a", 1.0, weight=3)
    first.add_max("m", 2.0)
    second.add("a", 5.0, weight=1)
    second.add("b", 7.0)
    second.add_max("m", 9.0)
    other = second.state_dict()
    assert first.take(lambda mine: [mine, other]) == {"a": 2.0, "b": 7.0, "m": 9.0}  # (1 * 3 + 5 * 1) / 4


def test_means_go_on_from_a_saved_state():
    means, resumed = MetricMeans(), MetricMeans()
    means.add_all({"a": (1 / 3, 7.0), "b": 0.1})
    resumed.load_state_dict(json.loads(json.dumps(means.state_dict())))
    for each in (means, resumed):
        each.add("a", 2 / 3, weight=11)
        each.add_max("m", 1.5)
    assert means.take() == resumed.take()
