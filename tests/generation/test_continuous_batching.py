"""Continuous batching as far as a CPU goes: Transformers' own scheduler on tiny models, and its failures through a stand-in.

Nothing here has run on a GPU: what is shown is what is asked of `generate_batch`, and what is made of its answers.
"""

import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from evaluation_helpers import logged
from tiny_models import tiny_model
from transformers import PreTrainedModel

from prune_opd_hf.errors import UnsupportedGenerationError
from prune_opd_hf.evaluation import evaluate_model, load_benchmark
from prune_opd_hf.evaluation.sample_log import SampleLog
from prune_opd_hf.generation import DriftMonitor, Request, RolloutEngine, Sampling
from prune_opd_hf.generation.continuous_batching import ContinuousBatchingEngine
from prune_opd_hf.generation.engine import request_seed
from prune_opd_hf.tasks import is_correct, load_student, load_tokenizer

EOS = 1


def sampling(cap=6, ends=(EOS,), **changes) -> Sampling:
    return Sampling(max_completion_length=cap, eos_token_ids=ends, pad_token_id=EOS, **changes)


def generate(model, requests, how=None):
    return ContinuousBatchingEngine(model, sampling() if how is None else how).generate(requests)


def requests(lengths: list[int], seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    prompts = [tuple(torch.randint(3, 48, (length,), generator=generator).tolist()) for length in lengths]
    return [Request(prompt, request_seed(seed, number)) for number, prompt in enumerate(prompts)]


def plain_greedy(model, request: Request, max_new_tokens: int) -> tuple[list[int], str]:
    prompt = torch.tensor([request.prompt_ids])
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=EOS
    )
    tokens = output[0, prompt.shape[1] :].tolist()
    return tokens, "eos" if tokens[-1] == EOS else "length"


@dataclass
class Manager:
    """Stands for Transformers' manager: hands out what it was given and notes what it was asked."""

    results: list
    running: bool = True
    asked: list = field(default_factory=list)

    def add_request(self, prompt, request_id, max_new_tokens):
        self.asked.append((prompt, request_id, max_new_tokens))

    def get_result(self, timeout):
        return self.results.pop(0) if self.results else None

    def is_running(self):
        return self.running


def watched(manager: Manager) -> PreTrainedModel:
    """A model whose batching is the stand-in's; it notes how that was configured, and whether it was stopped."""
    model = tiny_model("llama", seed=0)
    model.manager, model.stopped = manager, False

    @contextlib.contextmanager
    def batching(**configuration):
        model.configuration = configuration
        try:
            yield manager
        finally:
            model.stopped = True

    model.continuous_batching_context_manager = batching
    return model


def result(request: int, tokens: list[int], finished: bool = True, error: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(request_id=str(request), generated_tokens=tokens, is_finished=lambda: finished, error=error)


def test_every_sample_is_yielded_when_it_ends_in_whatever_order():
    done = [result(1, [7], finished=False), result(1, [7, EOS]), None, result(0, [3, 4, 5, 6, 7, 8])]
    model = watched(Manager(done))
    asked = requests([2, 3])
    completions = list(generate(model, asked))
    assert completions == [(1, [7, EOS], "eos"), (0, [3, 4, 5, 6, 7, 8], "length")]
    assert model.manager.asked == [(list(asked[0].prompt_ids), "0", 6), (list(asked[1].prompt_ids), "1", 6)]
    assert model.stopped


def test_what_is_asked_of_transformers_is_what_the_settings_say():
    model = watched(Manager([result(0, [EOS])] * 3))
    for how in (
        sampling(ends=(EOS, 2), temperature=0.6, top_p=0.9, top_k=20),
        sampling(ends=(EOS, 2), temperature=0.0),
        sampling(ends=(EOS, 2)),
    ):
        assert len(list(generate(model, requests([2]), how))) == 1
        config = model.configuration["generation_config"]
        assert (config.do_sample, config.max_new_tokens) == (how.temperature > 0, 6)
        if config.do_sample:
            assert (config.temperature, config.top_p, config.top_k) == (how.temperature, how.top_p, how.top_k)
        assert config.eos_token_id == [EOS, 2]
        assert model.configuration["continuous_batching_config"].drop_unsupported_processors is False


def test_seeds_of_the_batch_follow_the_run_and_what_is_left_of_it():
    seeds = []
    for asked in (requests([2, 3]), requests([2, 3]), requests([2, 3], seed=1), requests([2, 3])[1:]):
        model = watched(Manager([result(place, [EOS]) for place in range(len(asked))]))
        list(generate(model, asked))
        seeds.append(model.configuration["continuous_batching_config"].seed)
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3


@pytest.mark.parametrize(
    ("manager", "message"),
    [
        (Manager([result(0, [5, EOS]), result(1, [], error="out of memory")]), r"failed on a sample \(out of memory\)"),
        (Manager([result(0, [5, EOS])], running=False), "stopped with 1 samples to go"),
    ],
)
def test_a_failure_names_the_other_engine_and_keeps_what_was_done(manager, message):
    model, kept = watched(manager), []
    completions = generate(model, requests([2, 3]))
    with pytest.raises(UnsupportedGenerationError, match=rf"{message}.*the engine 'loop'"):
        kept.extend(completions)
    assert kept == [(0, [5, EOS], "eos")]
    assert model.stopped


def test_a_watch_is_refused_since_no_candidates_are_delivered():
    model = watched(Manager([]))
    assert isinstance(ContinuousBatchingEngine(model, sampling()), RolloutEngine)
    watch = DriftMonitor(tiny_model("llama", seed=1)).begin(eos_token_ids=(EOS,), pad_token_id=0)
    with pytest.raises(UnsupportedGenerationError, match=r"delivers no candidates .*: use the engine .loop."):
        list(ContinuousBatchingEngine(model, sampling()).generate(requests([2]), watch))


def test_no_request_starts_nothing():
    assert list(generate(watched(Manager([])), [])) == []


@pytest.mark.slow
def test_greedy_tokens_are_those_of_generate():
    model = tiny_model("llama", seed=4)
    with torch.no_grad():
        model.get_output_embeddings().bias[EOS] = 1.5  # some of these prompts now end by themselves, some do not
    asked = requests([3, 9, 5, 1, 12, 7])
    done = sorted(generate(model, asked, sampling(8, temperature=0.0)))
    expected = [plain_greedy(model, request, 8) for request in asked]
    assert [(completion.token_ids, completion.stop_reason) for completion in done] == expected
    assert {reason for _, reason in expected} == {"eos", "length"}


@pytest.mark.slow
def test_a_cut_off_run_keeps_its_samples_and_draws_the_rest(tmp_path, monkeypatch):
    common = {
        "model": load_student(),
        "processing_class": load_tokenizer(),
        "benchmarks": ["chain"],
        "num_generations": 2,
        "limit": 3,
        "max_completion_length": 40,
        "engine": "continuous_batching",
        "output_dir": tmp_path,
        "progress": False,
    }
    append, written = SampleLog.append, []

    def die_at_fourth(self, sample):
        written.append(sample)
        if len(written) == 4:
            raise KeyboardInterrupt
        append(self, sample)

    monkeypatch.setattr(SampleLog, "append", die_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(**common)
    monkeypatch.setattr(SampleLog, "append", append)
    before = logged(tmp_path)
    report, samples = evaluate_model(**common), logged(tmp_path)
    assert (len(before), samples[:3], len(samples)) == (3, before, 6)
    assert {(sample["problem"], sample["sample"]) for sample in samples} == {(p, s) for p in range(3) for s in range(2)}
    answers = load_benchmark("chain").answers
    rights = [is_correct(sample["response"], answers[sample["problem"]]) for sample in samples]
    assert report["chain"].metrics["avg@2"].value == pytest.approx(sum(rights) / 6)
    assert report.engine == "continuous_batching"
