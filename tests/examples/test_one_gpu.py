"""The settings for one GPU: each published pair fits the card that they name, by the prediction of the preflight.

Models are made of their configs' figures alone, and take no memory. Quantized weights have the bytes that bitsandbytes needs.
"""

from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from prune_opd_hf.cli.adapters import AdapterArguments
from prune_opd_hf.cli.parser import read_configs
from prune_opd_hf.cli.train import ScriptArguments
from prune_opd_hf.preflight.step_memory import step_memory
from prune_opd_hf.training import PruneOPDConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"  # PEFT asks by its old name
)

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
PAIRS = sorted(path.stem for path in CONFIGS.glob("*_from_*.yaml"))
CARDS = {"24gb": 24, "48gb": 48, "80gb": 80}
USABLE = 0.92
"""Of a card's memory: the rest is the CUDA context's, and lost between blocks of the allocator."""


def qwen2(hidden, intermediate, heads, key_heads, vocabulary):
    return Qwen2ForCausalLM, Qwen2Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=28, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip


def qwen3(hidden, intermediate, layers, heads):
    return Qwen3ForCausalLM, Qwen3Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=151_936, tie_word_embeddings=True,
    )  # fmt: skip


QWEN_1_7B, QWEN_4B = qwen3(2048, 6144, 28, 16), qwen3(2560, 9728, 36, 32)
R1_1_5B, R1_7B = qwen2(1536, 8960, 12, 2, 151_936), qwen2(3584, 18_944, 28, 4, 152_064)
MODELS = {  # https://huggingface.co/NAME/blob/main/config.json
    "Qwen/Qwen3-1.7B-Base": QWEN_1_7B,
    "Qwen/Qwen3-4B-Base": QWEN_4B,
    "Qwen/Qwen3-4B": QWEN_4B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": R1_1_5B,
    "hbx/JustRL-DeepSeek-1.5B": R1_1_5B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": R1_7B,
    "Skywork/Skywork-OR1-7B": R1_7B,
}


class Quantized(torch.autograd.Function):
    """A product with weights that are made whole for its time only."""

    @staticmethod
    def forward(ctx, states, features):
        return states.new_empty(*states.shape[:-1], features)


class FourBit(nn.Linear):
    """As bitsandbytes holds a layer: 4 bits a number, and a scale of 8 bits for 64 of them, itself scaled in blocks of 256."""

    def forward(self, states):
        return Quantized.apply(states, self.out_features)


def quantize_inplace(model):
    for part in model.modules():
        if type(part) is nn.Linear and part is not model.lm_head:
            part.__class__ = FourBit
            number = part.weight.numel()
            scales = number // 64
            size = number // 2 + scales + 4 * scales // 256
            part.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
    return model


def made(name, quantized):
    kind, config = MODELS[name]
    model = kind(config)
    return quantize_inplace(model) if quantized else model


@contextmanager
def weights_in(dtype):
    """Models made here have no memory."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def fake_inplace(model):
    """A model on the meta device as one whose passes can be asked for what they keep."""
    fakes = {}
    with FakeTensorMode():
        for part in model.modules():
            for held in (part._parameters, part._buffers):
                for name, value in held.items():
                    if value is not None and id(value) not in fakes:
                        empty = torch.empty(value.shape, dtype=value.dtype)
                        is_weight = isinstance(value, nn.Parameter)
                        fakes[id(value)] = nn.Parameter(empty, value.requires_grad) if is_weight else empty
                    held[name] = None if value is None else fakes[id(value)]
    return model


def settings_of(pair, card, **changes):
    known = [item.name for kind in (ScriptArguments, PruneOPDConfig) for item in fields(kind)]
    return read_configs([f"{CONFIGS}/{pair}.yaml", f"{CONFIGS}/one_gpu/{card}.yaml"], known) | changes


def predicted(settings, card):
    """What a step holds with these settings."""
    adapter = AdapterArguments(
        **{item.name: settings[item.name] for item in fields(AdapterArguments) if item.name in settings}
    )
    peft_config = adapter.peft_config()
    with weights_in(torch.float32 if peft_config is None else torch.bfloat16):
        student = made(settings["model_name_or_path"], adapter.load_in_4bit)
        if peft_config is not None:
            student = get_peft_model(student, peft_config, low_cpu_mem_usage=True)
    with weights_in(torch.bfloat16):
        teacher = made(settings["teacher_model_name_or_path"], "teacher_quantization_config" in settings)
    return step_memory(
        fake_inplace(student),
        fake_inplace(teacher),
        rows=settings["generation_batch_size"],
        tokens=settings["max_prompt_length"] + settings["max_completion_length"],
        pass_tokens=settings["max_tokens_per_micro_batch"],
        rollouts=settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"],
        check_every=settings["check_every"],
        top_k=settings["drift_top_k"],
        bf16=settings["bf16"],
        gradient_checkpointing=settings["gradient_checkpointing"],
        available=round(CARDS[card] * USABLE * 2**30),
    )


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("pair", PAIRS)
def test_settings_for_a_card_go_over_those_of_a_pair_and_a_step_stays_the_published_one(pair, card):
    plain, settings = read_configs([f"{CONFIGS}/{pair}.yaml"]), settings_of(pair, card)
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] == 64 * 4
    assert settings["teacher_model_name_or_path"] == plain["teacher_model_name_or_path"]
    assert settings["use_peft"]
    assert settings["max_prompt_length"] + settings["max_completion_length"] <= settings["max_tokens_per_micro_batch"]
    AdapterArguments(
        **{item.name: settings[item.name] for item in fields(AdapterArguments) if item.name in settings}
    ).check_adapter()


@pytest.mark.slow  # five seconds each
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_step_of_each_published_pair_fits_its_card(pair, card):
    settings = settings_of(pair, card)
    memory = predicted(settings, card)
    assert memory.peak <= CARDS[card] * USABLE * 2**30
    assert memory.most_tokens >= settings["max_tokens_per_micro_batch"]


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.startswith(("qwen3_1.7b", "r1_distill_1.5b"))])
def test_students_below_two_billion_weights_fit_the_largest_card_whole(pair):
    assert predicted(settings_of(pair, "80gb", use_peft=False), "80gb").peak <= 80 * USABLE * 2**30
