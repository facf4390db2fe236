"""Rollouts through real vLLM servers, and through vLLM in a process: `make test-vllm`. What a stand-in shows is not repeated here.

contract: recorded ids equal, log-probabilities within 1e-4 of full passes, greedy tokens those of plain `generate`
weights:  after every optimizer step the servers sample with the trainer's
faults:   kill -9 in mid-step
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from oracle import assert_record_equals, full_log_probs, oracle_row
from servable import with_heads_of_32
from trainer_helpers import make_trainer
from vllm_servers import Fleet, servable_model

from prune_opd_hf import DriftConfig, Teacher
from prune_opd_hf.errors import ConfigError, ServingError
from prune_opd_hf.generation import DriftMonitor, Request, Sampling, VLLMSettings, make_engine
from prune_opd_hf.tasks import load_student, load_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore::FutureWarning")]

ROOT = Path(__file__).parents[2]
EOS, K, CAP = 1, 4, 40
STUDENTS = {"Llama": lambda: servable_model("Llama", 1), "Qwen3": lambda: servable_model("Qwen3", 2)}


class Servers(Fleet):
    """A server for each tiny student, and one for the embedded task's that takes adapters."""

    def __getitem__(self, name):
        if name == "embedded":
            return self.get(name, embedded_student, "--enable-lora", "--max-lora-rank", "8")
        return self.get(name, STUDENTS[name], "--max-num-seqs", "32")


def embedded_student():
    return with_heads_of_32(load_student())


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    running = Servers(tmp_path_factory.mktemp("vllm"))
    yield running
    running.stop()


def settings(*servers, timeout=240.0):
    return VLLMSettings.of(
        mode="server", server_base_url=",".join(server.url for server in servers), server_timeout=timeout
    )


def requests(lengths, vocab=96, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [Request(tuple(torch.randint(3, vocab, (n,), generator=generator).tolist()), seed=n) for n in lengths]


def greedy(student, request, cap=CAP):
    ids = torch.tensor([request.prompt_ids])
    arguments = {"do_sample": False, "max_new_tokens": cap, "eos_token_id": EOS, "pad_token_id": 0}
    return student.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, ids.shape[1] :]


@pytest.mark.parametrize("family", sorted(STUDENTS))
def test_rollouts_are_those_of_full_passes_and_of_plain_generate(servers, family):
    student, teacher = STUDENTS[family](), servable_model("Llama", 7)
    watcher = Teacher(teacher, top_k=K)
    how = Sampling(CAP, (EOS,), 0, temperature=0.0)
    engine = make_engine("vllm", student, how, slots=32, teacher=watcher, vllm=settings(servers[family]))
    engine.update_weights(student, 0)
    asked = requests((3, 9, 1, 12, 7, 5, 20, 2))
    tokens = [greedy(student, each) for each in asked]
    seen = set()
    for check_every in (1, 8, 32):
        for truncate in (True, False):
            for min_length in (0, 12):
                config = DriftConfig("overlap", K, 0.5, 0.25, min_length=min_length)
                monitor = DriftMonitor(watcher, config, check_every=check_every, truncate=truncate)
                watch = monitor.begin(eos_token_ids=(EOS,), pad_token_id=0, ragged=True)
                list(engine.generate(asked, watch))
                judged = {"k": K, "threshold": 0.5, "weight_drop": 0.25, "min_length": min_length, "truncate": truncate}
                rows = [
                    oracle_row(student, teacher, torch.tensor(each.prompt_ids), whole, **judged)
                    for each, whole in zip(asked, tokens, strict=True)
                ]
                assert_record_equals(watch.rollouts(), rows, atol=1e-4)
                seen |= {row.stop_reason for row in rows}
    assert seen == {"eos", "length", "drift"}


@pytest.mark.parametrize("how", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20}])
def test_sampled_tokens_repeat_and_their_log_probs_are_those_at_temperature_1(servers, how):
    student, watcher = STUDENTS["Qwen3"](), Teacher(servable_model("Llama", 7), top_k=K)
    sampling = Sampling(CAP, (EOS,), 0, **how)
    engine = make_engine("vllm", student, sampling, slots=32, teacher=watcher, vllm=settings(servers["Qwen3"]))
    engine.update_weights(student, 0)
    monitor = DriftMonitor(watcher, DriftConfig("overlap", K, 0.5, 0.25), check_every=8, truncate=False)
    asked, drawn = requests((3, 9, 1, 12)), []
    for _ in range(2):
        watch = monitor.begin(eos_token_ids=(EOS,), pad_token_id=0, ragged=True)
        list(engine.generate(asked, watch))
        drawn.append(watch.rollouts())
    assert torch.equal(drawn[0].response_ids, drawn[1].response_ids)
    rows = [
        oracle_row(
            student,
            watcher.model,
            torch.tensor(each.prompt_ids),
            drawn[0].response_ids[row, : int(drawn[0].lengths[row])],
            k=K,
            threshold=0.5,
            weight_drop=0.25,
            truncate=False,
        )
        for row, each in enumerate(asked)
    ]
    assert_record_equals(drawn[0], rows, atol=1e-4)


def test_tokens_are_drawn_from_the_students_distribution_also_where_responses_come_in_pieces(servers):
    """Of exact draws E[log p(token) + entropy] is 0 at every position, so that the mean over 6,400 tokens is close to it."""
    student, watcher = STUDENTS["Qwen3"](), Teacher(servable_model("Llama", 7), top_k=K)
    how = Sampling(100, (), 0, temperature=1.0)
    engine = make_engine("vllm", student, how, slots=64, teacher=watcher, vllm=settings(servers["Qwen3"]))
    engine.update_weights(student, 0)
    monitor = DriftMonitor(
        watcher, DriftConfig("overlap", K, 0.5, 1e-6), check_every=16
    )  # may stop rows, and stops none
    watch = monitor.begin(eos_token_ids=(), pad_token_id=0, ragged=True)
    asked = [Request(each.prompt_ids, seed) for seed, each in enumerate(requests([5] * 64))]
    list(engine.generate(asked, watch))
    rollouts, excess = watch.rollouts(), []
    for row, request in enumerate(asked):
        log_probs = full_log_probs(student, torch.tensor(request.prompt_ids), rollouts.response_ids[row])
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        excess.append(log_probs.gather(-1, rollouts.response_ids[row][:, None])[:, 0] + entropy)
    excess = torch.cat(excess)
    assert len(excess) == 6400
    assert abs(float(excess.mean())) < 5 * float(excess.std()) / len(excess) ** 0.5


@pytest.mark.parametrize("check_every", [16, 32])
def test_little_is_generated_past_a_stop(servers, check_every):
    """At most a block and the interval of the stream for each row, as the server counts its tokens."""
    student, watcher = STUDENTS["Llama"](), Teacher(servable_model("Qwen3", 7), top_k=K)
    server = servers["Llama"]
    how = Sampling(400, (), 0, temperature=1.0)
    engine = make_engine("vllm", student, how, slots=32, teacher=watcher, vllm=settings(server))
    engine.update_weights(student, 0)
    monitor = DriftMonitor(watcher, DriftConfig("overlap", K, 0.75, 0.05), check_every=check_every)
    asked = requests([4] * 32)
    list(engine.generate(asked, monitor.begin(eos_token_ids=(), pad_token_id=0, ragged=True)))  # first calls are slow
    time.sleep(1.0)
    before = server.metric("vllm:generation_tokens_total")
    watch = monitor.begin(eos_token_ids=(), pad_token_id=0, ragged=True)
    done = list(engine.generate(asked, watch))
    time.sleep(1.0)
    generated = server.metric("vllm:generation_tokens_total") - before
    kept = sum(len(tokens) for _, tokens, _ in done)
    stopped = sum(reason == "drift" for _, _, reason in done)
    print(
        f"{stopped} rows stopped, {kept} tokens kept, {(generated - kept) / stopped:.1f} past each stop, blocks of {check_every}"
    )
    assert stopped > 24
    assert generated - kept <= stopped * (check_every + check_every), (generated, kept)


def test_requests_wait_in_the_servers_queue_and_its_slots_stay_full(servers):
    """256 responses of log-normal length in 32 slots: running requests while others wait, at almost all times."""
    student, watcher = STUDENTS["Qwen3"](), Teacher(servable_model("Llama", 7), top_k=K)
    server = servers["Qwen3"]
    how = Sampling(400, (), 0, temperature=1.0)
    engine = make_engine("vllm", student, how, slots=32, teacher=watcher, vllm=settings(server))
    engine.update_weights(student, 0)
    lengths = torch.distributions.LogNormal(5.0, 0.7).sample((256,)).clamp(4, 400).long().tolist()
    asked = [
        Request(each.prompt_ids, number, length)
        for number, (each, length) in enumerate(zip(requests([5] * 256), lengths, strict=True))
    ]
    monitor = DriftMonitor(watcher, DriftConfig("overlap", K, 0.5, 0.0), check_every=32)
    watch = monitor.begin(eos_token_ids=(), pad_token_id=0, ragged=True)
    looks, over = [], threading.Event()

    def look():
        while not over.wait(0.05):
            looks.append((server.metric("vllm:num_requests_running"), server.metric("vllm:num_requests_waiting")))

    thread = threading.Thread(target=look)
    thread.start()
    done = list(engine.generate(asked, watch))
    over.set()
    thread.join()
    assert sorted(len(tokens) for _, tokens, _ in done) == sorted(lengths)
    waiting = [running for running, waits in looks if waits > 0]
    assert len(waiting) > 10
    assert sum(running == 0 for running in waiting) < 0.05 * len(waiting)


# ---------------------------------------------------------------------- weights


def trains_through(trainer):
    """Train, and compare what the servers said of every rollout with the weights that the trainer had then."""
    real, differences, model = trainer.generate_rollouts, [], trainer.model

    def compared(*batches):
        rollouts = real(*batches)
        for row in range(len(rollouts)):
            prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
            response = rollouts.response_ids[row][rollouts.response_mask[row]]
            own = full_log_probs(model, prompt, response).float()
            served = rollouts.token_log_probs[row][rollouts.response_mask[row]]
            differences.append(float((own.gather(-1, response[:, None])[:, 0] - served).abs().max()))
        return rollouts

    trainer.generate_rollouts = compared
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    moved = max(float((value - before[name]).abs().max()) for name, value in model.state_dict().items())
    assert moved > 1e-3  # else old weights would pass for new ones
    return differences


def through(server, **changes):
    return {
        "rollout_engine": "vllm",
        "vllm_mode": "server",
        "vllm_server_base_url": server.url,
        "max_steps": 5,
        "learning_rate": 5e-3,
        **changes,
    }


def test_after_every_step_the_server_samples_with_the_trainers_weights(servers, tmp_path):
    trainer = make_trainer(tmp_path, student=embedded_student(), **through(servers["embedded"]))
    differences = trains_through(trainer)
    assert len(differences) == 5 * 8
    assert max(differences) < 1e-4
    measured = trainer.evaluate()
    assert measured["eval_mean_tokens"] > 0


def test_after_every_step_the_server_samples_with_the_trainers_adapter(servers, tmp_path):
    peft = pytest.importorskip("peft")
    base = embedded_student()
    with closing(
        make_engine("vllm", base, Sampling(9, (EOS,), 0), slots=1, vllm=settings(servers["embedded"]))
    ) as engine:
        engine.update_weights(base, 0)  # another test has left its own
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    student = peft.get_peft_model(base, adapter)
    trainer = make_trainer(tmp_path, student=student, **through(servers["embedded"], learning_rate=2e-2))
    differences = trains_through(trainer)
    assert len(differences) == 5 * 8
    assert max(differences) < 1e-4


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_sample_with_one_set_of_weights(servers, tmp_path, kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"-m torch.distributed.run --nproc-per-node 2 --master-port {port} tests/vllm_two_processes.py {kind}"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "examples" / "embedded_task"))),
    }
    result = subprocess.run(
        [sys.executable, *command.split(), servers["embedded"].url, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    assert all(each["rollouts"] == 5 * 8 and each["difference"] < 1e-4 for each in found)
    assert found[0]["moved"] > 1e-3


# ---------------------------------------------------------------------- faults


def test_a_head_that_a_cpu_server_cannot_take_is_found_after_the_first_step(servers):
    """Tied to the embeddings, of which the server keeps a packed copy."""
    student = servable_model("Qwen3", 2, tie_word_embeddings=True)
    server = servers.get("tied", lambda: student)
    engine = make_engine("vllm", student, Sampling(20, (EOS,), 0), slots=4, vllm=settings(server))
    engine.update_weights(student, 0)
    with torch.no_grad():
        student.get_output_embeddings().weight.mul_(0.5)
    with pytest.raises(
        ServingError, match=r"does not sample with the weights that it was sent.*tie_word_embeddings=false"
    ):
        engine.update_weights(student, 1)


def test_a_server_that_is_killed_in_mid_step_and_started_anew_gets_the_weights_and_the_run_goes_on(servers, tmp_path):
    server = servers["embedded"]
    trainer = make_trainer(tmp_path, student=embedded_student(), **through(server, max_steps=3))
    version, restarted = [], threading.Event()
    real = trainer.engine.generate

    def generate(asked, watch):
        if trainer.state.global_step == 1 and not restarted.is_set():
            stream = real(asked, watch)
            first = next(stream)
            server.kill()
            server.start()
            restarted.set()
            yield first
            yield from stream
        else:
            yield from real(asked, watch)
        version.append(trainer.engine.weights.current.version)

    trainer.engine.generate = generate
    differences = trains_through(trainer)
    assert restarted.is_set()
    assert len(differences) == 3 * 8
    assert max(differences) < 1e-4
    assert [each.rsplit("-", 1)[1] for each in version] == ["0", "1", "2"]


def test_what_a_server_was_not_started_for_is_found_at_set_up(servers, monkeypatch):
    student = STUDENTS["Llama"]()
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    server = servers.start("guarded", lambda: student, "--max-logprobs", "3", key="sesame")
    how = {"slots": 4, "teacher": Teacher(servable_model("Qwen3", 7), top_k=K), "vllm": settings(server, timeout=2.0)}
    sampling = Sampling(CAP, (EOS,), 0)
    with pytest.raises(ServingError, match=r"cannot be reached .*, and was waited for 2 s \(vllm_server_timeout\)"):
        make_engine("vllm", student, sampling, **how)
    server.wait_until_ready()
    with pytest.raises(ServingError, match=r"put the one that it was started with into VLLM_API_KEY"):
        make_engine("vllm", student, sampling, **how)
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    with pytest.raises(ServingError, match=r"start it with a larger --max-logprobs"):
        make_engine("vllm", student, sampling, **how)
    with pytest.raises(ConfigError, match=r"sequences of 512 tokens \(--max-model-len\), too few"):
        make_engine("vllm", student, Sampling(512, (EOS,), 0), slots=4, vllm=settings(server))
    plain = make_engine("vllm", student, Sampling(9, (EOS,), 0, temperature=0.0), slots=4, vllm=settings(server))
    [(_, tokens, _)] = plain.generate(requests([4]))
    assert tokens == greedy(student, requests([4])[0], 9).tolist()
    with pytest.raises(ServingError, match="answered 500 to /collective_rpc"):
        plain.update_weights(servable_model("Llama", 1, vocab_size=200), 0)


# ---------------------------------------------------------------------- in this process


@pytest.mark.parametrize("family", sorted(STUDENTS))
def test_the_engine_in_a_process_gives_the_same(family):
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "examples" / "embedded_task"))),
    }
    result = subprocess.run(
        [sys.executable, "tests/vllm_colocated.py", family],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
    assert "12 comparisons" in result.stdout


def test_the_tokenizer_of_the_embedded_task_is_not_needed_by_a_server(servers):
    """Servers run with --skip-tokenizer-init: tokens in, tokens out."""
    student, tokenizer = embedded_student(), load_tokenizer()
    how = Sampling(20, (tokenizer.eos_token_id,), tokenizer.pad_token_id, temperature=0.0)
    engine = make_engine("vllm", student, how, slots=4, vllm=settings(servers["embedded"]))
    engine.update_weights(student, 0)
    prompt = tuple(tokenizer("3 + 4").input_ids)
    [(_, tokens, _)] = engine.generate([Request(prompt)])
    ids = torch.tensor([prompt])
    expected = student.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0
    )
    assert tokens == expected[0, len(prompt) :].tolist()
