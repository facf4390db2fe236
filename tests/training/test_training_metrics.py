"""What a run counts and logs, on a rollout made by hand."""

import json
from dataclasses import asdict, replace

import torch
from accelerate import Accelerator

from prune_opd_hf import DriftConfig, ResponseBudget
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.training.metrics import MetricMeans, StepTotals, TokenCounts, rollout_metrics
from prune_opd_hf.training.pruning import DriftPruning, FixedLength, NoPruning


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
        config=DriftConfig("overlap", top_k=2, weight_drop=1.0),
        overlap=overlap,
    )


DRIFTED_ROW = torch.tensor([True, False])


def totals(rollouts, stopped, cap, discarded=0):
    return StepTotals.of(rollouts, rollouts.loss_weights, stopped, cap=cap, longest=4, discarded=discarded)


def test_totals_of_a_step():
    # Under a cap of 10 the drifted row kept 2 tokens and 3 more were discarded: 10 - 2 - 3 were never sampled.
    step = totals(by_hand(), DRIFTED_ROW, cap=10, discarded=3)
    assert step.tokens == TokenCounts(rollouts=2, generated=9, kept=6, saved=5)
    assert step.tokens.plus(step.tokens) == TokenCounts(4, 18, 12, 10)
    assert (step.drifted, step.capped) == (1, 0)
    assert step.weight_sum == 6.0  # reliabilities 1, 0 and 1, 1, 0, 0, and 0.5 for each of 6 tokens
    assert step.over_processes(Accelerator(cpu=True)) == step


def test_means_over_the_kept_tokens():
    metrics = rollout_metrics(by_hand(), DRIFTED_ROW, cap=10, longest=24)  # 24 positions in 12 bins of 2
    assert metrics["prune/overlap"] == (4.5 / 6, 6.0)
    assert metrics["prune/reliability"] == (0.5, 6.0)  # 3 of 6
    assert metrics["prune/stopped_share"] == metrics["prune/ended_share"] == (0.5, 2.0)
    assert metrics["prune/effective_length_mean"] == (1.5, 2.0)
    assert metrics["prune/overlap_by_position/00000"] == (3.5 / 4, 4.0)
    assert metrics["prune/overlap_by_position/00002"] == (0.5, 2.0)


def test_a_teacher_without_a_row_counts_as_a_share_of_none():
    """One process has 2 rows of "a", the other one of "a" and one of "b": 3/4 and 1/4 of all."""
    processes = [MetricMeans(), MetricMeans()]
    for means, teachers in zip(processes, (("a", "a"), ("a", "b")), strict=True):
        rollouts = replace(by_hand(), teachers=teachers)
        means.add_all(rollout_metrics(rollouts, DRIFTED_ROW, cap=10, longest=24, teachers=("a", "b")))
    logged = processes[0].take(processes)
    assert (logged["teacher/a/rollouts_share"], logged["teacher/b/rollouts_share"]) == (0.75, 0.25)


def test_rows_truncated_below_the_cap_count_as_stopped_and_as_saving():
    truncated = replace(by_hand(), stop_reason=("length", "length"))  # 2 and 4 tokens
    pruning = FixedLength(2, minimum=1, maximum=4)
    assert pruning.stopped(truncated, cap=4).tolist() == [True, False]
    assert totals(truncated, pruning.stopped(truncated, 4), cap=4).tokens.saved == 2
    assert totals(truncated, pruning.stopped(truncated, 10), cap=10).tokens.saved == 14
    assert totals(truncated, pruning.stopped(truncated, 4), cap=4).capped == 1


def test_a_row_that_a_criterion_of_the_user_ended_is_neither_a_natural_end_nor_stopped_by_pruning():
    ended = replace(by_hand(), stop_reason=("criterion", "eos"), reliability=torch.ones(2, 4))
    assert ended.ended_naturally.tolist() == [False, True]
    for way in (DriftPruning(ResponseBudget(8, 1, 8)), FixedLength(2, minimum=1, maximum=8), NoPruning(8)):
        assert not way.stopped(ended, cap=8).any()
    metrics = rollout_metrics(ended, torch.tensor([False, False]), cap=8, longest=8)
    assert metrics["prune/ended_share"] == metrics["prune/criterion_share"] == (0.5, 2.0)
    # Neither reached the boundary of 8: the criterion's row is judged and missed it, the natural end is left out.
    learned = DriftPruning(ResponseBudget(8, 8, 8, margin=0)).update(
        ended.lengths, ended.effective_lengths, ended.ended_naturally
    )
    assert (learned["budget/judged_share"], learned["budget/hit_share"]) == (0.5, 0.0)


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
    assert first.take([first, second]) == {"a": 2.0, "b": 7.0, "m": 9.0}  # (1 * 3 + 5 * 1) / 4


def test_means_go_on_from_a_saved_state():
    means = MetricMeans()
    means.add_all({"a": (1 / 3, 7.0), "b": 0.1})
    resumed = MetricMeans(**json.loads(json.dumps(asdict(means))))
    for each in (means, resumed):
        each.add("a", 2 / 3, weight=11)
        each.add_max("m", 1.5)
    assert means.take() == resumed.take()
