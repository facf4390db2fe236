"""Continuous batching as far as a CPU goes: Transformers' own scheduler on tiny models, and its failures through a stand-in.

Nothing here has run on a GPU: what is shown is what is asked of its manager, and what is made of its answers.
"""

import contextlib
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from evaluation_helpers import logged
from generation_helpers import oracle_of_requests
from oracle import assert_record_equals
from tiny_models import tiny_model
from transformers import ContinuousBatchingConfig, PreTrainedModel

from prune_opd_hf import DriftConfig
from prune_opd_hf.errors import UnsupportedGenerationError
from prune_opd_hf.evaluation import evaluate_model, load_benchmark
from prune_opd_hf.evaluation.sample_log import SampleLog
from prune_opd_hf.generation import DriftMonitor, Request, RolloutEngine, Sampling
from prune_opd_hf.generation.continuous_batching import ContinuousBatchingEngine
from prune_opd_hf.generation.engine import request_seed
from prune_opd_hf.tasks import is_correct, load_student, load_tokenizer
from prune_opd_hf.teachers.adapter import AdapterBaseTeacher

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
    streamed: list = field(default_factory=list)
    cancelled: list = field(default_factory=list)

    def add_request(self, prompt, request_id, max_new_tokens, streaming=False):
        self.asked.append((prompt, request_id, max_new_tokens))
        self.streamed.append(streaming)

    def cancel_request(self, request_id):
        self.cancelled.append(request_id)

    def get_result(self, timeout):
        return self.results.pop(0) if self.results else None

    def is_running(self):
        return self.running

    @contextlib.contextmanager
    def pause(self):
        yield


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
    model = watched(Manager([]))
    for how in (
        sampling(ends=(EOS, 2), temperature=0.6, top_p=0.9, top_k=20),
        sampling(ends=(EOS, 2), temperature=0.0),
        sampling(ends=(EOS, 2)),
    ):
        model.manager.results.append(result(0, [EOS]))
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
        (Manager([result(0, [5, EOS])], running=False), "stopped before all samples were finished"),
    ],
)
def test_a_failure_names_the_other_engine_and_keeps_what_was_done(manager, message):
    model, kept = watched(manager), []
    completions = generate(model, requests([2, 3]))
    with pytest.raises(UnsupportedGenerationError, match=rf"{message}.*the engine 'loop'"):
        kept.extend(completions)
    assert kept == [(0, [5, EOS], "eos")]
    assert model.stopped


def watch_over(student, teacher, check_every=4, **config):
    settings = DriftConfig(**{"metric": "overlap", "top_k": 4, "threshold": 0.5, "weight_drop": 0.25, **config})
    monitor = DriftMonitor(teacher, settings, check_every=check_every, student=student)
    return monitor.begin(eos_token_ids=(EOS,), pad_token_id=0, ragged=True)


def test_tokens_stream_to_the_watch_and_a_row_that_it_ends_is_cancelled():
    student, asked = tiny_model("qwen3", seed=1), requests([3, 4])
    pieces = [result(0, [5], False), result(1, [6], False), None]
    pieces += [result(row, [5 + row] * count, False) for count in range(2, 30) for row in (0, 1)]
    model = watched(Manager(pieces))
    watch = watch_over(student, tiny_model("llama", seed=2), threshold=1.0)
    done = list(ContinuousBatchingEngine(model, sampling(cap=40)).generate(asked, watch))
    assert isinstance(ContinuousBatchingEngine(model, sampling()), RolloutEngine)
    assert model.manager.streamed == [True, True]
    assert sorted(model.manager.cancelled) == ["0", "1"]
    assert {reason for _, _, reason in done} == {"drift"}
    rollouts = watch.rollouts()
    assert sorted(done) == [
        (row, rollouts.response_ids[row, : int(rollouts.lengths[row])].tolist(), "drift") for row in (0, 1)
    ]


def test_a_student_whose_attention_is_switched_meanwhile_cannot_be_watched():
    model = watched(Manager([]))
    model.set_attn_implementation("eager")
    watch = watch_over(tiny_model("qwen3", seed=1), tiny_model("llama", seed=2))
    with pytest.raises(UnsupportedGenerationError, match="load the student with attn_implementation='sdpa'"):
        list(ContinuousBatchingEngine(model, sampling()).generate(requests([2]), watch))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("check_every", [1, 8, 32])
@pytest.mark.parametrize("truncate", [True, False])
def test_the_record_is_that_of_full_passes(family, check_every, truncate, monkeypatch):
    small = partial(ContinuousBatchingConfig, num_blocks=8, max_batch_tokens=64)  # not all of this machine's memory
    monkeypatch.setattr("prune_opd_hf.generation.continuous_batching.ContinuousBatchingConfig", small)
    student, teacher = tiny_model(family, seed=1), tiny_model("llama", seed=2)
    asked = requests([3, 9, 5, 1, 12, 7])
    monitor = DriftMonitor(
        teacher,
        DriftConfig("overlap", 4, 0.5, 0.25, min_length=6),
        check_every=check_every,
        truncate=truncate,
        student=student,
    )
    watch = monitor.begin(eos_token_ids=(EOS,), pad_token_id=0, ragged=True)
    done = list(ContinuousBatchingEngine(student, sampling(30, temperature=0.0)).generate(asked, watch))
    assert len(done) == len(asked)
    responses = [plain_greedy(student, request, 30)[0] for request in asked]
    rows = oracle_of_requests(student, teacher, asked, responses, min_length=6, truncate=truncate, eos=(EOS,))
    assert_record_equals(watch.rollouts(), rows)
    assert ("drift" in {row.stop_reason for row in rows}) == truncate


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_student_that_teaches_itself_without_its_adapter_is_watched(monkeypatch):
    """Its config and its adapter are the model's own: nothing may be decoded while it scores."""
    peft = pytest.importorskip("peft")
    small = partial(ContinuousBatchingConfig, num_blocks=8, max_batch_tokens=64)
    monkeypatch.setattr("prune_opd_hf.generation.continuous_batching.ContinuousBatchingConfig", small)
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    student = peft.get_peft_model(tiny_model("llama", seed=1), adapter).eval()
    asked = requests([3, 9, 5, 7])
    expected = [plain_greedy(student, request, 20)[0] for request in asked]
    plain = tiny_model("llama", seed=1)
    monitor = DriftMonitor(
        AdapterBaseTeacher(student, top_k=4), DriftConfig("overlap", 4, 0.5, 0.25), check_every=3, student=student
    )
    watch = monitor.begin(eos_token_ids=(EOS,), pad_token_id=0, ragged=True)
    list(ContinuousBatchingEngine(student, sampling(20, temperature=0.0)).generate(asked, watch))
    assert_record_equals(watch.rollouts(), oracle_of_requests(student, plain, asked, expected))
    assert not hasattr(student.config, "is_causal")


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
