"""Rows that come each at a pace of its own: the record is that of full passes, whatever the order and the blocks."""

from contextlib import contextmanager
from itertools import accumulate

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_record_equals, full_log_probs, oracle_row
from tiny_models import tiny_model

from prune_opd_hf import DriftConfig
from prune_opd_hf.errors import ConfigError, InputError, MonitorStateError, NonFiniteLogitsError
from prune_opd_hf.generation import DriftMonitor, Request, Sampling, make_engine
from prune_opd_hf.generation.engine import Candidates, NewTokens, check_requests
from prune_opd_hf.generation.streams import completions
from prune_opd_hf.teachers.local import LocalTeacher

EOS = 1
K = 4
MODELS = {}


def models():
    if not MODELS:
        MODELS["pair"] = tiny_model("qwen3", 1), tiny_model("llama", 2)
    return MODELS["pair"]


def candidates_of(student, prompt, response):
    """What an engine delivers: the most likely tokens, and the log-probability of each token."""
    log_probs = full_log_probs(student, prompt, response).float()
    top = log_probs.topk(K, dim=-1)
    own = log_probs.gather(-1, response.unsqueeze(-1)).squeeze(-1)
    return Candidates(top.indices.tolist(), top.values.tolist(), own.tolist())


class Stream:
    """Hands out the tokens of each row in pieces, in a given order, and stops where it is cancelled."""

    def __init__(self, pieces):
        self.pieces, self.cancelled, self.pauses = list(pieces), [], 0

    def next(self):
        while self.pieces:
            batch = self.pieces.pop(0)
            kept = [piece for piece in batch if piece.row not in self.cancelled]
            if kept:
                return kept
        raise AssertionError("more is asked for than there is")

    def cancel(self, rows):
        self.cancelled += rows

    @contextmanager
    def undisturbed(self):
        self.pauses += 1
        yield


def pieces_of(row, response, widths, candidates, reason):
    """A row's tokens in pieces of these widths; the last one says why it ended."""
    ends = [end for end in accumulate(widths) if end < len(response)] + [len(response)]
    for start, end in zip([0, *ends], ends, strict=False):
        part = None
        if candidates is not None:
            part = Candidates(*(values[start:end] for values in candidates))
        yield NewTokens(row, start, response[start:end].tolist(), part, reason if end == len(response) else None)


def response_of(seed, length, ends):
    tokens = torch.randint(3, 48, (length,), generator=torch.Generator().manual_seed(seed))
    if ends:
        tokens[-1] = EOS
    return tokens


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_record_is_that_of_full_passes_for_any_order_of_arrival(data):
    student, teacher = models()
    rows = data.draw(st.integers(1, 5))
    check_every = data.draw(st.sampled_from([1, 3, 8, 40]))
    metric = data.draw(st.sampled_from(["overlap", "mass", "nucleus"]))
    min_length, truncate = data.draw(st.sampled_from([0, 6])), data.draw(st.booleans())
    delivers = data.draw(st.booleans())
    config = DriftConfig(metric, K, 0.5, 0.25, min_length=min_length)
    monitor = DriftMonitor(
        teacher, config, check_every=check_every, truncate=truncate, student=None if delivers else student
    )
    watch = monitor.begin(eos_token_ids=(EOS,), pad_token_id=0, ragged=True)
    requests, expected, streams = [], [], []
    for row in range(rows):
        ends = data.draw(st.booleans())
        response = response_of(row, data.draw(st.integers(1, 20)), ends)
        prompt = response_of(100 + row, data.draw(st.integers(1, 8)), False)
        requests.append(Request(tuple(prompt.tolist())))
        how = {"metric": metric, "k": K, "threshold": 0.5, "weight_drop": 0.25, "min_length": min_length}
        expected.append(oracle_row(student, teacher, prompt, response, truncate=truncate, eos=(EOS,), **how))
        known = candidates_of(student, prompt, response) if delivers else None
        widths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
        stream = list(pieces_of(row, response, widths, known, "eos" if ends else "length"))
        if data.draw(
            st.booleans()
        ):  # the engine loses the row after fewer tokens than could exhaust it, and begins it anew
            other = response_of(1000 + row, data.draw(st.integers(1, 3)), False)
            lost = candidates_of(student, prompt, other) if delivers else None
            stream = [*pieces_of(row, other, widths, lost, None), *stream]
        streams.append(stream)
    batches = []
    while any(streams):
        some = [stream for stream in streams if stream]
        chosen = data.draw(st.lists(st.integers(0, len(some) - 1), min_size=1, unique=True))
        batches.append([some[number].pop(0) for number in chosen])
    source = Stream(batches)
    done = list(completions(source, requests, watch))
    assert (source.pauses > 0) == (not delivers)
    assert sorted(completion.request for completion in done) == list(range(rows))
    rollouts = watch.rollouts()
    assert_record_equals(rollouts, expected, watched=True)
    for row, tokens, reason in done:
        assert rollouts.response_ids[row][rollouts.response_mask[row]].tolist() == tokens
        assert rollouts.stop_reason[row] == reason
        assert rollouts.prompt_ids[row][rollouts.prompt_mask[row]].tolist() == list(requests[row].prompt_ids)


def drifting(check_every, rows=2, length=30, **settings):
    """A watch under which every row is stopped by its first drift event, and the streams of its rows."""
    student, teacher = models()
    monitor = DriftMonitor(teacher, DriftConfig("overlap", K, 1.0, 1.0), check_every=check_every, **settings)
    watch = monitor.begin(eos_token_ids=(EOS,), pad_token_id=0, ragged=True)
    requests = [Request(tuple(response_of(100 + row, 5, False).tolist())) for row in range(rows)]
    streams = []
    for row, request in enumerate(requests):
        response = response_of(row, length, False)
        known = candidates_of(student, torch.tensor(request.prompt_ids), response)
        streams.append(list(pieces_of(row, response, [2] * length, known, "length")))
    return watch, requests, streams


def test_a_row_that_drift_stops_is_cancelled_and_no_other_waits_for_it():
    watch, requests, streams = drifting(check_every=4)
    source = Stream([[piece] for piece in streams[0]] + [[piece] for piece in streams[1]])
    order = [completion.request for completion in completions(source, requests, watch)]
    assert order == [0, 1]
    assert source.cancelled == [0, 1]
    assert watch.stopped.tolist() == [True, True]
    assert len(source.pieces) > 10  # what was left of the second row was never asked for


def test_tokens_that_come_after_the_end_are_counted_and_change_nothing():
    watch, requests, streams = drifting(check_every=4, rows=1)
    watch.add_prompts([request.prompt_ids for request in requests])
    for piece in streams[0][:2]:
        watch.append(piece)
    assert watch.score_ready() == [0]
    length, reason = watch.ending(0)
    within = watch.progress.discarded_tokens
    assert within == 4 - length
    for piece in streams[0][2:5]:
        watch.append(piece)
    assert watch.score_ready() == []
    assert watch.ending(0) == (length, reason)
    assert watch.progress.discarded_tokens == within + 6


def test_a_block_is_scored_when_it_is_full_and_all_full_ones_together():
    calls = []
    watch, requests, streams = drifting(
        check_every=4, rows=3, truncate=False, on_check=lambda progress: calls.append(progress)
    )
    watch.add_prompts([request.prompt_ids for request in requests])
    for piece in (streams[0][0], streams[1][0], streams[2][0]):
        watch.append(piece)
    assert watch.score_ready() == []
    assert calls == []
    for piece in (streams[0][1], streams[2][1]):
        watch.append(piece)
    watch.score_ready()
    assert [progress.kept_tokens for progress in calls] == [8]
    assert watch.progress.running_rows == 3


def test_what_does_not_fit_is_refused_in_one_line():
    watch, requests, streams = drifting(check_every=4)
    watch.add_prompts([request.prompt_ids for request in requests])
    watch.append(streams[0][0])
    with pytest.raises(MonitorStateError, match="row 0 has 2 tokens, and the engine goes on at 4"):
        watch.append(streams[0][2])
    with pytest.raises(MonitorStateError, match="row 0 has not ended yet"):
        watch.rollouts()
    ids, log_probs, own = streams[1][0].candidates
    watch.append(streams[1][0]._replace(candidates=Candidates(ids, log_probs, [own[0], float("nan")])))
    watch.append(streams[1][1])
    with pytest.raises(
        NonFiniteLogitsError, match="the student returned NaN or infinite logits for row 1, response token 1"
    ):
        watch.score_ready()
    with pytest.raises(InputError, match="at least one token; got an empty one"):
        check_requests([Request(())], (EOS,), None)
    with pytest.raises(ConfigError, match="token 7 ends a response, and the watch does not know"):
        check_requests(requests, (EOS, 7), watch)
    (student, teacher), recurrent, config = models(), tiny_model("lfm2", 3), DriftConfig("overlap", top_k=4)
    needs = "an engine that streams rows needs a {} that follows rows of different lengths, and {} does not: use"
    with pytest.raises(ConfigError, match=needs.format("teacher", "LocalTeacher")):
        DriftMonitor(recurrent, config, student=student).begin(ragged=True)
    with pytest.raises(ConfigError, match=needs.format("student", "this one")):
        DriftMonitor(teacher, config, student=recurrent).begin(ragged=True)
    scorer, how = LocalTeacher(teacher, top_k=4), Sampling(4, (EOS,), 0)
    with pytest.raises(
        ConfigError, match=r"'continuous_batching' needs a student that follows .*, and Lfm2ForCausalLM does"
    ):
        make_engine("continuous_batching", recurrent, how, slots=2, teacher=scorer)


def test_another_generation_of_the_same_teacher_is_noticed():
    watch, requests, streams = drifting(check_every=4)
    watch.add_prompts([request.prompt_ids for request in requests])
    watch.settings.teacher.follow_rows()
    for piece in streams[0][:2]:
        watch.append(piece)
    with pytest.raises(MonitorStateError, match="begun another batch"):
        watch.score_ready()
