"""What a run's launch and arguments allow: refused in one line, before anything is loaded."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model
from trainer_helpers import settings
from transformers import ProcessorMixin

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.models.loading import as_tokenizer
from prune_opd_hf.tasks import load_student, load_tokenizer
from prune_opd_hf.tasks.pair import WEIGHTS
from prune_opd_hf.training import PruneOPDTrainer
from prune_opd_hf.training.launch import check_launch
from prune_opd_hf.training.pair import freeze_unread_parts

STUDENT = str(WEIGHTS / "student")


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr("prune_opd_hf.training.trainer.load_pair", None)


def test_several_gpus_without_a_launcher_are_refused(tmp_path, nothing_is_loaded):
    args = settings(tmp_path)
    args._n_gpu = 3  # as Transformers counts the visible ones
    with pytest.raises(ConfigError, match=r"3 GPUs .*nn\.DataParallel.* accelerate launch --num_processes 3"):
        PruneOPDTrainer(STUDENT, STUDENT, args)


def test_a_student_whose_layers_lie_on_several_gpus_may_use_them(tmp_path):
    args = settings(tmp_path)
    args._n_gpu = 2
    student = tiny_model("llama", 1)
    with pytest.raises(ConfigError, match="2 GPUs"):
        check_launch(args, student)
    student.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    check_launch(args, student)
    args.model_init_kwargs = {"device_map": "auto"}
    check_launch(args, STUDENT)


def test_deepspeed_zero_3_is_refused_and_zero_2_is_not(tmp_path, nothing_is_loaded):
    args = settings(tmp_path)
    args.deepspeed_plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(is_zero3=lambda: False))
    check_launch(args, STUDENT)
    args.deepspeed_plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(is_zero3=lambda: True))
    with pytest.raises(ConfigError, match=r"ZeRO-3 is not supported.* Use FSDP2 .* or DeepSpeed ZeRO-2"):
        PruneOPDTrainer(STUDENT, STUDENT, args)


@pytest.mark.parametrize("version", ["1", None])  # accelerate's own default is 1
def test_fsdp_1_is_refused(tmp_path, nothing_is_loaded, monkeypatch, version):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    args = settings(tmp_path)
    check_launch(args, STUDENT)
    if version is None:
        monkeypatch.delenv("FSDP_VERSION")
    else:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ConfigError, match=r"FSDP of version 1.* Use FSDP2"):
        PruneOPDTrainer(STUDENT, STUDENT, args)


@pytest.mark.parametrize(
    ("arguments", "changes", "said"),
    [
        ({"peft_config": {"r": 2}}, {}, r"peft_config must be a configuration such as peft\.LoraConfig.*, got dict"),
        ({}, {"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy needs an eval_dataset"),
    ],
)
def test_what_is_passed_in_the_place_of_something_else_is_refused(
    tmp_path, nothing_is_loaded, arguments, changes, said
):
    if "peft_config" in arguments:
        pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=said):
        PruneOPDTrainer(STUDENT, STUDENT, settings(tmp_path, **changes), **arguments)


class Processor(ProcessorMixin):
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


# huggingface/trl#5895: multimodal classes come with a processor
def test_a_processor_stands_for_its_tokenizer(tmp_path):
    tokenizer = load_tokenizer()
    processor = Processor(tokenizer)
    trainer = PruneOPDTrainer(
        load_student(), STUDENT, settings(tmp_path), processing_class=processor, teacher_processing_class=processor
    )
    assert trainer.processing_class is tokenizer
    with pytest.raises(
        ConfigError, match="processing_class must be a tokenizer or a processor that holds one, got str: "
    ):
        as_tokenizer(STUDENT, "processing_class")


def test_only_what_text_goes_through_is_trained():
    student = tiny_model("gemma3_vision", 1)
    freeze_unread_parts(student)
    frozen = {name for name, weight in student.named_parameters() if not weight.requires_grad}
    assert frozen
    assert all(name.startswith(("model.vision_tower.", "model.multi_modal_projector.")) for name in frozen)
    student(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all((weight.grad is None) == (name in frozen) for name, weight in student.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_nothing_of_a_language_model_is_frozen(family):
    student = tiny_model(family, 1)
    freeze_unread_parts(student)
    assert all(weight.requires_grad for weight in student.parameters())
