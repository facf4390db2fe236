"""The compiled decoding step: what the loop samples with it is what full passes give, however rows join and leave its cache."""

import copy
import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch._inductor.config
from generation_helpers import CONFIG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_record_equals, oracle_row
from peft import LoraConfig, get_peft_model
from test_loop_engine import answered, models, requests_of, sampling, slow_response
from tiny_models import tiny_model
from trainer_helpers import make_trainer

from prune_opd_hf.errors import ConfigError, InputError, UnsupportedGenerationError
from prune_opd_hf.generation import DriftMonitor, LoopEngine, decoding_loop
from prune_opd_hf.generation.compiled_step import StepCompiler
from prune_opd_hf.generation.sampling_copy import SamplingCopy
from prune_opd_hf.tasks import load_student


@pytest.fixture
def uncompiled():
    """The step's own code as it stands, without a compiler: all of it but the compiler's work is tested so."""
    with torch.compiler.set_stance("force_eager"):
        yield


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(["qwen3", "llama", "gpt2"]),
    calls=st.lists(
        st.lists(st.tuples(st.integers(1, 40), st.sampled_from([1, 4, 14])), min_size=1, max_size=7), max_size=3
    ),
    slots=st.integers(1, 5),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    compact_every=st.sampled_from([1, 3]),
)
def test_every_generation_with_a_kept_step_samples_what_full_passes_do(
    uncompiled, family, calls, slots, temperature, compact_every
):
    model, _ = models(family)
    how = sampling(14, temperature=temperature)
    engine = LoopEngine(model, how, slots=slots, compiler=StepCompiler())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding_loop, "steps_between_compactions", lambda device: compact_every)
        for number, rows in enumerate(calls):
            requests = requests_of([prompt for prompt, _ in rows], [cap for _, cap in rows], seed=number)
            assert answered(engine, requests) == [slow_response(model, request, how) for request in requests]


def test_equal_prompts_share_their_pass_and_not_their_slots(uncompiled):
    model, _ = models()
    requests = [request for request in requests_of([5, 9]) for _ in range(3)]
    requests = [replace(request, seed=number) for number, request in enumerate(requests)]
    how = sampling(12, temperature=1.0)
    engine = LoopEngine(model, how, slots=4, compiler=StepCompiler())
    assert answered(engine, requests) == [slow_response(model, request, how) for request in requests]


@pytest.mark.parametrize("slots", [2, 6])
def test_the_record_of_drift_is_that_of_full_passes(uncompiled, slots):
    student, teacher = models()
    requests, how = requests_of([4, 6, 2, 5, 3]), sampling(17)
    watch = DriftMonitor(teacher, CONFIG, check_every=4).begin(eos_token_ids=how.eos_token_ids, pad_token_id=0)
    received = answered(LoopEngine(student, how, slots=slots, compiler=StepCompiler()), requests, watch)
    judged = {"k": 4, "threshold": 0.5, "weight_drop": 0.25, "truncate": True, "eos": how.eos_token_ids}
    rows = []
    for request in requests:
        tokens, _ = slow_response(student, request, how)
        rows.append(oracle_row(student, teacher, torch.tensor(request.prompt_ids), torch.tensor(tokens), **judged))
    assert_record_equals(watch.rollouts(), rows)
    assert any(reason == "drift" for _, reason in received)


def test_what_a_failed_generation_left_in_the_cache_is_not_seen_by_the_next(uncompiled):
    model = tiny_model("qwen3", 1)
    how = sampling(8)
    engine, requests = LoopEngine(model, how, slots=2, compiler=StepCompiler()), requests_of([30, 20])
    expected = [slow_response(model, request, how) for request in requests[1:]]
    list(engine.generate(requests))
    with torch.inference_mode():
        for buffer in engine.compiler.of(model).fixed.buffers():
            buffer.fill_(float("nan"))
    assert answered(engine, requests[1:]) == expected


def test_a_second_generation_with_the_same_step_waits_for_the_first(uncompiled):
    model, _ = models()
    engine = LoopEngine(model, sampling(8), slots=2, compiler=StepCompiler())
    other = engine.with_sampling(sampling(4), slots=3)
    under_way = engine.generate(requests_of([3, 4, 5]))
    next(under_way)
    with pytest.raises(UnsupportedGenerationError, match="another generation with the same compiled step is under way"):
        list(other.generate(requests_of([3])))
    under_way.close()
    how = sampling(4)
    assert answered(other, requests_of([3] * 5)) == [
        slow_response(model, request, how) for request in requests_of([3] * 5)
    ]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("adapted", [False, True])
def test_one_step_serves_all_engines_over_a_model_until_one_is_closed(uncompiled, adapted):
    model = tiny_model("qwen3", 1)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if adapted else model
    engine, requests = LoopEngine(model, sampling(4), slots=2, compiler=StepCompiler()), requests_of([3])
    at_the_door = engine.compiler._step
    list(engine.generate(requests))
    list(engine.with_sampling(sampling(5), slots=3).generate(requests))
    assert engine.compiler._step is at_the_door
    cache = weakref.ref(at_the_door.fixed.buffers()[0])
    del at_the_door
    engine.close()
    gc.collect()
    assert cache() is None


def test_a_step_follows_what_becomes_of_its_model(uncompiled):
    model, how, requests = tiny_model("qwen3", 1), sampling(5), requests_of([4, 6])
    engine = LoopEngine(model, how, slots=2, compiler=StepCompiler())

    def assert_exact():
        assert answered(engine, requests) == [slow_response(model, request, how) for request in requests]

    with torch.inference_mode():
        assert_exact()
    assert_exact()
    model.lm_head = copy.deepcopy(model.lm_head)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert_exact()
    hook = model.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedGenerationError, match="hooks are attached to it"):
        list(engine.generate(requests))
    hook.remove()
    expected = answered(LoopEngine(model.bfloat16(), how, slots=2, compiler=StepCompiler()), requests)
    assert answered(engine, requests) == expected


def test_a_sequence_beyond_the_context_is_refused_as_without_the_compiler(uncompiled, monkeypatch):
    model = tiny_model("gpt2", 1, max_position_embeddings=16)
    engine = LoopEngine(model, sampling(9, eos_token_ids=()), slots=1, compiler=StepCompiler())
    assert len(answered(engine, requests_of([8]))[0][0]) == 9  # the last token is not read
    step = engine.compiler._step
    plain = step._compiled

    def compiled(*given):
        try:
            return plain(*given)
        except IndexError as error:  # the words of torch's compiled kernels
            raise RuntimeError("kernel, cxa.main.cpp:37, index out of bounds: 0 <= tmp7 < 16L") from error

    monkeypatch.setattr(step, "_compiled", compiled)
    with pytest.raises(
        InputError, match="the student's context holds 16 tokens, and a sequence of 17 would have to be read"
    ):
        list(engine.generate(requests_of([9])))


def test_what_gradient_checkpointing_hooks_to_the_embeddings_of_adapters_is_no_obstacle(uncompiled):
    model, how, requests = tiny_model("qwen3", 1), sampling(6), requests_of([4, 6, 2])
    model.enable_input_require_grads()
    engine = LoopEngine(model, how, slots=2, sampling_copy=SamplingCopy(torch.float32), compiler=StepCompiler())
    engine.update_weights(model, 1)
    assert answered(engine, requests) == [slow_response(model, request, how) for request in requests]


def test_models_whose_step_cannot_be_compiled_are_refused_at_the_door_by_their_reason(uncompiled):
    eager, hooked, patched = (tiny_model("qwen3", 1) for _ in range(3))
    eager.set_attn_implementation("eager")
    hooked.register_forward_hook(lambda *_: None)
    patched.forward = partial(type(patched).forward, patched)
    for model, reason in (
        (tiny_model("gemma2", 1), "its layers are not all full attention"),
        (tiny_model("lfm2", 1), "its layers are not all full attention"),
        (eager, "its attention, 'eager', takes no ready mask"),
        (hooked, "hooks are attached to it"),
        (patched, "its forward is replaced or compiled"),
    ):
        with pytest.raises(
            UnsupportedGenerationError, match=f"cannot be compiled: .*{reason}.*leave out compile_decoding"
        ):
            LoopEngine(model, sampling(4), compiler=StepCompiler())


def test_a_missing_compiler_is_told_before_anything_is_sampled(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}),
        pytest.raises(ConfigError, match=r"torch\.compile does not work here: .*Install a C\+\+ compiler"),
    ):
        LoopEngine(models()[0], sampling(4), compiler=StepCompiler())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("adapted", "bf16"), [(False, False), (True, False), (False, True)])
def test_training_and_evaluation_sample_with_the_weights_of_each_step(uncompiled, tmp_path, adapted, bf16):
    def measured(compile_decoding):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["q_proj"])
        trainer = make_trainer(
            tmp_path / str(compile_decoding),
            student=get_peft_model(load_student(), lora) if adapted else None,
            rollout_engine="loop",
            compile_decoding=compile_decoding,
            bf16=bf16,
            learning_rate=1e-3 if bf16 else 0.05,
            logging_steps=1,
            max_steps=3,
            eval_strategy="steps",
            eval_steps=1,
        )
        trainer.train()
        return [entry[name] for entry in trainer.state.log_history for name in ("kl/topk", "eval_kl") if name in entry]

    expected = measured(False)
    assert len(expected) == 6
    # In bf16 roundings sample other tokens; in float32 sums differ by their order alone.
    assert measured(True) == pytest.approx(expected, rel=0.3 if bf16 else 1e-5)


def test_a_copy_in_a_shorter_dtype_is_compiled_as_well(uncompiled):
    model, how = tiny_model("qwen3", 1), sampling(10)
    engine = LoopEngine(model, how, slots=3, sampling_copy=SamplingCopy(torch.bfloat16), compiler=StepCompiler())
    requests = requests_of([4, 6, 2, 5])
    for step in range(2):
        engine.update_weights(model, step)
        copied = copy.deepcopy(model).bfloat16()
        assert answered(engine, requests) == answered(
            LoopEngine(copied, how, slots=3, compiler=StepCompiler()), requests
        )
        with torch.no_grad():
            model.lm_head.weight.neg_()


@pytest.mark.slow
def test_the_compiler_is_asked_once_for_all_shapes():
    """The one test that runs it: half a minute of compiling."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, how = tiny_model("llama", 1), sampling(40)
    engine = LoopEngine(model, how, slots=6, compiler=StepCompiler())
    # Few and many rows, windows up to the whole cache, longer sequences, more slots.
    calls = (6, [24, 4, 9, 5, 6, 7, 3]), (6, [2]), (6, [3, 60, 5]), (9, [130] + [5] * 10)
    for slots, lengths in calls:
        requests = requests_of(lengths, caps=[40 - 9 * (number % 3) for number in range(len(lengths))])
        expected = [slow_response(model, request, how) for request in requests]
        assert answered(engine.with_sampling(how, slots=slots), requests) == expected
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled == 2  # a trial, and the step
