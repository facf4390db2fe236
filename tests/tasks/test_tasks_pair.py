"""The shipped teacher and student, and that their recipes make such models again."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.tasks import (
    STUDENT_RECIPE,
    TEACHER_RECIPE,
    Accuracy,
    ChainTask,
    cold_start_student,
    load_student,
    load_teacher,
    load_tokenizer,
    measure_accuracy,
    train_teacher,
)
from prune_opd_hf.tasks.pair import WEIGHTS

SHORT = ChainTask(operations=3, filler_min=4, filler_max=8)


def accuracy_of(model, task, *, count=256, do_sample=True):
    return measure_accuracy(
        model,
        load_tokenizer(),
        task.problems(count, 1, "evaluation"),
        max_new_tokens=task.longest_response_tokens,
        do_sample=do_sample,
    )


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(("name", "load"), [("teacher", load_teacher), ("student", load_student)])
def test_shipped_folders_load_by_plain_auto_classes(name, load):
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS / name, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / name, local_files_only=True)
    assert same_weights(model, load())
    assert tokenizer.get_vocab() == load_tokenizer().get_vocab()
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 64
    assert model.dtype == torch.float32
    assert not model.training


@pytest.mark.parametrize("load", [load_teacher, load_student])
def test_shipped_models_know_their_special_tokens_and_generate_with_a_cache(load):
    model, tokenizer = load(), load_tokenizer()
    expected = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == expected
    assert model.config.use_cache
    generation = model.generation_config
    assert (generation.do_sample, generation.temperature, generation.top_k, generation.top_p) == (True, 1.0, 0, 1.0)


def test_the_shipped_weights_stay_below_five_megabytes():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 5_000_000


def test_the_shipped_teacher_is_nearly_always_right_and_never_drifts():
    accuracy = accuracy_of(load_teacher(), ChainTask())
    assert accuracy.share >= 0.97
    assert accuracy.drifting == 0


def test_the_shipped_student_is_seldom_right_and_mostly_drifts():
    accuracy = accuracy_of(load_student(), ChainTask())
    assert 0.05 < accuracy.share < 0.20
    assert 0.75 < accuracy.drifting_share < 0.92


def test_a_teacher_of_shorter_chains_is_learnt_from_scratch():
    teacher = train_teacher(SHORT, recipe=dataclasses.replace(TEACHER_RECIPE, clean_steps=150), progress=False)
    assert accuracy_of(teacher, SHORT).share >= 0.9


def test_a_student_of_shorter_chains_learns_both_styles():
    """It ends up worse than the clean style alone would be, and drifts about as often as its traces did (.82)."""
    recipe = dataclasses.replace(STUDENT_RECIPE, clean_steps=60, mixed_steps=60)
    accuracy = accuracy_of(cold_start_student(SHORT, recipe=recipe, progress=False), SHORT)
    assert SHORT.drifting_share == pytest.approx(1 - 0.2 * 0.95**2)
    assert accuracy.drifting_share == pytest.approx(SHORT.drifting_share, abs=0.2)
    assert accuracy.share < 0.5


@pytest.mark.slow
def test_the_full_recipe_makes_a_teacher_of_the_same_class():
    assert accuracy_of(train_teacher(progress=False), ChainTask()).share >= 0.97


@pytest.mark.slow
def test_the_full_recipe_makes_a_student_of_the_same_class():
    accuracy = accuracy_of(cold_start_student(progress=False), ChainTask())
    assert 0.05 < accuracy.share < 0.20
    assert accuracy.drifting_share > 0.6


@pytest.mark.parametrize("train", [train_teacher, cold_start_student])
def test_the_same_seed_makes_the_same_weights_and_another_seed_others(train):
    recipe = dataclasses.replace(STUDENT_RECIPE, clean_steps=2, mixed_steps=2, batch_size=4)
    first, again, other = (train(SHORT, recipe=recipe, seed=seed, progress=False) for seed in (3, 3, 4))
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_the_measured_share_counts_right_answers_against_a_model_that_always_says_the_same():
    """A model of constant logits decodes the end at once, which has no digit before it: nothing is right."""
    model = load_student()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    model.generation_config.eos_token_id = 0  # the arg max of equal logits
    accuracy = accuracy_of(model, SHORT, count=30, do_sample=False)
    assert accuracy == Accuracy(problems=30, correct=0, drifting=0)


def test_the_interval_is_wilsons():
    """For 3 of 10 and z = 1.96: (.3 + z²/20 ± z sqrt(.3 x .7 / 10 + z²/400)) / (1 + z²/10)."""
    z = 1.959964
    centre, half = 0.3 + z**2 / 20, z * (0.021 + z**2 / 400) ** 0.5
    expected = ((centre - half) / (1 + z**2 / 10), (centre + half) / (1 + z**2 / 10))
    assert Accuracy(problems=10, correct=3, drifting=0).interval == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"heads": 5}, "hidden_size 96 and heads 5"),
        ({"clean_steps": 0}, "clean_steps 0 and mixed_steps 0"),
        ({"mixed_steps": -1}, "mixed_steps -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TEACHER_RECIPE, **settings)


def test_a_task_beyond_the_context_is_refused_before_training():
    """100 operations: 203 prompt tokens and 2 x 99 + 1 + 120 + 3 = 322 response tokens."""
    with pytest.raises(ConfigError, match="512 tokens in all, got a task of up to 525"):
        train_teacher(ChainTask(operations=100, filler_max=120))


def test_an_unknown_device_is_refused_before_training():
    with pytest.raises(ConfigError, match="got 'abacus'"):
        train_teacher(device="abacus")


def test_measuring_on_no_problems_is_refused():
    with pytest.raises(InputError, match="at least one problem"):
        measure_accuracy(load_student(), load_tokenizer(), [], max_new_tokens=1)
