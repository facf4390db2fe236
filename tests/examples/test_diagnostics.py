"""Diagnostics against slow loops, SciPy, and gradients taken another way."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from diagnose import diagnose
from embedded_diagnostics import draw_rollout
from generation_helpers import padded_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import full_log_probs
from rank_statistics import auc, spearman
from record_helpers import random_record
from scipy import stats
from tiny_models import tiny_model
from token_gradients import flat_gradient, gold_gradient, token_gradients, token_losses
from token_labels import CLEAN, DRIFT, PADDING, WRONG, chain_labels, label_rollouts
from token_signals import disagreement, gold_log_prob, reward_variance, teacher_entropy

from prune_opd_hf import DriftConfig, DriftMonitor, Rollouts
from prune_opd_hf.algorithm.drift import METRICS, ScoredPositions, find_drift_events
from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.generation import pruned_generate
from prune_opd_hf.tasks import ChainTask, Problem, load_tokenizer

EXAMPLES = settings(max_examples=40)
numbers = st.lists(st.integers(0, 5), min_size=3, max_size=12)


# ---------------------------------------------------------------------- statistics


@EXAMPLES
@given(numbers, st.randoms(use_true_random=False))
def test_the_correlation_is_scipys(values, random):
    x, y = np.array(values, float), np.array([random.randint(0, 4) for _ in values], float)
    received = spearman(x, y, np.arange(len(x)), draws=5).value
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert math.isnan(received)
    else:
        assert received == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


@EXAMPLES
@given(numbers, st.randoms(use_true_random=False))
def test_the_auc_is_a_loop_over_all_pairs(scores, random):
    positive = np.array([random.random() < 0.5 for _ in scores])
    pairs = [
        (a, b)
        for a, yes in zip(scores, positive, strict=True)
        for b, no in zip(scores, positive, strict=True)
        if yes and not no
    ]
    received = auc(np.array(scores, float), positive, np.arange(len(scores)), draws=5).value
    if not pairs:
        assert math.isnan(received)
    else:
        assert received == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))


def test_ten_copies_of_each_token_of_a_rollout_are_no_more_evidence():
    random = np.random.default_rng(0)
    x, y = random.normal(size=30), random.normal(size=30)
    once = spearman(x, y, np.arange(30))
    copied = spearman(np.repeat(x, 10), np.repeat(y, 10), np.repeat(np.arange(30), 10))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=0.02)
    taken_apart = spearman(np.repeat(x, 10), np.repeat(y, 10), np.arange(300))
    assert taken_apart.high - taken_apart.low < 0.5 * (once.high - once.low)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(30):
        random = np.random.default_rng(seed)
        base = random.normal(size=40)
        x, y = (
            np.repeat(base, 3) + random.normal(size=120),
            np.repeat(random.normal(size=40), 3) + random.normal(size=120),
        )
        interval = spearman(x, y, np.repeat(np.arange(40), 3), draws=60, seed=seed)
        hits += interval.low <= 0 <= interval.high
    assert hits >= 23  # 28 are expected of 30


def test_unknown_values_are_left_out_and_nothing_known_gives_nothing():
    x = np.array([1.0, 2.0, np.nan, 4.0])
    y = np.array([1.0, np.nan, 3.0, 5.0])
    found = spearman(x, y, np.array([0, 0, 1, 1]))
    assert (found.value, found.tokens, found.rollouts) == (pytest.approx(1.0), 2, 2)
    empty = auc(np.array([np.nan]), np.array([True]), np.array([0]))
    assert math.isnan(empty.value)
    assert empty.tokens == 0
    with pytest.raises(InputError, match="one value and one cluster"):
        spearman(x, y, np.arange(3))


# ---------------------------------------------------------------------- scores and labels


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("k", [1, 3, 5])
def test_drift_events_are_cuts_on_the_score(metric, k):
    record, *_ = random_record(rows=5)
    rollouts = as_rollouts(record)
    score = disagreement(rollouts, metric, k)
    for threshold in (0.15, 0.45, 0.75):
        events = find_drift_events(DriftConfig(metric, k, threshold), rollouts.response_mask, ScoredPositions(**record))
        cut = score >= threshold if metric in ("nucleus", "tail") else score > 1 - threshold + 1e-6
        assert torch.equal(events, cut)
    with pytest.raises(InputError, match="5"):
        disagreement(rollouts, metric, 6)


def as_rollouts(record, mask=None):
    """A record of random distributions as rollouts without prompts worth mentioning."""
    rows, time = record["token_ids"].shape
    mask = torch.ones(rows, time, dtype=torch.bool) if mask is None else mask
    columns = {name: value for name, value in record.items() if name != "token_ids"}
    return Rollouts(
        prompt_ids=torch.ones(rows, 1, dtype=torch.long),
        prompt_mask=torch.ones(rows, 1, dtype=torch.bool),
        response_ids=record["token_ids"],
        response_mask=mask,
        token_log_probs=torch.zeros(rows, time),
        drift_events=torch.zeros(rows, time, dtype=torch.bool),
        reliability=torch.ones(rows, time),
        overlap=torch.zeros(rows, time),
        stop_reason=("length",) * rows,
        config=DriftConfig("overlap", top_k=2, weight_drop=0.0),
        **columns,
    )


def test_a_gold_trace_is_clean_and_a_drifting_one_drifts_from_its_first_hesitation():
    task = ChainTask()
    for problem in task.problems(20, seed=3):
        assert set(chain_labels(problem, problem.trace.split())) == {CLEAN}
        drifting = problem.drifting_trace(3, ["wait", "so"]).split()
        assert chain_labels(problem, drifting) == [CLEAN] * 6 + [DRIFT] * (len(drifting) - 6)


def test_slips_missing_steps_and_late_ends_are_wrong():
    problem = Problem(start=4, operations=("+3", "x7"))
    assert chain_labels(problem, ["x7", "8", "x7", "6"]) == [WRONG, WRONG, CLEAN, CLEAN]  # 8 x 7 = 56
    assert chain_labels(problem, "+3 7 <eos>".split()) == [CLEAN, CLEAN, WRONG]
    assert chain_labels(problem, "+3 7 x7 9 +1 <eos>".split()) == [CLEAN] * 4 + [WRONG, WRONG]


def test_rollouts_are_labelled_row_by_row():
    problem = Problem(start=4, operations=("+3",))
    vocabulary = load_tokenizer().convert_ids_to_tokens(range(64))
    ids = {word: index for index, word in enumerate(vocabulary)}
    words = [["+3", "7", "<eos>"], ["+3", "HMM", "<pad>"]]
    record, *_ = random_record(rows=2, time=3)
    record["token_ids"] = torch.tensor([[ids[word] for word in row] for row in words])
    rollouts = as_rollouts(record, mask=torch.tensor([[True, True, True], [True, True, False]]))
    labels = label_rollouts(rollouts, [problem, problem], vocabulary)
    assert labels.tolist() == [[CLEAN, CLEAN, CLEAN], [CLEAN, DRIFT, PADDING]]


# ---------------------------------------------------------------------- gradients and signals


@pytest.fixture(scope="module")
def generated():
    """Unpruned rollouts of two tiny models."""
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    ids, mask = padded_prompts([5, 3, 4])
    monitor = DriftMonitor(
        teacher, DriftConfig("overlap", top_k=5, weight_drop=0.0), truncate=False, attention_mask=mask
    )
    sequences = student.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=10,
        do_sample=False,
        custom_generate=pruned_generate,
        drift_monitor=monitor,
    )
    return student, teacher, monitor.finish(sequences)


def kl_gradient(student, teacher_log_probs, rollouts, row, position):
    """∇ KL(p~ || q) at one token, through p~ itself: an independent way to the centred top-k gradient."""
    prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
    response = rollouts.response_ids[row, : int(rollouts.lengths[row])]
    logits = student(input_ids=torch.cat([prompt, response]).unsqueeze(0), use_cache=False).logits[
        0, len(prompt) - 1 + position
    ]
    log_p = logits[rollouts.student_topk_ids[row, position]].log_softmax(-1)
    loss = (log_p.exp() * (log_p - teacher_log_probs[row, position])).sum()
    return flat_gradient(loss, list(student.parameters()))


def test_token_gradients_are_those_of_the_kl_on_the_candidates(generated):
    student, _, rollouts = generated
    found = token_gradients(student, rollouts)
    assert found.whole_model
    total = [
        sum(
            kl_gradient(student, rollouts.teacher_log_probs, rollouts, row, at)
            for at in range(int(rollouts.lengths[row]))
        )
        for row in range(3)
    ]
    for row, position in ((0, 0), (1, 4), (2, int(rollouts.lengths[2]) - 1)):
        mine = kl_gradient(student, rollouts.teacher_log_probs, rollouts, row, position)
        others = sum(total[other] for other in range(3) if other != row)  # a token's own rollout is left out
        cosine = float(mine @ others / (mine.norm() * others.norm()))
        assert float(found.cosine["rollouts"][row, position]) == pytest.approx(cosine, abs=2e-3)
        assert float(found.norm[row, position]) == pytest.approx(float(mine.norm()), rel=2e-3)
    assert found.norm[~rollouts.response_mask].isnan().all()


def test_a_part_of_the_parameters_is_said_to_be_one_and_long_rollouts_are_sampled(generated):
    student, _, rollouts = generated
    found = token_gradients(student, rollouts.select([0, 1]), chosen=lambda name: "layers.1" in name, most_tokens=4)
    assert not found.whole_model
    assert found.parameters == sum(p.numel() for name, p in student.named_parameters() if "layers.1" in name)
    assert (~found.norm.isnan()).sum(dim=-1).tolist() == [4, 4]
    with pytest.raises(InputError, match="no parameter is chosen"):
        token_gradients(student, rollouts, chosen=lambda name: False)


def test_losses_of_padding_are_zero_and_rows_alone_give_the_same(generated):
    student, _, rollouts = generated
    together = token_losses(student, rollouts)
    assert not together[~rollouts.response_mask].any()
    for row in range(3):
        alone = token_losses(student, rollouts.select([row]))[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-4, rtol=1e-3)


def test_the_gold_gradient_is_that_of_the_models_own_loss(generated):
    student, _, _ = generated
    prompts, responses = [[5, 6, 7], [9, 8]], [[10, 11, 1], [12, 1]]
    expected = 0
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt + response])
        labels = torch.tensor([[-100] * len(prompt) + response])
        loss = student(input_ids=ids, labels=labels, use_cache=False).loss * len(response)  # its mean over the response
        expected = expected + flat_gradient(loss, list(student.parameters()))
    torch.testing.assert_close(gold_gradient(student, prompts, responses), expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(InputError, match="one response is needed"):
        gold_gradient(student, prompts, [])


def test_entropy_and_gold_probability_equal_full_passes(generated):
    _, teacher, rollouts = generated
    entropy = teacher_entropy(teacher, rollouts, rows_at_once=2)
    gold = rollouts.response_ids.clone()
    gold[0, 3] = (gold[0, 3] + 1) % 48
    found = gold_log_prob(rollouts, [row.tolist() for row in gold])
    for row in range(3):
        length = int(rollouts.lengths[row])
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
        log_q = full_log_probs(teacher, prompt, rollouts.response_ids[row, :length])
        expected = -(log_q.exp() * log_q).sum(-1)
        torch.testing.assert_close(entropy[row, :length], expected.float(), atol=1e-4, rtol=1e-3)
        assert not entropy[row, length:].any()
        for position in range(4 if row == 0 else length):
            value, token = float(found[row, position]), int(gold[row, position])
            if token in rollouts.teacher_topk_ids[row, position].tolist():
                assert value == pytest.approx(float(log_q[position, token]), abs=2e-3)
            else:
                assert value >= float(log_q[position, token]) - 2e-3
    assert found[0, 4:].isnan().all()  # the text has left the gold one


def test_the_variance_of_the_reward_is_a_loop_over_the_candidates(generated):
    _, _, rollouts = generated
    found = reward_variance(rollouts)
    for row, position in ((0, 0), (2, 3)):
        p = rollouts.student_topk_log_probs[row, position].exp()
        p = (p / p.sum()).tolist()
        d = (rollouts.teacher_log_probs - rollouts.student_topk_log_probs)[row, position].tolist()
        mean = sum(a * b for a, b in zip(p, d, strict=True))
        assert float(found[row, position]) == pytest.approx(
            sum(a * (b - mean) ** 2 for a, b in zip(p, d, strict=True)), rel=1e-3
        )


def test_the_report_holds_every_metric_with_every_signal(generated):
    student, teacher, rollouts = generated
    correct = torch.tensor([True, False, True])
    report = diagnose(
        rollouts, student=student, teacher=teacher, correct=correct, top_ks=(2, 5), bands=2, draws=8, cases=2,
        references={"gold": gold_gradient(student, [[5, 6]], [[7, 1]])}, judged_by="gold",
    )  # fmt: skip
    metrics = {item.metric for item in report.correlations}
    signals = {item.signal for item in report.correlations}
    assert metrics == {
        "overlap of the top 2",
        "overlap of the top 5",
        "mass of the top 2",
        "mass of the top 5",
        "nucleus of the top 5",
    }
    assert signals == {
        "variance of the reward", "cosine with gold", "cosine with rollouts", "teacher's entropy", "rollout is right",
    }  # fmt: skip
    assert report.whole_model
    whole = {(item.metric, item.signal): item.spearman for item in report.correlations if item.where == "all tokens"}
    mask = rollouts.response_mask
    x = (1 - disagreement(rollouts, "mass", 5))[mask].numpy()
    assert whole["mass of the top 5", "variance of the reward"].value == pytest.approx(
        stats.spearmanr(x, reward_variance(rollouts)[mask].numpy()).statistic, abs=1e-6
    )
    ranges = {(item.by, item.first, item.last) for item in report.bands if item.by == "position"}
    assert ranges == {("position", 0, 4), ("position", 5, 9)}
    for kind in ("high agreement, poor signal", "low agreement, good signal"):
        rows = [case.row for case in report.failures if case.kind == kind]
        assert len(rows) == len(set(rows)) <= 2
    json.loads(report.to_json())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"judged_by": "gold"}, "judged_by must be one of the references rollouts, got 'gold'"),
        ({"correct": torch.tensor([True])}, "correct must hold one entry for each of the 3 rollouts, got 1"),
        ({"gold": [[5]]}, "gold must hold one entry for each of the 3 rollouts, got 1"),
        ({"bands": 0}, "bands must be at least 1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"top_ks": ()}, "top_ks must be at least 1, got none"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused_before_gradients_are_taken(generated, change, words):
    student, _, rollouts = generated
    with pytest.raises((ConfigError, InputError), match=words):
        diagnose(rollouts, student=student, on_progress=lambda *_: pytest.fail("gradients were taken"), **change)


def test_a_record_without_the_students_side_is_refused(generated):
    student, _, rollouts = generated
    fields = {name: value for name, value in vars(rollouts).items() if not name.startswith("student")}
    unwatched = Rollouts(**{**fields, "token_log_probs": None, "teacher_log_probs": None, "overlap": None})
    for ask in (
        lambda: reward_variance(unwatched),
        lambda: token_gradients(student, unwatched),
        lambda: diagnose(unwatched),
    ):
        with pytest.raises(InputError, match="student's candidates"):
            ask()


def test_a_rollout_is_drawn_up_to_its_end(tmp_path):
    record, *_ = random_record(rows=1, time=3)
    rollouts = as_rollouts(record, mask=torch.tensor([[True, True, False]]))
    draw_rollout(tmp_path / "rollout.png", rollouts, 0, title="t")
    assert (tmp_path / "rollout.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "rollout.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["position"], row["drift event"], row["reliability"]) for row in rows] == [
        ("0", "0", "1.0"),
        ("1", "0", "1.0"),
    ]
