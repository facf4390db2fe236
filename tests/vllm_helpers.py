"""An engine over stand-ins for vLLM's servers, and what its rollouts must be."""

import torch
from oracle import assert_record_equals, oracle_row
from tiny_models import tiny_model
from transformers import GenerationConfig

from prune_opd_hf import DriftConfig, Teacher
from prune_opd_hf.generation import DriftMonitor, Request, Sampling, VLLMSettings, make_engine
from prune_opd_hf.serving import servers

EOS, K, CAP = 1, 4, 18
MODELS = {}


def wait_briefly(monkeypatch):
    """Between two attempts."""
    monkeypatch.setattr(servers, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(servers, "FIRST_PAUSE_SECONDS", 0.02)


def model(seed, family="llama", **changes):
    """Without a padding token: heads with a bias are not among what vLLM serves."""
    key = (seed, family, *changes.items())
    return MODELS.setdefault(key, tiny_model(family, seed, pad=None, **changes))


def sampling(cap=CAP, ends=(EOS,), **changes):
    return Sampling(
        **{"max_completion_length": cap, "eos_token_ids": ends, "pad_token_id": 0, "temperature": 0.0, **changes}
    )


def settings(*servers, timeout=5.0, **changes):
    urls = ",".join(server if isinstance(server, str) else server.url for server in servers)
    return VLLMSettings.of(mode="server", server_base_url=urls, server_timeout=timeout, **changes)


def teacher():
    return Teacher(model(2, "qwen3"), top_k=K)


def engine_over(*servers, student=None, how=None, timeout=5.0):
    student = model(1) if student is None else student
    return make_engine(
        "vllm", student, how or sampling(), slots=4, teacher=teacher(), vllm=settings(*servers, timeout=timeout)
    )


def requests(lengths=(3, 5, 2, 7), vocab=48):
    generator = torch.Generator().manual_seed(5)
    return [Request(tuple(torch.randint(3, vocab, (n,), generator=generator).tolist()), seed=n) for n in lengths]


def greedy(student, request, cap=CAP):
    ids = torch.tensor([request.prompt_ids])
    how = GenerationConfig(do_sample=False, max_new_tokens=cap, eos_token_id=EOS, pad_token_id=0)
    return student.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)[0, ids.shape[1] :]


def assert_rolls_out(engine, student, check_every=4, asked=None, **config):
    """Everything that the engine samples of this student is what full passes say."""
    config = {"metric": "overlap", "top_k": K, "threshold": 0.5, "weight_drop": 0.25, "min_length": 6, **config}
    asked = requests() if asked is None else asked
    monitor = DriftMonitor(teacher(), DriftConfig(**config), check_every=check_every)
    watch = monitor.begin(eos_token_ids=(EOS,), pad_token_id=0, ragged=True)
    done = list(engine.generate(asked, watch))
    assert sorted(completion.request for completion in done) == list(range(len(asked)))
    how = {"k": K, "threshold": config["threshold"], "weight_drop": config["weight_drop"], "min_length": 6}
    rows = [
        oracle_row(student, model(2, "qwen3"), torch.tensor(each.prompt_ids), greedy(student, each), **how)
        for each in asked
    ]
    assert_record_equals(watch.rollouts(), rows)
    return watch
