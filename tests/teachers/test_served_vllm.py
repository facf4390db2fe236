"""A served teacher on real vLLM servers: `make test-vllm`. Against the same model in this process, on the same rollouts.

What a stand-in shows is not repeated here.
"""

import time

import pytest
import torch
from oracle import assert_record_equals, oracle_row
from servable import with_heads_of
from trainer_helpers import make_trainer
from vllm_servers import VLLMServer, servable_model

from prune_opd_hf import DriftConfig, Teacher
from prune_opd_hf.generation import DriftMonitor, Request, Sampling, VLLMSettings, make_engine
from prune_opd_hf.tasks import load_teacher
from prune_opd_hf.teachers.served import ServedTeacher

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore::FutureWarning")]

EOS, K, CAP = 1, 4, 60


def student():
    return servable_model("Qwen3", 2)


def teacher():
    return servable_model("Llama", 7)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder, running = tmp_path_factory.mktemp("vllm"), {}
    models = {"student": student(), "teacher": teacher(), "embedded": with_heads_of(load_teacher(), 96)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        running[name] = VLLMServer(folder / name, "--max-num-seqs", "32")
    try:
        for server in running.values():
            server.wait_until_ready()
        yield running
    finally:
        for server in running.values():
            server.stop()


def requests(lengths=(3, 9, 1, 12, 7, 5, 20, 2), seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [Request(tuple(torch.randint(3, 96, (n,), generator=generator).tolist()), seed=n) for n in lengths]


def test_scores_are_those_of_the_model_in_this_process(servers):
    remote, local = ServedTeacher(servers["teacher"].url, top_k=K), Teacher(teacher(), top_k=K)
    assert not remote.capabilities.scores_candidates  # this server's runner is the one for CPUs
    generator = torch.Generator().manual_seed(1)
    ids, responses = (torch.randint(3, 96, (6, time), generator=generator) for time in (9, 200))
    found = []
    for each in (remote, local):
        each.start(ids)
        found.append([each.score(responses[:, :70]), each.score(responses[:, 70:])])
    for given, ours in zip(*found, strict=True):
        assert torch.equal(given.topk_ids, ours.topk_ids)
        torch.testing.assert_close(given.topk_log_probs, ours.topk_log_probs, atol=1e-4, rtol=0)
        torch.testing.assert_close(given.token_log_probs, ours.token_log_probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("engine", ["loop", "vllm"])
@pytest.mark.parametrize("truncate", [True, False])
def test_drift_events_and_stops_are_those_of_full_passes(servers, engine, truncate):
    remote, sampler = ServedTeacher(servers["teacher"].url, top_k=K), student()
    how = Sampling(CAP, (EOS,), 0, temperature=0.0)
    url = VLLMSettings.of(mode="server", server_base_url=servers["student"].url)
    rollouts_of = make_engine(engine, sampler, how, slots=32, teacher=remote, vllm=url)
    rollouts_of.update_weights(sampler, 0)
    config = DriftConfig("overlap", K, 0.5, 0.25)
    monitor = DriftMonitor(remote, config, check_every=4, truncate=truncate, eos_token_id=EOS, pad_token_id=0)
    watch = monitor.begin(eos_token_ids=(EOS,), pad_token_id=0, ragged=rollouts_of.ragged)
    list(rollouts_of.generate(requests(), watch))
    rollouts, rows = watch.rollouts(), []
    judged = {"k": K, "threshold": 0.5, "weight_drop": 0.25, "truncate": truncate}
    for request in requests():
        ids = torch.tensor([request.prompt_ids])
        arguments = {"do_sample": False, "max_new_tokens": CAP, "eos_token_id": EOS, "pad_token_id": 0}
        tokens = sampler.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, ids.shape[1] :]
        rows.append(oracle_row(sampler, teacher(), ids[0], tokens, **judged))
    assert_record_equals(rollouts, rows, atol=1e-4, watched=False)
    assert ("drift" in rollouts.stop_reason) is truncate


@pytest.mark.parametrize("engine", ["loop", "vllm"])
def test_no_more_than_2_2_times_the_sequences_is_computed(servers, engine):
    """As the server counts them."""
    remote, sampler, server = ServedTeacher(servers["teacher"].url, top_k=K), student(), servers["teacher"]
    url = VLLMSettings.of(mode="server", server_base_url=servers["student"].url)
    sampling = Sampling(400, (EOS,), 0, temperature=1.0)
    rollouts_of = make_engine(engine, sampler, sampling, slots=32, teacher=remote, vllm=url)
    rollouts_of.update_weights(sampler, 0)
    config = DriftConfig("overlap", K, 0.5, 0.05)
    monitor = DriftMonitor(remote, config, check_every=16, eos_token_id=EOS, pad_token_id=0)
    asked = requests([5] * 32)
    watch = monitor.begin(eos_token_ids=(EOS,), pad_token_id=0, ragged=rollouts_of.ragged)
    time.sleep(1.0)
    before = server.metric("vllm:prompt_tokens_total")
    done = list(rollouts_of.generate(asked, watch))
    time.sleep(1.0)
    computed = server.metric("vllm:prompt_tokens_total") - before
    sequences = 5 * 32 + sum(len(tokens) for _, tokens, _ in done) + watch.progress.discarded_tokens
    print(f"{engine}: {computed:.0f} tokens computed of {sequences}: {computed / sequences:.2f} times")
    assert computed <= 2.2 * sequences


def test_a_run_with_a_served_teacher_is_the_run_with_the_local_one(servers, tmp_path):
    metrics = []
    for name, teaches in (
        ("local", with_heads_of(load_teacher(), 96)),
        ("served", ServedTeacher(servers["embedded"].url, top_k=2)),
    ):
        (tmp_path / name).mkdir()
        how = {"loss_type": "topk_kl", "loss_support": "teacher", "loss_top_k": 2, "topk_kl_tail": "bucket"}
        trainer = make_trainer(tmp_path / name, teacher=teaches, **how)
        trainer.train()
        metrics.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert metrics[1][0] == pytest.approx(metrics[0][0], abs=1e-4)
    assert metrics[1] == pytest.approx(
        metrics[0], abs=1e-3
    )  # AdamW enlarges what the first step's gradients round otherwise


def test_a_server_that_is_killed_and_started_anew_goes_on(servers):
    server = servers["embedded"]
    remote = ServedTeacher(server.url, top_k=2)
    ids, responses = torch.full((2, 3), 5), torch.full((2, 40), 6)
    remote.start(ids)
    before = remote.score(responses)
    server.kill()
    server.start()
    remote.start(ids)
    after = remote.score(responses)  # waits for it
    torch.testing.assert_close(before.token_log_probs, after.token_log_probs)
