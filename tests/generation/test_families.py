"""Families: whose rows are removed from a batch when they have ended, and what is said of those whose rows cannot."""

import logging
from dataclasses import replace

import pytest
import torch
import transformers
from generation_helpers import generate, oracle, padded_prompts
from oracle import assert_record_equals
from tiny_models import COMMON, FAMILIES, FURTHER_FAMILIES, tiny_model
from trainer_helpers import TASK, make_trainer, settings
from transformers import DynamicCache

from prune_opd_hf import DriftConfig
from prune_opd_hf.errors import ConfigError, UnsupportedGenerationError
from prune_opd_hf.generation import DriftMonitor, LoopEngine, Request, Sampling
from prune_opd_hf.generation.generate_call import compaction_obstacle
from prune_opd_hf.models.loading import make_adapter
from prune_opd_hf.preflight.pair_checks import check_families
from prune_opd_hf.tasks import load_tokenizer
from prune_opd_hf.training import PruneOPDTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),  # of experts
]

SAMPLING = Sampling(max_completion_length=24, eos_token_ids=(1,), pad_token_id=0)
STATE = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "eos_token_id": 1, "pad_token_id": 0}


def switching_model(tokens=16):
    """Phi3 with another rotary embedding beyond so many tokens, as in Phi-4-mini."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0, "rope_type": "longrope"}
    return tiny_model("phi3", 1, rope_parameters=factors, original_max_position_embeddings=tokens)


@pytest.mark.parametrize("family", sorted({**FAMILIES, **FURTHER_FAMILIES}))
def test_rows_of_every_family_are_removed_from_the_batch_when_they_end(family):
    assert LoopEngine(tiny_model(family, 1), SAMPLING).compaction_obstacle(longest_prompt=9) is None


# The others: test_hooks.py, test_loop_engine.py. Nemotron-H rounds a long pass and single steps differently.
@pytest.mark.parametrize("family", sorted({*FURTHER_FAMILIES} - {"nemotron_h"}))
def test_in_further_families_the_record_is_that_of_full_passes_and_slots_answer_as_plain_generate(family):
    student, teacher = tiny_model(family, 1), tiny_model(family, 2)
    ids, mask = padded_prompts([9, 4, 6])
    expected = generate(student, ids, mask, max_new_tokens=24)
    monitor = DriftMonitor(
        teacher, DriftConfig("overlap", top_k=4, threshold=0.5, weight_drop=0.1), check_every=6, attention_mask=mask
    )
    rollouts = monitor.finish(generate(student, ids, mask, monitor, loop=True, max_new_tokens=24))
    assert_record_equals(rollouts, oracle(student, teacher, ids, mask, expected, weight_drop=0.1))
    prompts = [tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
    engine = LoopEngine(student, replace(SAMPLING, temperature=0.0), slots=2)
    for number, tokens, _ in engine.generate(Request(prompt) for prompt in prompts):
        answer = expected[number, ids.shape[1] :].tolist()
        assert list(tokens) == answer[: len(tokens)]
        assert all(token == 0 for token in answer[len(tokens) :])


LORA = {"qwen3_moe", "gemma3", "gemma3_vision", "phi3", "falcon_h1", *FURTHER_FAMILIES} - {"gemma4", "nemotron_h"}


@pytest.mark.parametrize("family", sorted(LORA))
def test_an_adapter_on_all_linear_layers_takes_a_step_in_every_family_and_nothing_else_moves(tmp_path, family):
    peft = pytest.importorskip("peft")
    student, teacher = (tiny_model(family, seed, vocab_size=64, eos=2, pad=None) for seed in (1, 2))
    trainer = PruneOPDTrainer(
        student,
        teacher,
        settings(tmp_path, max_steps=1, loss_type="reverse_kl"),
        TASK.dataset(8, seed=0),
        processing_class=load_tokenizer(),
        peft_config=peft.LoraConfig(r=2, target_modules="all-linear"),
    )
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("lora_B" in name for name in moved)
    assert all("lora_" in name for name in moved)


# huggingface/peft#2556: kernels read the weight of Mamba's out_proj, and what an adapter adds to it is lost in whole passes
def test_an_adapter_on_all_linear_layers_leaves_out_what_mamba_reads_past_it():
    peft = pytest.importorskip("peft")
    adapted = make_adapter(tiny_model("falcon_h1", 1), peft.LoraConfig(r=2, target_modules="all-linear"))
    layers = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert {layer.rpartition(".")[2] for layer in layers} >= {"in_proj", "q_proj", "gate_proj"}
    assert not any("mamba.out_proj" in layer for layer in layers)
    with pytest.raises(ConfigError, match=r"Incompatible modules.*target_modules, or lora_target_modules"):
        make_adapter(tiny_model("falcon_h1", 1), peft.LoraConfig(r=2, target_modules=["out_proj"]))


def test_rows_stay_where_the_rotary_embedding_changes_on_the_way():
    engine = LoopEngine(switching_model(tokens=33), SAMPLING)
    assert engine.compaction_obstacle(longest_prompt=9) is None
    obstacle = engine.compaction_obstacle(longest_prompt=10)
    assert obstacle == "its rotary embedding changes at 33 tokens, and a sequence may come to 34"


def test_tokens_equal_plain_generate_where_the_rotary_embedding_changes():
    student = switching_model()
    ids, mask = padded_prompts([9, 4, 6])
    expected = generate(student, ids, mask, max_new_tokens=24)
    assert torch.equal(generate(student, ids, mask, loop=True, max_new_tokens=24), expected)


class AddsAnInput(transformers.Phi3ForCausalLM):
    def prepare_inputs_for_generation(self, *args, **kwargs):
        return super().prepare_inputs_for_generation(*args, **kwargs) | {"steering": torch.ones(1)}


class ForgetsItsMask(transformers.Phi3ForCausalLM):
    def prepare_inputs_for_generation(self, *args, **kwargs):
        return super().prepare_inputs_for_generation(*args, **kwargs) | {"attention_mask": None}


class ReadsEverythingAgainAt30(transformers.Phi3ForCausalLM):
    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, **kwargs):
        whole = input_ids.shape[1] >= 30
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=None if whole else next_sequence_length, **kwargs
        )


class AddsNothingThatCounts(transformers.Phi3ForCausalLM):
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return inputs | {"token_type_ids": None, "mm_encoder_outputs": {}, "logits_to_keep": 1}


def obstacle_of(kind, max_length, module="transformers.models.mine.modeling_mine", **more):
    model = tiny_model("phi3", 1)
    model.__class__ = type(kind.__name__, (kind,), {})
    kind.prepare_inputs_for_generation.__module__ = module
    ids = torch.ones(2, 5, dtype=torch.long)
    cache = DynamicCache(config=model.config)
    prepared = {"attention_mask": ids, "position_ids": ids.cumsum(-1) - 1, "past_key_values": cache, "use_cache": True}
    return compaction_obstacle(model, {**prepared, **more}, max_length)


def test_an_own_preparation_is_accepted_where_it_adds_nothing_that_counts():
    assert obstacle_of(AddsNothingThatCounts, 40) is None
    for kind in (AddsAnInput, ForgetsItsMask, ReadsEverythingAgainAt30):
        assert obstacle_of(kind, 40) == f"{kind.__name__} prepares its inputs in its own way"
    assert obstacle_of(ReadsEverythingAgainAt30, 29) is None
    # Code from elsewhere may do at one length what it does not at another.
    assert obstacle_of(AddsNothingThatCounts, 40, module="somebody.modeling") is not None


def test_an_image_is_an_obstacle_and_the_lack_of_one_is_not():
    assert obstacle_of(AddsNothingThatCounts, 40, mm_encoder_outputs={}) is None
    image = {"image": torch.ones(1)}
    expected = "its forward pass takes mm_encoder_outputs"
    assert obstacle_of(AddsNothingThatCounts, 40, mm_encoder_outputs=image) == expected


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "lru_width": 16}
RECURRENT = {"Mamba": {"state_size": 4}, "Rwkv": {"attention_hidden_size": 16}, "RecurrentGemma": HEADS}


@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_student_is_refused_at_set_up_in_one_line(tmp_path, family):
    config = getattr(transformers, f"{family}Config")(**STATE, **RECURRENT[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with pytest.raises(
        UnsupportedGenerationError, match=r"outside of past_key_values.* choose a student with a KV cache"
    ):
        make_trainer(tmp_path, student=model)
    checks = check_families(model, tiny_model("llama", 1), SAMPLING, 9)
    assert [(check.level, "choose a student" in check.message) for check in checks] == [("stop", True)]


def test_the_preflight_says_when_a_family_cannot():
    teacher = tiny_model("llama", 1)
    (fine,) = check_families(tiny_model("falcon_h1", 1), teacher, SAMPLING, 9)
    assert (fine.name, fine.level) == ("row compaction", "fine")
    rotary, rows = check_families(switching_model(), teacher, SAMPLING, 9)
    assert (rotary.name, rotary.level, rows.name, rows.level) == (
        "rotary embedding",
        "warning",
        "row compaction",
        "warning",
    )
    assert "the student reads sequences beyond 16 tokens with another rotary embedding" in rotary.message
    assert "stopping them saves little" in rows.message
    (rotary, rows) = check_families(teacher, switching_model(), SAMPLING, 9)
    assert ("the teacher reads" in rotary.message, rows.level) == (True, "fine")


def test_training_begins_with_a_line_where_the_rotary_embedding_changes(tmp_path, caplog):
    student = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            **{**COMMON, "vocab_size": 64, "eos_token_id": 2, "pad_token_id": 0},
            original_max_position_embeddings=16,
            rope_parameters=switching_model().config.rope_parameters,
        )
    )
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, student=student)
    assert "the student reads sequences beyond 16 tokens with another rotary embedding" in caplog.text
