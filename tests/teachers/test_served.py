"""A served teacher against a local one, over stand-ins for vLLM's servers: scores, what it refuses, faults, and what is read.

Real servers are in test_served_vllm.py.
"""

import copy
import math

import pytest
import torch
import vllm_helpers
from fake_vllm import FakeVLLM
from generation_helpers import CONFIG, SETTINGS, generate, oracle, padded_prompts
from oracle import assert_record_equals, full_log_probs, oracle_row
from tiny_models import tiny_model

from prune_opd_hf import DriftConfig, Teacher
from prune_opd_hf.errors import ConfigError, InputError, MonitorStateError, NonFiniteLogitsError, ServingError
from prune_opd_hf.generation import DriftMonitor, LoopEngine, Request, Sampling, make_engine
from prune_opd_hf.serving import servers as of_servers
from prune_opd_hf.teachers import served
from prune_opd_hf.teachers.base import TeacherContext
from prune_opd_hf.teachers.served import ServedTeacher

K, EOS = 4, 1
LENGTHS = (3, 9, 1, 12)


@pytest.fixture(scope="module")
def teacher():
    return tiny_model("llama", 7)


@pytest.fixture(scope="module")
def student():
    return tiny_model("llama", 1)


@pytest.fixture
def server(teacher):
    with FakeVLLM(teacher) as running:
        yield running


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(of_servers, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(of_servers, "FIRST_PAUSE_SECONDS", 0.02)


def scores_of(scorer, ids, mask, responses, candidates=None, wanted=None):
    scorer.start(ids, mask)
    return scorer.score(responses, candidates, wanted=wanted)


def blocks(seed=11, rows=4, time=6, vocab=48):
    generator = torch.Generator().manual_seed(seed)
    responses = torch.randint(3, vocab, (rows, time), generator=generator)
    return responses, torch.randint(3, vocab, (rows, time, K), generator=generator)


@pytest.mark.parametrize("exact", [True, False])
def test_scores_are_those_of_the_model_in_this_process(server, teacher, exact):
    server.scores_ids = exact
    ids, mask = padded_prompts(LENGTHS)
    (responses, candidates), local = blocks(), Teacher(teacher, top_k=K)
    wanted = torch.ones_like(responses, dtype=torch.bool)
    wanted[1, 3:] = False
    remote = ServedTeacher(server.url, top_k=K)
    assert remote.capabilities.scores_candidates is exact
    given = scores_of(remote, ids, mask, responses, candidates, wanted)
    ours = scores_of(local, ids, mask, responses, candidates, wanted)
    assert torch.equal(given.topk_ids, ours.topk_ids)
    torch.testing.assert_close(given.topk_log_probs, ours.topk_log_probs, atol=1e-5, rtol=0)
    torch.testing.assert_close(given.token_log_probs, ours.token_log_probs, atol=1e-5, rtol=0)
    if exact:
        torch.testing.assert_close(given.candidate_log_probs, ours.candidate_log_probs, atol=1e-5, rtol=0)
    else:
        assert given.candidate_log_probs is None


def test_blocks_and_rows_that_leave_give_what_one_pass_gives(server, teacher):
    ids, mask = padded_prompts(LENGTHS)
    responses, _ = blocks()
    remote = ServedTeacher(server.url, top_k=K)
    whole = scores_of(remote, ids, mask, responses)
    remote.start(ids, mask)
    first = remote.score(responses[:, :2])
    remote.keep_rows(torch.tensor([3, 1]))
    rest = remote.score(responses[[3, 1], 2:])
    torch.testing.assert_close(first.token_log_probs, whole.token_log_probs[:, :2])
    torch.testing.assert_close(rest.token_log_probs, whole.token_log_probs[[3, 1], 2:])
    ragged = remote.follow_rows()
    for row in (0, 1):
        ragged.start_row(row, ids[row][mask[row].bool()].tolist())
    given = torch.tensor([[True, True, True, True, True, True], [True, True, False, False, False, False]])
    both = ragged.score([0, 1], responses[:2], wanted=given)
    last = ragged.score([1], responses[1:2, 2:], wanted=torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(both.token_log_probs[0], whole.token_log_probs[0])
    torch.testing.assert_close(last.token_log_probs[0], whole.token_log_probs[1, 2:])


def test_several_servers_share_the_rows(teacher):
    with FakeVLLM(teacher) as first, FakeVLLM(teacher) as second:
        remote = ServedTeacher([first.url, second.url], top_k=K)
        before = first.read, second.read
        scores_of(remote, *padded_prompts(LENGTHS), blocks()[0])
        assert [one.read - at for one, at in zip((first, second), before, strict=True)] == [3 + 1 + 12, 9 + 12 + 12]


def test_ids_that_do_not_count_are_left_out_as_far_as_they_are_returned(server, teacher):
    """Of log q the probability of those among the likeliest is taken away; what the others have stays in the normaliser."""
    ids, mask = padded_prompts(LENGTHS, vocab=40)
    responses, _ = blocks(vocab=40)
    read, excluded = {*responses.flatten().tolist(), *ids.flatten().tolist()}, set()
    full = [full_log_probs(teacher, ids[row][mask[row].bool()], responses[row]) for row in range(len(ids))]
    excluded = {int(row.argmax(-1)[0]) for row in full} - read
    assert excluded
    remote = ServedTeacher(server.url, top_k=K)
    remote.restrict_vocabulary(48, excluded)
    given = scores_of(remote, ids, mask, responses)
    for row, log_q in enumerate(full):
        for column, at in enumerate(log_q):
            returned = at.topk(K + served.SPARE_CANDIDATES).indices.tolist()
            left = 1 - sum(float(at[token].exp()) for token in returned if token in excluded)
            best = [token for token in returned if token not in excluded][:K]
            assert given.topk_ids[row, column].tolist() == best
            expected = [float(at[token]) - math.log(left) for token in best]
            assert given.topk_log_probs[row, column].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_likeliest_of_a_shorter_vocabulary_are_those_of_the_model_in_this_process(server, teacher, monkeypatch):
    """Also where a token that is none of them stands there: a server returns it beside them."""
    ids, mask = padded_prompts(LENGTHS, vocab=40)
    (responses, _), local = blocks(vocab=40), Teacher(teacher, top_k=K, vocab_size=40)
    remote = ServedTeacher(server.url, top_k=K)
    remote.restrict_vocabulary(40)
    ours, given = (scores_of(one, ids, mask, responses) for one in (local, remote))
    assert torch.equal(given.topk_ids, ours.topk_ids)
    monkeypatch.setattr(served, "SPARE_CANDIDATES", 0)
    with pytest.raises(ServingError, match="fewer than 4 of the likeliest ids"):
        scores_of(remote, ids, mask, responses)


# ---------------------------------------------------------------------- watched generations


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("how", ["hooks", "loop"])
def test_records_are_those_of_full_passes(server, student, teacher, how, truncate):
    ids, mask = padded_prompts(LENGTHS)
    arguments = {"max_new_tokens": 40, "eos_token_id": EOS, "pad_token_id": 0}
    tokens = generate(student, ids, mask, **arguments)
    remote = ServedTeacher(server.url, top_k=K)
    for check_every in (1, 8):
        monitor = DriftMonitor(remote, CONFIG, check_every=check_every, truncate=truncate)
        rollouts = monitor.finish(generate(student, ids, mask, monitor, loop=how == "loop", **arguments))
        rows = oracle(student, teacher, ids, mask, tokens, truncate=truncate)
        assert rollouts.teacher_log_probs is None
        assert_record_equals(rollouts, rows, watched=False)
        for row, expected in enumerate(rows):
            assert rollouts.overlap[row, : expected.length].tolist() == pytest.approx(
                expected.overlap[: expected.length]
            )


@pytest.mark.parametrize("truncate", [True, False])
def test_no_more_than_2_2_times_the_sequences_is_read(server, student, truncate):
    remote = ServedTeacher(server.url, top_k=K)
    sampling = Sampling(200, (EOS,), 0, temperature=1.0)
    engine = LoopEngine(student, sampling, slots=8)
    config = DriftConfig("overlap", K, 0.5, 0.05)
    monitor = DriftMonitor(remote, config, check_every=4, truncate=truncate, eos_token_id=EOS, pad_token_id=0)
    requests = [Request((5 + number, 6, 7), seed=number) for number in range(8)]
    before, watch = server.read, monitor.begin()
    done = list(engine.generate(requests, watch))
    sampled = sum(len(completion.token_ids) for completion in done) + watch.progress.discarded_tokens
    sequences = sampled + 3 * len(requests)
    assert server.read - before <= 2.2 * sequences
    if not truncate:
        assert server.read - before == sequences


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("own_prompt", [False, True])
def test_student_and_teacher_may_both_be_served(truncate, own_prompt):
    sampler, scorer = vllm_helpers.model(1), vllm_helpers.model(2, "qwen3")
    asked = vllm_helpers.requests()
    hints = [(7, 8, *request.prompt_ids) if own_prompt else request.prompt_ids for request in asked]
    with FakeVLLM(sampler) as first, FakeVLLM(scorer) as second:
        remote = ServedTeacher(second.url, top_k=K)
        engine = make_engine(
            "vllm", sampler, vllm_helpers.sampling(40), slots=4, teacher=remote, vllm=vllm_helpers.settings(first)
        )
        monitor = DriftMonitor(remote, CONFIG, check_every=4, truncate=truncate, eos_token_id=EOS, pad_token_id=0)
        contexts = [TeacherContext(hint) for hint in hints] if own_prompt else ()
        before, watch = second.read, monitor.begin(ragged=True, contexts=contexts)
        done = list(engine.generate(asked, watch))
    expected = [
        oracle_row(
            sampler,
            scorer,
            torch.tensor(request.prompt_ids),
            vllm_helpers.greedy(sampler, request, 40),
            teacher_prompt=torch.tensor(hint),
            truncate=truncate,
            **SETTINGS,
        )
        for request, hint in zip(asked, hints, strict=True)
    ]
    assert_record_equals(watch.rollouts(), expected, watched=False)
    sampled = sum(len(completion.token_ids) for completion in done) + watch.progress.discarded_tokens
    assert second.read - before <= 2.2 * (sampled + sum(map(len, hints)))


# ---------------------------------------------------------------------- what is refused


def test_what_a_server_cannot_do_is_refused_by_name(server):
    remote = ServedTeacher(server.url, top_k=K)
    with pytest.raises(
        ConfigError, match=r"metric='mass' needs a teacher that scores any token ids.*metric='weighted_overlap'"
    ):
        DriftMonitor(remote, DriftConfig("mass", K))
    with pytest.raises(MonitorStateError, match="rows cannot join"):
        remote.add_rows(torch.tensor([[5]]))
    with pytest.raises(MonitorStateError, match=r"call start\(prompt_ids"):
        remote.score(torch.tensor([[5]]))
    with pytest.raises(InputError, match=r"servers read 511 tokens, and a sequence of 513.*--max-model-len"):
        scores_of(remote, *padded_prompts((12,)), torch.full((1, 501), 5))
    remote.restrict_vocabulary(40)
    with pytest.raises(InputError, match="outside the teacher's vocabulary"):
        scores_of(remote, *padded_prompts((3,), vocab=40), torch.tensor([[45]]))


def test_a_prompt_may_hold_ids_that_do_not_count_and_a_response_may_not(server, teacher):
    """As of a teacher of this process."""
    prompt, mask, response = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long), torch.tensor([[8, 9]])
    for scorer in (Teacher(teacher, top_k=K), ServedTeacher(server.url, top_k=K)):
        scorer.restrict_vocabulary(48, {6})
        scores_of(scorer, prompt, mask, response)
        with pytest.raises(InputError, match="outside the teacher's vocabulary"):
            scores_of(scorer, prompt, mask, torch.tensor([[8, 6]]))
        with pytest.raises(InputError, match="outside the teacher's vocabulary"):
            scores_of(scorer, prompt + 42, mask, response)


@pytest.mark.parametrize("returned", [3, K + served.SPARE_CANDIDATES - 1])
def test_more_candidates_than_a_server_returns_are_refused_at_set_up(teacher, returned):
    with FakeVLLM(teacher, max_logprobs=returned) as small, pytest.raises(ServingError, match="larger --max-logprobs"):
        ServedTeacher(small.url, top_k=K)


def test_servers_with_different_models_are_refused(teacher):
    with FakeVLLM(teacher) as first, FakeVLLM(sharp(teacher)) as second:
        with pytest.raises(ServingError, match=f"{second.url} has another model.*differ by .* started with one model"):
            ServedTeacher([first.url, second.url], top_k=K)
        second.base = second.model = teacher
        second.name = "student-2"
        with pytest.raises(ServingError, match=r"another model or other weights \(student-2\)"):
            ServedTeacher([first.url, second.url], top_k=K)


def test_servers_whose_kernels_round_otherwise_may_have_their_model_in_different_folders(teacher):
    other, generator = copy.deepcopy(teacher), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight *= 1 + 0.02 * torch.randn(weight.shape, generator=generator)
    probe = torch.arange(8)
    ours, theirs = (full_log_probs(of, probe[:1], probe[1:]).gather(-1, probe[1:, None]) for of in (teacher, other))
    assert 0.1 < float((ours - theirs).abs().mean()) < 1.0
    with FakeVLLM(teacher) as first, FakeVLLM(other) as second:
        first.name, second.name = "org/teacher", "/models/teacher"
        assert ServedTeacher([first.url, second.url], top_k=K).name == "org/teacher"


def sharp(model):
    """Another model, of larger logits."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight *= 4
    return other


# ---------------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", ["503", "500", "close", "garbage", "hang"])
def test_a_fault_that_passes_changes_nothing(server, fault):
    remote = ServedTeacher(server.url, top_k=K, timeout=1.0 if fault == "hang" else 20.0)
    ids, mask = padded_prompts(LENGTHS)
    whole = scores_of(remote, ids, mask, blocks()[0])
    server.faults["/inference/v1/generate"] = [None, fault, None, fault]  # behind the small one
    again = scores_of(remote, ids, mask, blocks()[0])
    assert torch.equal(whole.topk_ids, again.topk_ids)
    assert torch.equal(whole.token_log_probs, again.token_log_probs)


@pytest.mark.parametrize("comes_back_with", ["another model", "another name", "weights of a trainer"])
def test_a_server_that_comes_back_with_another_model_is_refused(teacher, comes_back_with):
    with FakeVLLM(teacher) as server:
        remote = ServedTeacher(server.url, top_k=K, timeout=5.0)
        scores_of(remote, *padded_prompts((3,)), blocks(rows=1)[0])
        server.kill()
        if comes_back_with == "another model":
            server.base = server.model = sharp(teacher)
        if comes_back_with == "another name":
            server.name = "student-2"
        server.start()
        if comes_back_with == "weights of a trainer":
            server.version = "prune-opd-1-step-7"
        with pytest.raises(ServingError, match=f"{server.url} has another model or other weights .* and keep it"):
            scores_of(remote, *padded_prompts((3,)), blocks(rows=1)[0])


def test_rows_of_a_server_that_died_go_to_another(teacher):
    with FakeVLLM(teacher) as first, FakeVLLM(teacher) as second:
        remote = ServedTeacher([first.url, second.url], top_k=K, timeout=2.0)
        ids, mask = padded_prompts(LENGTHS)
        whole = scores_of(remote, ids, mask, blocks()[0])
        first.kill()
        again = scores_of(remote, ids, mask, blocks()[0])
        assert torch.equal(whole.token_log_probs, again.token_log_probs)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([None, "503"] * 5, "a sequence was sent 5 times.*raise teacher_model_server_timeout"),
        ([None, "garbage"] * 5, "sent an answer that is no JSON, or a part of one; a sequence was sent 5 times"),
        (["404"], "start it with --enable-scale-out"),
        (["401"], "wants another API key"),
    ],
)
def test_a_fault_that_stays_is_one_line(server, faults, message):
    remote = ServedTeacher(server.url, top_k=K)
    server.faults["/inference/v1/generate"] = faults
    with pytest.raises(ServingError, match=message) as found:
        scores_of(remote, *padded_prompts((3,)), blocks(rows=1)[0])
    assert "\n" not in str(found.value)


def test_a_server_that_does_not_come_back_is_given_up(server):
    remote = ServedTeacher(server.url, top_k=K, timeout=0.5)
    server.kill()
    with pytest.raises(ServingError, match=r"waited for 0.5 s \(teacher_model_server_timeout\)"):
        scores_of(remote, *padded_prompts((3,)), blocks(rows=1)[0])


def test_memory_that_nobody_wrote_is_no_score(server, monkeypatch):
    """What a server returns that was made to read its prefix cache."""
    remote, real = ServedTeacher(server.url, top_k=K), server._prompt_scores
    garbage = {"-1082823596": {"logprob": 0.1, "rank": 1}, "5": {"logprob": -1.0}, "6": {"logprob": -1.0}}

    def broken(ids, how):
        answer = real(ids, how)
        answer["prompt_logprobs"][-1] = {**garbage, str(ids[-1]): {"logprob": -2.0}}
        return answer

    monkeypatch.setattr(server, "_prompt_scores", broken)
    with pytest.raises(ServingError, match="ids that are none"):
        scores_of(remote, *padded_prompts((3,)), torch.tensor([[7, 8]]))


def test_a_log_probability_that_is_no_number_names_its_row(server, monkeypatch):
    remote, real = ServedTeacher(server.url, top_k=K), server._prompt_scores

    def broken(ids, how):
        answer = real(ids, how)
        for of in answer["prompt_logprobs"][-1].values() if ids != list(served.PROBE) else ():
            of["logprob"] = float("nan")
        return answer

    monkeypatch.setattr(server, "_prompt_scores", broken)
    with pytest.raises(NonFiniteLogitsError) as found:
        scores_of(remote, *padded_prompts((3, 5)), blocks(rows=2, time=3)[0])
    assert (found.value.row, found.value.token) == (0, 2)


def test_a_key_is_in_no_message(teacher, monkeypatch):
    key = "planted-secret-key"
    with FakeVLLM(teacher, key="another") as locked:
        monkeypatch.setenv("TEACHER_VLLM_API_KEY", key)
        with pytest.raises(ServingError) as found:
            ServedTeacher(locked.url, top_k=K)
    assert key not in str(found.value)
    assert "TEACHER_VLLM_API_KEY" in str(found.value)


def test_the_key_of_servers_that_sample_is_not_sent_to_a_teacher(server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "of-the-student")
    scores_of(ServedTeacher(server.url, top_k=K), *padded_prompts((3,)), torch.tensor([[5]]))
    assert server.keys == {None}
