"""The engine over vLLM's servers, against a stand-in that speaks their protocol: what is asked, what is made of the answers, and
every fault, at set-up and in mid-rollout. The same against real servers: test_vllm_real.py.
"""

import logging
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from fake_vllm import FakeVLLM
from oracle import assert_record_equals, oracle_row
from tiny_models import tiny_model
from vllm_helpers import (
    CAP,
    EOS,
    K,
    assert_rolls_out,
    engine_over,
    greedy,
    model,
    requests,
    sampling,
    settings,
    teacher,
    wait_briefly,
)

from prune_opd_hf import DriftConfig, Teacher
from prune_opd_hf.errors import ConfigError, ServingError
from prune_opd_hf.generation import DriftMonitor, Request, RolloutEngine, VLLMSettings, make_engine, resolve_engine
from prune_opd_hf.generation.engine import NewTokens, request_seed
from prune_opd_hf.generation.vllm import server_streams
from prune_opd_hf.generation.vllm.protocol import candidates_of, sampling_parameters
from prune_opd_hf.generation.vllm.server_streams import ServerStreams
from prune_opd_hf.serving.client import run


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    wait_briefly(monkeypatch)


# ---------------------------------------------------------------------- what is asked, and what is made of the answers


def test_rollouts_are_those_of_full_passes_and_every_row_ends_at_its_exhausted_token():
    with FakeVLLM(model(1)) as server:
        before = threading.active_count()  # other tests may have left some
        engine = engine_over(server)
        assert isinstance(engine, RolloutEngine)
        assert engine.delivers_candidates
        for check_every in (1, 4, 32):
            watch = assert_rolls_out(engine, model(1), check_every)
        assert "drift" in watch.rollouts().stop_reason
        assert threading.active_count() < before + 10
        engine.close()


def test_an_exhausted_row_is_cancelled_while_the_others_go_on():
    with FakeVLLM(model(1), lag=0.01) as server:
        engine = engine_over(server, how=sampling(400))
        monitor = DriftMonitor(teacher(), DriftConfig("overlap", K, 1.0, 0.5), check_every=4)
        watch = monitor.begin(eos_token_ids=(EOS,), pad_token_id=0, ragged=True)
        done = list(engine.generate(requests(), watch))
        assert {reason for _, _, reason in done} <= {"drift", "eos"}
        server.wait_until_quiet()
        assert server.generated < len(done) * 40  # of 400 each


def test_a_row_that_the_watch_ends_at_a_token_after_which_the_engine_goes_on_is_cancelled():
    [asked] = requests((3,))
    response = greedy(model(1), asked, 8).tolist()
    end = response[3]
    with FakeVLLM(model(1)) as server:
        engine, done = engine_over(server, how=sampling(400, ends=())), []
        monitor = DriftMonitor(teacher(), DriftConfig("overlap", K, 0.5, 1e-6), check_every=4)
        watch = monitor.begin(eos_token_ids=(end,), pad_token_id=0, ragged=True)
        caller = threading.Thread(target=lambda: done.extend(engine.generate([asked], watch)), daemon=True)
        caller.start()
        caller.join(30)
        assert not caller.is_alive(), "the stream is waited for, and waits for the watch"
        server.wait_until_quiet()
    assert done == [(0, response[: response.index(end) + 1], "eos")]


def test_without_a_watch_whole_answers_come_and_an_abandoned_generation_leaves_no_stream():
    with FakeVLLM(model(1)) as server:
        engine = make_engine("vllm", model(1), sampling(), slots=4, vllm=settings(server))
        asked = requests()
        done = sorted(engine.generate(asked))
        assert [tokens for _, tokens, _ in done] == [greedy(model(1), each).tolist() for each in asked]
        assert all("logprobs" not in body["sampling_params"] for body in server.bodies("/inference/v1/generate"))
        server.lag = 0.05
        half = engine.generate(asked)
        next(half)
        half.close()
        server.wait_until_quiet()
        assert list(engine.generate([])) == []


def test_sampling_parameters_are_said_in_vllms_words():
    how = sampling(7, ends=(1, 9), temperature=0.6, top_p=0.9, top_k=20, generation_kwargs={"min_p": 0.05})
    with FakeVLLM(model(1)) as server:
        engine = make_engine("vllm", model(1), how, slots=1, teacher=teacher(), vllm=settings(server))
        list(engine.generate([Request((5, 6), seed=11), Request((7,), seed=12, max_completion_length=3)]))
        first, second = (body["sampling_params"] for body in server.bodies("/inference/v1/generate")[1:])
    assert first == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "seed": 11,
        "max_tokens": 7,
        "logprobs": K + 1,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "detokenize": False,
        "stop_token_ids": [1, 9],
        "ignore_eos": True,
        "stream_interval": 64,
    }
    assert (second["seed"], second["max_tokens"]) == (12, 3)
    assert sampling_parameters(sampling(), 0)["temperature"] == 0.0
    assert sampling_parameters(sampling(generation_kwargs={"repetition_penalty": 1.0}), 0)
    for name, value in (("repetition_penalty", 1.1), ("num_beams", 2), ("stop_strings", ["."]), ("min_new_tokens", 4)):
        further = sampling(generation_kwargs={name: value})
        with pytest.raises(ConfigError, match=f"vLLM samples without {name}=.*rollout_engine='loop'"):
            sampling_parameters(further, 0)
        with pytest.raises(ConfigError, match=f"continuous batching samples without {name}=.*rollout_engine='loop'"):
            make_engine("continuous_batching", model(1), further, slots=1)
        with_gpu = SimpleNamespace(device=torch.device("cuda"))
        assert resolve_engine("auto", with_gpu, sampling=further) == "loop"
        assert resolve_engine("auto", with_gpu, sampling=sampling()) == "continuous_batching"


def test_of_k_plus_one_alternatives_the_likeliest_k_are_kept_whether_the_token_is_among_them_or_not():
    among = candidates_of([{7: -0.5, 3: -1.0, 9: -2.0}], [3], 2)
    assert (among.ids, among.log_probs, among.token_log_probs) == ([[7, 3]], [[-0.5, -1.0]], [-1.0])
    outside = candidates_of([{7: -0.5, 3: -1.0, 40: -8.0}], [40], 2)
    assert (outside.ids, outside.token_log_probs) == ([[7, 3]], [-8.0])


def test_where_ids_are_not_shared_they_are_never_sampled_and_the_students_side_is_scored_here():
    """Of 48 ids the teacher knows 40: the server's normaliser is over all 48, which must not enter the record."""
    student, small = model(1), model(2, "qwen3", vocab_size=40)
    with FakeVLLM(student) as server:
        watcher = Teacher(small, top_k=K)
        how = sampling(suppress_tokens=tuple(range(40, 48)))
        engine = make_engine("vllm", student, how, slots=4, teacher=watcher, vllm=settings(server))
        assert not engine.delivers_candidates
        monitor = DriftMonitor(watcher, DriftConfig("overlap", K, 0.5, 0.25), check_every=4, student=student)
        watch = monitor.begin(eos_token_ids=(EOS,), pad_token_id=0, ragged=True)
        asked = requests(vocab=40)
        list(engine.generate(asked, watch))
    rollouts, rows = watch.rollouts(), []
    for row, request in enumerate(asked):
        tokens = rollouts.response_ids[row, : int(rollouts.lengths[row])]
        assert int(tokens.max()) < 40
        how = {"k": K, "threshold": 0.5, "weight_drop": 0.25, "vocab": 40}
        rows.append(oracle_row(student, small, torch.tensor(request.prompt_ids), tokens, **how))
    assert_record_equals(rollouts, rows)


def test_several_servers_share_the_requests_and_samples_of_one_prompt_stay_together():
    with FakeVLLM(model(1)) as one, FakeVLLM(model(1)) as two:
        engine = engine_over(one, two)
        asked = [each for each in requests() for _ in range(2)]
        assert_rolls_out(engine, model(1), asked=asked)
        prompts = {each.prompt_ids for each in asked}
        asked_of = [
            [tuple(body["token_ids"]) for body in server.bodies("/inference/v1/generate")] for server in (one, two)
        ]
        shares = [[ids for ids in each if ids in prompts] for each in asked_of]
    assert sorted(map(len, shares)) == [4, 4]
    assert not set(shares[0]) & set(shares[1])


def test_new_weights_are_sampled_with_and_older_folders_removed(tmp_path):
    with FakeVLLM(model(1)) as server:
        engine = make_engine(
            "vllm", model(1), sampling(), slots=4, teacher=teacher(), vllm=settings(server, weights_dir=str(tmp_path))
        )
        for step, seed in enumerate((1, 3, 4)):
            engine.update_weights(model(seed), step)
            watch = assert_rolls_out(engine, model(seed))
            assert server.version.endswith(f"-{step + 1}-step-{step}")
            assert (watch.rollouts().engine, watch.rollouts().weights) == ("vllm server", server.version)
        [folder] = tmp_path.iterdir()
        assert [each.name.rsplit("-", 1)[1] for each in folder.iterdir()] == ["2"]
        assert server.bodies("/reset_prefix_cache") == [{}, {}, {}]
        engine.close()
        assert not folder.exists()


def test_another_sampling_shares_the_servers_and_weights_are_sent_once(tmp_path):
    with FakeVLLM(model(1)) as server:
        vllm = settings(server, weights_dir=str(tmp_path))
        engine = make_engine("vllm", model(1), sampling(), slots=4, teacher=teacher(), vllm=vllm)
        other = engine.with_sampling(sampling(5), slots=1)
        for step, seed in enumerate((3, 4)):
            for each in (engine, other, engine):
                each.update_weights(model(seed), step)
            assert len(server.bodies("/collective_rpc")) == step + 1
            assert_rolls_out(engine, model(seed))
            done = sorted(other.generate(requests()))
            assert [tokens for _, tokens, _ in done] == [greedy(model(seed), each, 5).tolist() for each in requests()]
        [folder] = tmp_path.iterdir()
        assert len(list(folder.iterdir())) == 1
        with pytest.raises(ConfigError, match="too few for max_completion_length 512"):
            engine.with_sampling(sampling(512), slots=1)


def test_a_checkpoint_that_is_loaded_at_the_same_step_is_sent():
    student = tiny_model("llama", 3, pad=None)
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server)
        engine.update_weights(student, 7)
        student.load_state_dict(model(4).state_dict())
        engine.update_weights(student, 7)
        assert_rolls_out(engine, model(4))


# ---------------------------------------------------------------------- back-pressure


def slow(watch):
    """So that the server has sampled whatever it was asked for before a block is scored."""
    score = watch.score_ready

    def score_slowly(undisturbed):
        time.sleep(0.3)
        return score(undisturbed)

    watch.score_ready = score_slowly
    return watch


def test_tokens_of_one_step_of_a_server_are_handed_out_together(monkeypatch):
    async def nothing(streams):
        """The test puts the tokens."""

    monkeypatch.setattr(ServerStreams, "_every_row", nothing)
    with FakeVLLM(model(1)) as server:
        streams = ServerStreams(engine_over(server), requests((3, 5)), [CAP, CAP], None)
        streams.step_seconds = 0.5
        timers = [
            threading.Timer(seconds, streams.arrived.put, [(0, NewTokens(row, 0, [7]))])
            for row, seconds in ((0, 0.1), (1, 0.2))
        ]
        for timer in timers:
            timer.start()
        assert [new.row for new in streams.next()] == [0, 1]  # the second came a fifth of a step later
        streams.close()


@pytest.mark.parametrize("min_length", [0, 40])
def test_a_server_that_runs_ahead_samples_at_most_two_blocks_past_a_stop(min_length):
    block = 16
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server, how=sampling(200, ends=()))
        drift = DriftConfig("overlap", K, 1.0, 0.2, min_length=min_length)
        monitor = DriftMonitor(teacher(), drift, check_every=block)
        watch = slow(monitor.begin(eos_token_ids=(), pad_token_id=0, ragged=True))
        done = list(engine.generate(requests((3, 5)), watch))
        server.wait_until_quiet()
        assert {reason for _, _, reason in done} == {"drift"}
        kept = sum(len(tokens) for _, tokens, _ in done)
        assert server.generated - kept <= len(done) * 2 * block


@pytest.mark.parametrize("watched_slowly", [False, True])
def test_a_response_in_pieces_goes_on_where_it_was_and_pieces_depend_on_lengths_alone(monkeypatch, watched_slowly):
    monkeypatch.setattr(server_streams, "ROW_PARTS", 2)
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server, how=sampling(140, ends=(), temperature=1.0))
        monitor = DriftMonitor(teacher(), DriftConfig("overlap", K, 0.5, 1e-6), check_every=16)
        watch = monitor.begin(eos_token_ids=(), pad_token_id=0, ragged=True)
        asked = Request((5, 6, 7), seed=11)
        [(_, tokens, reason)] = engine.generate([asked], slow(watch) if watched_slowly else watch)
    assert (len(tokens), reason) == (140, "length")
    bodies = server.bodies("/inference/v1/generate")[1:]
    # blocks of 16 up to 64 tokens, half of which are two blocks; at 96 three; the end
    assert [body["sampling_params"]["max_tokens"] for body in bodies] == [16, 16, 16, 16, 32, 44]
    for body, begun in zip(bodies, (0, 16, 32, 48, 64, 96), strict=True):
        assert tuple(body["token_ids"]) == (*asked.prompt_ids, *tokens[:begun])
        seed = request_seed(11, begun) if begun else 11
        assert body["sampling_params"]["seed"] == seed


@pytest.mark.parametrize(("stops", "files", "at_once"), [(True, 99, 4), (False, 99, 6), (True, 3, 3), (False, 3, 3)])
def test_rows_that_drift_may_stop_are_under_way_in_so_many_slots_and_whole_responses_in_a_few_hundred(
    monkeypatch, stops, files, at_once
):
    most, real = 0, ServerStreams._response

    async def counted(streams, server, row):
        nonlocal most
        most = max(most, len(streams.running))
        return await real(streams, server, row)

    monkeypatch.setattr(ServerStreams, "_response", counted)
    monkeypatch.setattr(server_streams, "MOST_STREAMS", 6)
    monkeypatch.setattr(server_streams, "_most_connections", lambda: files)
    with FakeVLLM(model(1), lag=0.005) as server:
        engine = engine_over(server)  # four slots
        asked = [each for each in requests() for _ in range(3)]
        if stops:
            assert_rolls_out(engine, model(1), asked=asked)
        else:
            assert len(list(engine.generate(asked))) == len(asked)
    assert most == at_once


# ---------------------------------------------------------------------- faults at set-up


def closed_port():
    server = FakeVLLM(model(1))
    server.kill()
    return server


SETUP_FAULTS = {
    "not there": (closed_port, "cannot be reached .*, and was waited for 0.3 s"),
    "hangs": (lambda: faulty("/inference/v1/generate", ["hang"] * 50), "gave no answer within 0.3 s"),
    "fails for good": (lambda: faulty("/health", ["503"] * 50), r"answered 503 to /health \(made to fail with 503\)"),
    "breaks every connection": (lambda: faulty("/health", ["close"] * 50), "broke the connection"),
    "is something else": (lambda: faulty("/v1/models", ["garbage"]), "is no vLLM server: its /v1/models says nothing"),
    "knows no such page": (lambda: faulty("/v1/models", ["404"]), "404 .*is this vLLM's address"),
    "wants a key": (lambda: FakeVLLM(model(1), key="sesame"), "put the one that it was started with into VLLM_API_KEY"),
    "token API off": (lambda: FakeVLLM(model(1), token_api=False), "start it with --enable-scale-out"),
    "takes no weights": (lambda: FakeVLLM(model(1), dev_mode=False), "start it with VLLM_SERVER_DEV_MODE=1"),
    "too few log-probabilities": (
        lambda: FakeVLLM(model(1), max_logprobs=3),
        "of 5.*start it with a larger --max-logprobs",
    ),
    "too short": (lambda: FakeVLLM(model(1), max_model_len=CAP), r"takes sequences of 18 tokens \(--max-model-len\)"),
    "larger vocabulary": (
        lambda: FakeVLLM(model(1, vocab_size=400)),
        "has another vocabulary: token [0-9]+, and the student knows 48",
    ),
    "refuses": (
        lambda: faulty("/inference/v1/generate", ["400"]),
        r"answered 400 .*made to fail with 400.*see its log",
    ),
}


def faulty(path, faults):
    server = FakeVLLM(model(1))
    server.faults[path] = faults
    return server


@pytest.mark.parametrize("name", sorted(SETUP_FAULTS))
def test_a_fault_at_set_up_is_one_line_with_the_url_and_the_remedy(name):
    make, message = SETUP_FAULTS[name]
    with make() as server:
        with pytest.raises((ServingError, ConfigError), match=message) as raised:
            engine_over(server, timeout=0.3)
        assert server.url in str(raised.value)
        assert "\n" not in str(raised.value)


def test_what_passes_is_waited_for(caplog):
    with FakeVLLM(model(1)) as server:
        server.faults["/health"] = ["503", "close", "503"]
        with caplog.at_level(logging.WARNING):
            engine = engine_over(server)
        assert_rolls_out(engine, model(1))
    assert [record.getMessage().count("waiting for up to 5 s") for record in caplog.records] == [1]


def test_a_server_of_another_model_is_found_when_it_gets_its_first_weights(monkeypatch):
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server)
        server.faults["/collective_rpc"] = ["500"]
        with pytest.raises(ServingError, match=r"answered 500 to /collective_rpc .*common folder in vllm_weights_dir"):
            engine.update_weights(model(1), 0)
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server)
        monkeypatch.setattr("fake_vllm.AutoModelForCausalLM.from_pretrained", lambda path: model(7, "qwen3"))
        with pytest.raises(ServingError, match=r"serves another model than the student.*differ by .* on average"):
            engine.update_weights(model(1), 0)


def test_a_server_that_does_not_take_its_weights_is_not_trained_on():
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server)
        engine.update_weights(model(1), 0)
        server.forgetful = True
        engine.update_weights(model(1), 1)
        with pytest.raises(
            ServingError, match="does not sample with the weights that it was sent: log-probabilities of 16"
        ):
            engine.update_weights(model(3), 2)


def test_no_key_reaches_a_message_a_log_or_a_setting(monkeypatch, caplog):
    monkeypatch.setenv("VLLM_API_KEY", "open-sesame-123\n")  # as from a file
    with FakeVLLM(model(1), key="open-sesame-123") as server, caplog.at_level(logging.DEBUG):
        engine = engine_over(server)
        assert_rolls_out(engine, model(1))
        server.key = "another"
        with pytest.raises(ServingError, match="wants another API key") as raised:
            list(engine.generate(requests()))
    assert "sesame" not in str(raised.value) + caplog.text + repr(vars(engine)) + repr(vars(engine.weights))
    with pytest.raises(ConfigError, match="without a user or a key") as raised:
        settings("http://me:sesame@127.0.0.1:1")
    assert "sesame" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "cloud"}, "vllm_mode must be one of server, colocate, got 'cloud'"),
        ({"server_base_url": "127.0.0.1:8000"}, "must be http://HOST:PORT"),
        ({"server_timeout": 0}, "vllm_server_timeout must be a number of seconds above 0"),
        ({"weights_dir": "/nowhere"}, "vllm_weights_dir /nowhere is not there or cannot be written to"),
        ({"gpu_memory_utilization": 1.5}, r"vllm_gpu_memory_utilization must lie in \(0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        VLLMSettings.of(**{"mode": "server", "server_base_url": None, **changes})


def test_coroutines_run_where_an_event_loop_runs_already():
    async def outer():
        async def inner():
            return 7

        return run(inner())

    assert run(outer()) == 7
