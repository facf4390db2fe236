"""What a run counts and logs, on a rollout made by hand."""

import torch

from prune_opd_hf import DriftConfig
from prune_opd_hf.rollouts import Rollouts
from prune_opd_hf.training.metrics import MetricMeans, TokenCounts, rollout_metrics


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
    assert metrics["prune/overlap"] == 4.5 / 6
    assert metrics["prune/reliability"] == 0.5  # 3 of 6
    assert metrics["prune/stopped_share"] == metrics["prune/ended_share"] == 0.5
    assert metrics["prune/effective_length_mean"] == 1.5
    assert metrics["prune/overlap_by_position/00000"] == 3.5 / 4
    assert metrics["prune/overlap_by_position/00002"] == 0.5


def test_means_leave_out_what_is_not_a_number():
    means = MetricMeans()
    means.add("a", float("nan"))
    means.add("a", 2.0, weight=0)
    means.add("a", 4.0)
    assert means.take() == {"a": 4.0}
