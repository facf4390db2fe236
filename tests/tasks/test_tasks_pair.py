"""The shipped teacher and student, and the name that stands for them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd_hf.tasks import (
    WEIGHTS,
    ChainTask,
    is_correct,
    load_student,
    load_teacher,
    load_tokenizer,
    resolve_embedded,
)


def graded(model):
    """Share of right and of drifting responses to 256 evaluation problems, by plain `generate`."""
    tokenizer, task = load_tokenizer(), ChainTask()
    problems = task.problems(256, 1, "evaluation")
    prompts = tokenizer([problem.prompt for problem in problems], padding=True, return_tensors="pt")
    sequences = model.generate(**prompts, max_new_tokens=111)
    responses = tokenizer.batch_decode(sequences[:, prompts.input_ids.shape[1] :])
    right = [is_correct(response, problem.answer) for problem, response in zip(problems, responses, strict=True)]
    return sum(right) / len(right), sum("HMM" in response.split() for response in responses) / len(right)


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
    right, drifting = graded(load_teacher())
    assert right >= 0.97
    assert drifting == 0


def test_the_shipped_student_is_seldom_right_and_mostly_drifts():
    right, drifting = graded(load_student())
    assert 0.05 < right < 0.20
    assert 0.75 < drifting < 0.92


def test_only_the_name_embedded_stands_for_the_shipped_models():
    assert resolve_embedded("embedded", "student") == str(WEIGHTS / "student")
    assert resolve_embedded("./embedded", "student") == "./embedded"
