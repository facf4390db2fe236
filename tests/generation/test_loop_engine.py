"""The loop engine: requests in a number of slots, with and without a drift watch, against full passes and slow loops."""

from itertools import accumulate

import jaxtyping
import pytest
import torch
from generation_helpers import CONFIG, oracle_of_requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_record_equals
from tiny_models import tiny_model
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from prune_opd_hf import DriftConfig, Rollouts
from prune_opd_hf.algorithm.drift import METRICS
from prune_opd_hf.errors import ConfigError, InputError, UnsupportedGenerationError
from prune_opd_hf.generation import (
    DriftMonitor,
    LoopEngine,
    Request,
    RolloutEngine,
    Sampling,
    decoding_loop,
)
from prune_opd_hf.generation.draw import STREAM_STEPS
from prune_opd_hf.models.kv_cache import can_join

VOCAB, EOS = 48, 1
MODELS: dict = {}


def models(family="qwen3", **arguments):
    key = (family, *sorted(arguments.items()))
    if key not in MODELS:
        MODELS[key] = tiny_model(family, 1, **arguments), tiny_model(family, 2, **arguments)
    return MODELS[key]


def requests_of(lengths, caps=None, seed=3):
    generator = torch.Generator().manual_seed(seed)
    prompts = [tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist()) for length in lengths]
    caps = [None] * len(lengths) if caps is None else caps
    return [Request(prompt, number + 7, cap) for number, (prompt, cap) in enumerate(zip(prompts, caps, strict=True))]


def sampling(cap, **changes):
    return Sampling(
        **{"max_completion_length": cap, "eos_token_ids": (EOS,), "pad_token_id": 0, "temperature": 0.0, **changes}
    )


@torch.no_grad()
def slow_response(model, request, how):
    """One token after another by full passes; the request's own stream of random numbers decides."""
    generator = torch.Generator().manual_seed(request.seed)
    numbers: list[float] = []
    ids, tokens = torch.tensor([request.prompt_ids]), []
    warpers = [TemperatureLogitsWarper(how.temperature)] if how.temperature not in (0.0, 1.0) else []
    warpers += [TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
    cap = (
        how.max_completion_length
        if request.max_completion_length is None
        else min(how.max_completion_length, request.max_completion_length)
    )
    while len(tokens) < cap:
        scores = model(ids).logits[:, -1].float()
        if how.temperature == 0:
            token = int(scores.argmax())
        else:
            if not numbers:
                numbers = torch.rand(STREAM_STEPS, generator=generator, dtype=torch.float64).tolist()
            for warper in warpers:
                scores = warper(ids, scores)
            cumulative = list(accumulate(scores.softmax(dim=-1)[0].double().tolist()))
            target = numbers.pop(0) * cumulative[-1]
            token = next(token for token, value in enumerate(cumulative) if value > target)
        tokens.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        if token in how.eos_token_ids:
            return tokens, "eos"
    return tokens, "length"


def answered(engine, requests, watch=None):
    done = list(engine.generate(requests, watch))
    assert sorted(completion.request for completion in done) == list(range(len(requests)))
    return [(completion.token_ids, completion.stop_reason) for completion in sorted(done)]


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gemma2", "lfm2"])
@pytest.mark.parametrize("slots", [1, 3, 20])
def test_greedy_responses_are_those_of_full_passes_for_any_number_of_slots(family, slots):
    model, _ = models(family)
    requests = requests_of([4, 1, 7, 3, 5, 2, 6], caps=[None, 5, 1, None, 9, None, 2])
    how = sampling(14)
    assert answered(LoopEngine(model, how, slots=slots), requests) == [
        slow_response(model, request, how) for request in requests
    ]


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=7),
    slots=st.integers(1, 4),
    temperature=st.sampled_from([0.7, 1.0]),
    top_p=st.sampled_from([0.8, 1.0]),
    compact_every=st.sampled_from([1, 3]),
    data=st.data(),
)
def test_what_a_request_samples_depends_on_its_prompt_and_seed_alone(
    lengths, slots, temperature, top_p, compact_every, data
):
    model, _ = models()
    requests = requests_of(lengths)
    how = sampling(12, temperature=temperature, top_p=top_p)
    order = data.draw(st.permutations(range(len(requests))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding_loop, "steps_between_compactions", lambda device: compact_every)
        received = answered(LoopEngine(model, how, slots=slots), [requests[place] for place in order])
    for place, response in zip(order, received, strict=True):
        assert response == slow_response(model, requests[place], how)


def test_numbers_beyond_one_block_of_the_stream_go_on_where_it_ended():
    model, _ = models(eos=None)
    requests, how = requests_of([3, 5, 2]), sampling(STREAM_STEPS + 9, temperature=1.0, eos_token_ids=())
    expected = [slow_response(model, request, how) for request in requests]
    assert answered(LoopEngine(model, how, slots=2), requests) == expected


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=7),
    slots=st.integers(1, 4),
    check_every=st.sampled_from([1, 3, 8, 40]),
    metric=st.sampled_from(sorted(METRICS)),
    min_length=st.sampled_from([0, 6]),
    truncate=st.booleans(),
    compact_every=st.sampled_from([1, 3]),
    data=st.data(),
)
def test_the_record_of_a_refilled_batch_is_that_of_full_passes(
    lengths, slots, check_every, metric, min_length, truncate, compact_every, data
):
    student, teacher = models()
    caps = [data.draw(st.sampled_from([None, 1, 4, 11])) for _ in lengths]
    requests, how = requests_of(lengths, caps), sampling(17)
    config = DriftConfig(metric, 4, 0.5, 0.25, min_length=min_length)
    monitor = DriftMonitor(teacher, config, check_every=check_every, truncate=truncate)
    watch = monitor.begin(eos_token_ids=how.eos_token_ids, pad_token_id=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding_loop, "steps_between_compactions", lambda device: compact_every)
        received = answered(LoopEngine(student, how, slots=slots), requests, watch)
    rollouts = watch.rollouts()
    responses = [slow_response(student, request, how)[0] for request in requests]
    judged = {"metric": metric, "min_length": min_length, "truncate": truncate, "eos": (EOS,)}
    rows = oracle_of_requests(student, teacher, requests, responses, **judged)
    assert_record_equals(rollouts, rows)
    for index, (request, (tokens, reason)) in enumerate(zip(requests, received, strict=True)):
        kept = rollouts.response_mask[index]
        assert rollouts.response_ids[index][kept].tolist() == tokens
        assert rollouts.prompt_ids[index][rollouts.prompt_mask[index]].tolist() == list(request.prompt_ids)
        assert rollouts.stop_reason[index] == reason == rows[index].stop_reason


@pytest.mark.parametrize("family", ["gemma2", "lfm2"])
def test_where_rows_cannot_join_batches_follow_one_another_and_the_record_is_that_of_full_passes(family):
    student, teacher = models(family)
    requests, how = requests_of([4, 6, 2, 5, 3]), sampling(15)
    monitor = DriftMonitor(teacher, CONFIG, check_every=4)
    watch = monitor.begin(eos_token_ids=how.eos_token_ids, pad_token_id=0)
    answered(LoopEngine(student, how, slots=2), requests, watch)
    responses = [slow_response(student, request, how)[0] for request in requests]
    assert_record_equals(watch.rollouts(), oracle_of_requests(student, teacher, requests, responses))


@pytest.mark.parametrize("watched", [False, True])
def test_a_model_whose_batch_cannot_be_compacted_answers_batch_by_batch(watched, caplog):
    student, teacher = tiny_model("qwen3", 1), models()[1]
    student.generation_config.use_cache = False
    requests, how = requests_of([4, 6, 2, 5, 3], caps=[None, 3, None, 1, None]), sampling(15)
    watch = None
    if watched:
        watch = DriftMonitor(teacher, CONFIG, check_every=4).begin(eos_token_ids=(EOS,), pad_token_id=0)
    received = answered(LoopEngine(student, how, slots=2), requests, watch)
    expected = [slow_response(student, request, how) for request in requests]
    if watch is None:
        assert received == expected
        return
    rows = oracle_of_requests(student, teacher, requests, [tokens for tokens, _ in expected])
    assert_record_equals(watch.rollouts(), rows)
    assert [(len(tokens), reason) for tokens, reason in received] == [(row.length, row.stop_reason) for row in rows]


class SecondRowTakesSeven(LogitsProcessor):
    """Knows rows by their number in the batch of prompts, as prefix constraints do."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[1:2] = -float("inf")
        scores[1:2, 7] = 0.0
        return scores


class EndsAtTwelveColumns(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 12)


def test_a_processor_that_knows_rows_by_their_number_sees_whole_batches():
    model, _ = models(eos=None)
    how = sampling(6, eos_token_ids=(), generation_kwargs={"logits_processor": [SecondRowTakesSeven()]})
    received = answered(LoopEngine(model, how, slots=2), requests_of([3, 4, 5, 2]))
    assert [tokens == [7] * 6 for tokens, _ in received] == [False, True, False, True]


def test_a_row_that_another_criterion_ends_is_no_natural_end():
    student, teacher = models(eos=None)
    requests = requests_of([4, 4, 4])
    how = sampling(20, eos_token_ids=(), generation_kwargs={"stopping_criteria": [EndsAtTwelveColumns()]})
    watch = DriftMonitor(teacher, DriftConfig("overlap", top_k=4, weight_drop=0.0), check_every=5).begin(
        eos_token_ids=(), pad_token_id=0
    )
    received = answered(LoopEngine(student, how, slots=2), requests, watch)
    assert [(len(tokens), reason) for tokens, reason in received] == [(8, "criterion")] * 3
    rollouts = watch.rollouts()
    assert rollouts.stop_reason == ("criterion",) * 3
    assert not rollouts.ended_naturally.any()


def test_one_monitor_serves_many_generations_and_each_has_a_record_of_its_own():
    student, teacher = models()
    monitor = DriftMonitor(teacher, CONFIG, check_every=4)
    records = []
    for seed in (3, 4, 3):
        watch = monitor.begin(eos_token_ids=(EOS,), pad_token_id=0)
        list(LoopEngine(student, sampling(12), slots=2).generate(requests_of([4, 2, 5], seed=seed), watch))
        records.append(watch.rollouts())
    assert torch.equal(records[0].response_ids, records[2].response_ids)
    assert not torch.equal(records[0].prompt_ids, records[1].prompt_ids)
    assert all(isinstance(record, Rollouts) for record in records)


def test_the_record_says_who_sampled_with_which_weights():
    student, teacher = models()
    engine, monitor = LoopEngine(student, sampling(8)), DriftMonitor(teacher, CONFIG, check_every=4)
    for step in (0, 7):
        engine.update_weights(student, step)
        watch = monitor.begin(eos_token_ids=(EOS,), pad_token_id=0)
        list(engine.generate(requests_of([4]), watch))
        assert (watch.rollouts().engine, watch.rollouts().weights) == ("loop", f"step {step}")


def test_new_weights_are_sampled_from():
    first, second = models()
    engine, requests, how = LoopEngine(first, sampling(8)), requests_of([4, 5]), sampling(8)
    before = answered(engine, requests)
    engine.update_weights(second, step=1)
    after = answered(engine, requests)
    assert before == [slow_response(first, request, how) for request in requests]
    assert after == [slow_response(second, request, how) for request in requests]


def test_what_cannot_be_worked_with_is_refused_before_anything_is_sampled(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checker
    model, _ = models()
    assert isinstance(LoopEngine(model, sampling(4)), RolloutEngine)
    with pytest.raises(ConfigError, match="at least 1 slot, got 0"):
        LoopEngine(model, sampling(4), slots=0)
    with pytest.raises(ConfigError, match="max_completion_length must be at least 1"):
        sampling(0)
    for name, value in (("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_k", -1)):
        with pytest.raises(ConfigError, match=rf"^{name} must .*, got {value}"):
            sampling(4, **{name: value})
    assert Request([5, 6]) == Request(torch.tensor([5, 6])) == Request((5, 6))
    for ids in ("56", [5.0], [[5]], 5):
        with pytest.raises(InputError, match="prompt_ids must be a sequence of token ids"):
            Request(ids)
    with pytest.raises(InputError, match="at least one token; got an empty one"):
        list(LoopEngine(model, sampling(4)).generate([Request((5,)), Request(())]))
    for token in (VOCAB, -1):
        with pytest.raises(InputError, match=f"token {token}, and the student has embeddings of {VOCAB} tokens"):
            list(LoopEngine(model, sampling(4)).generate([Request((5,)), Request((6, token))]))
    beams = sampling(4, generation_kwargs={"num_beams": 2})
    with pytest.raises(UnsupportedGenerationError, match="beam"):
        list(LoopEngine(model, beams).generate(requests_of([3])))
    assert list(LoopEngine(model, sampling(4)).generate([])) == []


def test_the_training_mode_of_the_model_is_given_back():
    model = tiny_model("qwen3", 1)
    model.train()
    list(LoopEngine(model, sampling(4)).generate(requests_of([3])))
    assert model.training


def test_the_families_of_these_tests_differ_in_whether_rows_may_join():
    def joins(family):
        from transformers import DynamicCache

        return can_join(DynamicCache(config=models(family)[0].config))

    assert [joins(family) for family in ("qwen3", "llama", "gemma2", "lfm2")] == [True, True, False, False]


def test_slots_are_refilled_so_that_few_steps_are_needed():
    """64 prompts of mixed lengths, responses of random length: padded batches wait for their longest row."""
    model = tiny_model("qwen3", seed=0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.05)
        model.get_output_embeddings().bias[EOS] = 0.3  # ends with a chance of about 1/40 at each token
    steps = []
    model.register_forward_hook(lambda module, inputs, output: steps.append(output.logits.shape[0]))
    requests = requests_of([3 + 5 * (number % 8) for number in range(64)])
    done = answered(LoopEngine(model, sampling(200, temperature=1.0), slots=16), requests)
    lengths = [len(tokens) for tokens, _ in done]
    padded_steps = sum(max(lengths[first : first + 16]) for first in range(0, 64, 16))
    assert len(steps) < padded_steps / 1.5
    assert sum(lengths) / len(steps) > 0.6 * 16  # rows at work in an average step, the emptying end included


def test_a_prompt_is_read_once_for_all_its_requests():
    model = tiny_model("qwen3", 1)
    read = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    prompt = requests_of([6])[0].prompt_ids
    requests = [Request(prompt, seed) for seed in range(4)]
    how = sampling(5, temperature=1.0)
    received = answered(LoopEngine(model, how, slots=4), requests)
    assert [shape for shape in read if shape[1] > 1] == [(1, 6)]
    model._forward_pre_hooks.clear()
    assert received == [slow_response(model, request, how) for request in requests]
