"""What a saved student carries: its config as it was loaded, weights in the dtype that was asked for, a config that can be saved.

Public reports: hiyouga/LlamaFactory#3120 and #1161 (`use_cache: false` in what was saved), huggingface/transformers#30305 and
verl-project/verl#296 (float32 on disk), huggingface/transformers#29988 and #29665 (a config that cannot be saved).
"""

import json

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny_model
from trainer_helpers import make_trainer
from transformers import AutoModelForCausalLM

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.tasks import load_student, load_tokenizer


def stored(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_saved_student_keeps_its_use_cache(tmp_path, use_cache):
    student = load_student()
    student.config.use_cache = use_cache
    changes = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "gradient_checkpointing": True}
    trainer = make_trainer(tmp_path, student=student, **changes)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        assert json.loads((folder / "config.json").read_text())["use_cache"] is use_cache


@pytest.mark.parametrize("tied", [True, False])
def test_the_finished_student_is_saved_in_the_dtype_that_was_asked_for_and_checkpoints_as_trained(tmp_path, tied):
    tokens = {"eos": load_tokenizer().eos_token_id, "pad": None}
    student = tiny_model("llama", 1, vocab_size=64, tie_word_embeddings=tied, **tokens)
    trainer = make_trainer(
        tmp_path, student, max_steps=1, save_dtype="bfloat16", save_strategy="steps", save_steps=1, learning_rate=1e-3
    )
    trainer.train()
    trainer.save_model()
    final, checkpoint = stored(tmp_path / "run"), stored(tmp_path / "run" / "checkpoint-1")
    assert {tensor.dtype for tensor in checkpoint.values()} == {torch.float32}
    assert final.keys() == checkpoint.keys()
    for name, tensor in final.items():
        assert torch.equal(tensor, checkpoint[name].bfloat16()), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}  # training may go on


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_an_adapter_is_saved_in_the_dtype_that_was_asked_for(tmp_path):
    peft = pytest.importorskip("peft")
    trainer = make_trainer(tmp_path, save_dtype="bfloat16")
    trainer.model = peft.get_peft_model(trainer.model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.save_model()
    with safe_open(tmp_path / "run" / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_a_generation_config_that_could_not_be_saved_is_mended_before_the_first_step_with_a_line(tmp_path, caplog):
    student = load_student()
    student.generation_config.do_sample = False
    student.generation_config.temperature = 0.6
    trainer = make_trainer(tmp_path, student=student, max_steps=1, save_strategy="steps", save_steps=1)
    assert "temperature=0.6, top_k=0 in the student's generation config has no effect" in caplog.text
    trainer.train()
    assert (tmp_path / "run" / "checkpoint-1" / "generation_config.json").is_file()


def test_one_that_cannot_be_mended_is_refused_at_set_up(tmp_path):
    student = load_student()
    student.generation_config.cache_implementation = "no such cache"
    with pytest.raises(ConfigError, match="the student's generation config cannot be saved"):
        make_trainer(tmp_path, student=student)
