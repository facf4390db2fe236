"""Engines draw from the student's own distribution, whatever its generation config says; bad settings are refused at once."""

import copy
import logging

import pytest
import torch
from generation_helpers import CONFIG, generate, padded_prompts
from test_loop_engine import answered, models, requests_of, sampling
from tiny_models import tiny_model

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.generation import DriftMonitor, LoopEngine, Sampling, pruned_generate

# verl-project/verl#7270: rollouts inherit repetition_penalty 1.1 of Qwen2.5-Instruct's generation config, updates do not
LEAKS = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "temperature": 0.3,
    "top_p": 0.3,
    "top_k": 2,
    "min_p": 0.5,
    "top_h": 0.3,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "bad_words_ids": [[5], [6]],
    "suppress_tokens": [5, 6, 7],
    "begin_suppress_tokens": [5, 6, 7, 8, 9, 10, 11],
    "sequence_bias": {(9,): 8.0},
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 9,
    "exponential_decay_length_penalty": (1, 3.0),
    "min_new_tokens": 9,
    "min_length": 20,
    "guidance_scale": 2.0,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "max_time": 1e-9,
    "num_beams": 2,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 3,
    "stop_strings": ["x"],
    "output_scores": True,
    "return_dict_in_generate": True,
}


def drawn(**changes):
    return sampling(12, **{"eos_token_ids": (), "temperature": 1.0, **changes})


@pytest.fixture(scope="module")
def clean():
    student, _ = models(eos=None)
    return student, answered(LoopEngine(student, drawn(), slots=2), requests_of([4, 6, 2]))


@pytest.mark.parametrize("name", LEAKS)
def test_what_a_generation_config_says_of_sampling_changes_no_sample(clean, name):
    student, expected = clean
    warped = copy.copy(student)
    warped.generation_config = copy.deepcopy(student.generation_config)
    warped.generation_config.do_sample = True
    setattr(warped.generation_config, name, LEAKS[name])
    engine = LoopEngine(warped, drawn(), slots=2)
    assert engine._prepare(4)[0].processors == []
    assert answered(engine, requests_of([4, 6, 2])) == expected


def test_what_the_user_sets_is_used(clean):
    student, expected = clean
    for how in ({"top_k": 1}, {"generation_kwargs": {"repetition_penalty": 1.5}}, {"temperature": 0.3}):
        engine = LoopEngine(student, drawn(**how), slots=2)
        assert answered(engine, requests_of([4, 6, 2])) != expected, how


@pytest.mark.parametrize(
    "name", ["max_new_tokens", "num_return_sequences", "top_k", "eos_token_id", "generation_config"]
)
def test_what_sampling_decides_itself_may_not_stand_in_generation_kwargs(name):
    with pytest.raises(ConfigError, match=f"generation_kwargs must not hold {name}: set "):
        Sampling(4, (1,), 0, generation_kwargs={name: 3})


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"repetiton_penalty": 1.1}, "repetiton_penalty"),
        ({"repetition_penalty": 0.0}, "strictly positive float"),
        ({"stop_strings": ["x"]}, "tokenizer"),
        ({"cache_implementation": "none of these"}, "cache_implementation"),
    ],
)
def test_settings_that_generate_would_refuse_in_the_first_step_are_refused_when_the_engine_is_made(kwargs, said):
    with pytest.raises(ConfigError, match="generate refuses these settings") as refusal:
        LoopEngine(tiny_model("qwen3", 1), sampling(4, generation_kwargs=kwargs))
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize(("told", "warned"), [([1], True), ([1, 6], False)])
def test_an_end_of_the_teacher_that_generate_was_not_told_is_named_once_with_the_remedy(loop, told, warned, caplog):
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    teacher.generation_config.eos_token_id = [6, 1]
    ids, mask = padded_prompts([4, 2])
    monitor = DriftMonitor(teacher, CONFIG, attention_mask=mask)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            monitor.finish(generate(student, ids, mask, monitor, loop=loop, max_new_tokens=3, eos_token_id=told))
    lines = [record.getMessage() for record in caplog.records if "teacher ends its responses" in record.getMessage()]
    assert len(lines) == warned
    assert all("with token 6, and generate ends rows with [1] only" in line for line in lines)
    assert all(line.endswith("pass eos_token_id=[1, 6] to generate") for line in lines)


def test_pruned_generate_without_a_monitor_says_that_nobody_watches(caplog):
    ids = torch.tensor([[5, 6]])
    for _ in range(2):
        tiny_model("qwen3", 1).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, custom_generate=pruned_generate
        )
    assert caplog.text.count("no teacher watches") == 1


# A generation config that ships a penalty, beside plain generate: the record would not be what full passes give
@pytest.mark.parametrize(("penalty", "warned"), [(1.1, 1), (1.0, 0)])
def test_a_penalty_that_runs_before_the_monitor_is_named_once(penalty, warned, caplog):
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    student.generation_config.repetition_penalty = penalty
    ids, mask = padded_prompts([4, 2])
    monitor = DriftMonitor(teacher, CONFIG, attention_mask=mask)
    for _ in range(2):
        monitor.finish(generate(student, ids, mask, monitor, max_new_tokens=3, do_sample=True, temperature=0.7))
    assert caplog.text.count("RepetitionPenaltyLogitsProcessor of this generate call run before the monitor") == warned
