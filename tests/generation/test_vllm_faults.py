"""vLLM's servers that fail: in mid-rollout, and when they get weights. Against a stand-in, as in test_vllm_server.py."""

import errno
import threading
import time
from contextlib import ExitStack

import pytest
from fake_vllm import FakeVLLM
from trainer_helpers import make_trainer
from vllm_helpers import CAP, K, assert_rolls_out, engine_over, model, requests, sampling, teacher, wait_briefly

from prune_opd_hf import DriftConfig
from prune_opd_hf.errors import DiskFullError, InputError, ServingError, TrainingStoppedError
from prune_opd_hf.generation import DriftMonitor
from prune_opd_hf.generation.vllm import server_weights, weights
from prune_opd_hf.generation.vllm.server_streams import ServerStreams
from prune_opd_hf.generation.vllm.weights import SavedWeights
from prune_opd_hf.serving import servers
from prune_opd_hf.serving.client import TransientError, run
from prune_opd_hf.tasks import load_student


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    wait_briefly(monkeypatch)


# ---------------------------------------------------------------------- faults in mid-rollout


@pytest.mark.parametrize("how", ["close", "error", "abort"])
@pytest.mark.parametrize("after", [0, 3])
def test_answers_that_break_off_begin_anew_and_no_token_of_them_is_used(how, after):
    student = model(3)
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server)
        engine.update_weights(student, 0)
        server.break_after, server.how_it_breaks, server.breaks = after, how, 3
        assert_rolls_out(engine, student, check_every=2)
        assert server.breaks == 0


def test_an_answer_that_has_ended_is_whole_whatever_becomes_of_its_connection():
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server)
        server.sends_done = False
        assert_rolls_out(engine, model(1))
        asked = [tuple(body["token_ids"]) for body in server.bodies("/inference/v1/generate")]
        assert len(asked) == len(set(asked)) >= 1 + len(requests())  # the probe, and each piece once


@pytest.mark.parametrize("odd", [None, [], {}, {"data": None}, "none"])
@pytest.mark.parametrize("adapter", [False, True])
def test_an_odd_answer_of_a_server_that_recovers_is_an_error_and_no_endless_wait(odd, adapter):
    path = "/v1/models" if adapter else "/weight_info"
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server)
        engine.weights.current = SavedWeights("nowhere", "prune-opd-1", adapter)
        server.odd[path] = odd
        with pytest.raises(ServingError, match="answers otherwise than version"):
            list(engine.generate(requests()))


def test_a_fault_of_any_kind_while_a_server_recovers_reaches_the_caller():
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server)
        engine.weights.current = SavedWeights("nowhere", "prune-opd-1", False)

        async def fail(*_):
            raise RuntimeError("no error of this package")

        engine.weights.are_held_by = fail
        with pytest.raises(RuntimeError, match="no error of this package"):
            list(engine.generate(requests()))


@pytest.mark.parametrize("fault", ["500", "503", "429", "close"])
def test_an_answer_that_fails_at_its_beginning_is_asked_for_again(fault):
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server)
        server.faults["/inference/v1/generate"] = [fault, None, fault]
        assert_rolls_out(engine, model(1))


def test_a_server_that_hangs_is_noticed_by_its_silence():
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server, timeout=0.4)
        server.break_after, server.how_it_breaks, server.breaks = 3, "hang", 2
        assert_rolls_out(engine, model(1))


def test_requests_that_wait_for_their_turn_are_no_hang():
    """A server that answers one after the other keeps the last waiting for longer than the time limit of silence."""
    with FakeVLLM(model(1), lag=0.04) as server:
        engine = engine_over(server, timeout=0.5)
        assert_rolls_out(engine, model(1), weight_drop=0.0)


def test_a_server_that_was_killed_and_started_anew_gets_the_weights_again():
    student = model(3)
    with FakeVLLM(model(1), lag=0.05) as server:
        engine = engine_over(server)
        engine.update_weights(student, 0)

        def restart():
            server.kill()
            server.start()

        timer = threading.Timer(0.15, restart)
        timer.start()
        assert_rolls_out(engine, student, weight_drop=0.0)
        timer.join()
        assert len(server.bodies("/collective_rpc")) == 2
        assert server.version.endswith("-step-0")


def test_a_server_that_was_started_anew_between_two_steps_gets_the_weights_before_it_is_asked():
    student = model(3)
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server)
        engine.update_weights(student, 0)
        server.kill()
        server.start()
        assert_rolls_out(engine, student)


def test_where_one_server_dies_the_others_take_over():
    with ExitStack() as stack:
        one, two = (stack.enter_context(FakeVLLM(model(1), lag=0.05)) for _ in range(2))
        engine = engine_over(one, two, timeout=1.0)
        timer = threading.Timer(0.15, one.kill)
        timer.start()
        assert_rolls_out(engine, model(1), weight_drop=0.0)
        timer.join()


def test_where_one_server_is_gone_for_good_the_others_get_new_weights_and_it_gets_them_when_it_comes_back(monkeypatch):
    with FakeVLLM(model(1)) as one, FakeVLLM(model(1)) as two:
        engine = engine_over(one, two)
        engine.update_weights(model(3), 0)
        monkeypatch.setattr(servers, "POLL_SECONDS", 100)  # beyond the time-out: one that is away is gone
        two.kill()
        engine.update_weights(model(4), 1)
        assert_rolls_out(engine, model(4))
        assert engine.weights.gone == {two.url}
        two.start()
        assert_rolls_out(engine, model(4))
        assert engine.weights.gone == set()
        assert one.version == two.version


def test_rows_that_were_stopped_on_a_server_that_is_gone_for_good_are_kept(monkeypatch):
    with FakeVLLM(model(1), lag=0.01) as one, FakeVLLM(model(1), lag=0.01) as two:
        engine = engine_over(one, two, how=sampling(400, ends=()))
        engine.update_weights(model(1), 0)
        monkeypatch.setattr(servers, "POLL_SECONDS", 100)
        real, answers = engine.weights.are_held_by, iter([True])

        async def held(client, url):
            if url == two.url and next(answers, None) is None:
                raise TransientError("is away")
            return await real(client, url)

        engine.weights.are_held_by = held
        done = list(engine.generate(requests(), watch_that_stops_every_row()))
    assert [reason for _, _, reason in done] == ["drift"] * 4
    assert engine.weights.gone == {two.url}


def test_an_adapter_whose_loading_lost_its_answer_is_not_loaded_twice():
    """A server refuses that."""
    with FakeVLLM(model(1)) as server:
        engine, adapter = engine_over(server), SavedWeights("nowhere", "prune-opd-1", True)
        server.adapters["prune-opd-1"] = model(3)
        run(engine.servers.ask_each(lambda client, url: engine.weights.send(client, url, adapter)))
        assert not server.bodies("/v1/load_lora_adapter")


def test_where_none_comes_back_the_error_names_the_url_and_what_to_do():
    with FakeVLLM(model(1), lag=0.05) as server:
        engine = engine_over(server, timeout=0.4)
        timer = threading.Timer(0.1, server.kill)
        timer.start()
        with pytest.raises(
            ServingError, match=r"cannot be reached .*, and was waited for 0.4 s.*resume_from_checkpoint"
        ) as raised:
            list(engine.generate(requests()))
        timer.join()
        assert server.url in str(raised.value)


def test_a_server_that_breaks_every_answer_is_given_up():
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server)
        server.break_after = 2
        with pytest.raises(ServingError, match="a response was begun 5 times"):
            list(engine.generate(requests()))


def test_answers_of_other_weights_are_refused_and_asked_for_again():
    """Another run sends its weights to the same server while this one samples."""
    student = model(3)
    with FakeVLLM(model(1), lag=0.01) as server:
        engine = engine_over(server)
        engine.update_weights(student, 0)

        def take_over():
            server.model, server.version = model(4), "another run"

        timer = threading.Timer(0.1, take_over)
        timer.start()
        assert_rolls_out(engine, student, weight_drop=0.0)
        timer.join()


def test_answers_that_were_cut_short_are_refused_where_the_weights_changed_meanwhile():
    with FakeVLLM(model(1), lag=0.01) as server:
        engine = engine_over(server, how=sampling(400, ends=()))
        engine.update_weights(model(1), 0)
        server.version = None
        real = engine.weights.are_held_by
        answers = iter([True])

        async def held(client, url):
            return next(answers, None) or await real(client, url)

        engine.weights.are_held_by = held
        watch = watch_that_stops_every_row()
        with pytest.raises(ServingError, match=r"was given other weights than .* while it sampled"):
            list(engine.generate(requests((3, 5)), watch))


def watch_that_stops_every_row(check_every=4):
    """No overlap is above 1, so that each row drifts at its first tokens."""
    monitor = DriftMonitor(teacher(), DriftConfig("overlap", K, 1.0, 0.5), check_every=check_every)
    return monitor.begin(eos_token_ids=(), pad_token_id=0, ragged=True)


@pytest.mark.parametrize("fault", ["503", "close"])
def test_a_fault_that_passes_when_the_weights_of_cancelled_answers_are_asked_for_is_waited_for(fault):
    with FakeVLLM(model(1), lag=0.01) as server:
        engine = engine_over(server, how=sampling(400, ends=()))
        engine.update_weights(model(1), 0)
        server.faults["/weight_info"] = [None, fault]  # before the first request all is well
        done = list(engine.generate(requests((3, 5)), watch_that_stops_every_row()))
    assert [reason for _, _, reason in done] == ["drift"] * 2
    assert not server.faults["/weight_info"]


def test_tokens_of_old_weights_are_refused_where_the_server_got_the_right_ones_before_the_watch_stopped_the_row():
    """A server is started anew unseen, both rows begin on it, and the break of one has the weights sent again."""
    with FakeVLLM(model(1), lag=0.01) as server:
        engine = engine_over(server, how=sampling(400, ends=()))
        engine.update_weights(model(3), 0)
        version, real, answers = server.version, engine.weights.are_held_by, iter([True])

        async def held(client, url):
            return next(answers, None) or await real(client, url)

        engine.weights.are_held_by = held
        server.model, server.version = model(1), None
        server.break_after, server.breaks = 12, 1
        watch = watch_that_stops_every_row()
        score = watch.score_ready

        def score_when_weights_are_sent_again(undisturbed):
            if watch.check_every <= max(arrived.tokens for arrived in watch._arrived.values()):
                for _ in range(500):
                    if server.version == version:
                        break
                    time.sleep(0.01)
            return score(undisturbed)

        watch.score_ready = score_when_weights_are_sent_again
        with pytest.raises(ServingError, match="was started anew, or was given other weights"):
            list(engine.generate(requests((3, 5)), watch))
        assert server.version == version


def test_a_row_whose_server_failed_while_it_waited_for_its_score_begins_anew_when_that_has_recovered():
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server, how=sampling(100, ends=()))
        streams, got = ServerStreams(engine, requests((3,)), [100], watch_that_stops_every_row(16)), 0
        while got < 32:  # a block and the one after it, as far as it may come unscored
            got += sum(len(new.token_ids) for new in streams.next())
        [asked] = streams.pool.servers
        streams._in_thread(asked.ready.clear)
        streams.cancel([])  # all 32 are scored
        for _ in range(500):
            if not streams.running:
                break
            time.sleep(0.01)
        streams._in_thread(asked.ready.set)
        assert streams.next()[0].start == 0
        streams.close()


def test_a_row_that_is_stopped_while_it_waits_for_its_server_does_not_begin_anew():
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server, how=sampling(100, ends=()))
        server.break_after, server.breaks = 9, 1
        server.faults["/health"] = [None, *["503"] * 10]  # after the break it recovers for a while
        streams = ServerStreams(engine, requests((3,)), [100], watch_that_stops_every_row())
        streams.next()
        while server.breaks or streams.running or streams.pool.servers[0].ready.is_set():
            time.sleep(0.01)
        streams.cancel([0])
        streams.thread.join(5)
        assert not streams.thread.is_alive()
        assert len(server.bodies("/inference/v1/generate")) == 2  # the probe, and the one piece
        streams.close()


@pytest.mark.parametrize("attempt", [0, 1])
def test_scores_of_an_attempt_that_broke_off_do_not_count_for_the_next_one(attempt):
    with FakeVLLM(model(1), lag=0.05) as server:
        engine = engine_over(server)
        streams = ServerStreams(engine, requests((3,)), [CAP], watch_that_stops_every_row())
        streams.next()
        streams.attempts[0] = 1
        streams._cancel({}, {0: (attempt, 7)})
        assert streams.scored == [7 * attempt]
        streams.close()


def test_a_sequence_beyond_what_the_servers_take_is_refused_before_anything_is_sampled():
    with FakeVLLM(model(1), max_model_len=24) as server:
        engine = engine_over(server)
        with pytest.raises(
            InputError, match=r"a prompt of 7 tokens and its response may come to 25, and vLLM at .* takes 24"
        ):
            list(engine.generate(requests()))
        assert len(server.bodies("/inference/v1/generate")) == 1  # the probe


def test_a_refusal_in_mid_rollout_is_final():
    with FakeVLLM(model(1)) as server:
        engine = engine_over(server)
        server.faults["/inference/v1/generate"] = [None, "400"]
        with pytest.raises(ServingError, match="answered 400"):
            list(engine.generate(requests()))


def test_a_run_whose_server_died_for_good_goes_on_from_its_checkpoint_when_there_is_one_again(tmp_path):
    how = {"rollout_engine": "vllm", "vllm_mode": "server", "vllm_server_timeout": 0.5, "save_strategy": "steps"}
    with FakeVLLM(load_student()) as server:
        how |= {"vllm_server_base_url": server.url, "save_steps": 1}
        trainer = make_trainer(tmp_path, **how)
        real = trainer.engine.generate

        def generate(asked, watch):
            if trainer.state.global_step == 1:
                server.kill()
            return real(asked, watch)

        trainer.engine.generate = generate
        with pytest.raises(TrainingStoppedError, match=r"cannot be reached.*the last checkpoint is .*checkpoint-1"):
            trainer.train()
        server.start()
        resumed = make_trainer(tmp_path, **how)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 3
        assert server.version.endswith("-step-2")


# ---------------------------------------------------------------------- faults of new weights


class TwoProcesses:
    """Two threads as the ranks of a run: the second one waits in the broadcast for what the first one met."""

    def __init__(self, monkeypatch):
        self.meeting, self.sent = threading.Barrier(2, timeout=20), None
        for module in (server_weights, weights):
            monkeypatch.setattr(module, "is_main_process", self.is_main)
        monkeypatch.setattr(server_weights, "_from_main_process", self.broadcast)

    def is_main(self):
        return threading.current_thread().name == "rank 0"

    def broadcast(self, value):
        if self.is_main():
            self.sent = value
        self.meeting.wait()
        sent = self.sent
        self.meeting.wait()  # before the first one sends more
        return sent

    def run(self, call):
        faults = {}

        def rank(name):
            try:
                call()
            except Exception as error:
                faults[name] = error

        ranks = [threading.Thread(target=rank, args=(f"rank {n}",), name=f"rank {n}") for n in (0, 1)]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join()
        return faults


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("met", ["a full disk", "another model", "an odd answer", "weights that are not sent"])
def test_whatever_the_first_process_meets_all_processes_raise_together(met, monkeypatch):
    student, message = model(3), "odd"
    with FakeVLLM(model(1)) as server:
        engines = [engine_over(server, student=student) for _ in range(2)]
        if met == "a full disk":
            monkeypatch.setattr(student, "save_pretrained", no_room)
            kind, message = DiskFullError, "could not be written: No space left on device"
        elif met == "another model":
            monkeypatch.setattr("fake_vllm.AutoModelForCausalLM.from_pretrained", lambda path: model(7, "qwen3"))
            kind, message = ServingError, "serves another model than the student"
        elif met == "an odd answer":
            server.odd["/reset_prefix_cache"] = [1]
            kind, message = ServingError, "answers otherwise than version 0.32 does"
        else:
            server.faults["/collective_rpc"] = ["500"]
            kind, message = ServingError, "answered 500 to /collective_rpc"
        ranks = TwoProcesses(monkeypatch)
        of_rank = {"rank 0": engines[0], "rank 1": engines[1]}
        faults = ranks.run(lambda: of_rank[threading.current_thread().name].update_weights(student, 0))
    assert sorted(faults) == ["rank 0", "rank 1"]
    for fault in faults.values():
        assert isinstance(fault, kind)
        assert message in str(fault)
