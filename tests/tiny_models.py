"""Tiny causal language models of several families, built offline with weights large enough to make peaked distributions."""

import torch
import transformers
from transformers import PreTrainedModel

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
}

FAMILIES = {
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "llama": ("Llama", {}),
    "gpt2": ("GPT2", {}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 3}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "decoder_sparse_step": 1,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3", {}),
    "falcon_h1": (
        "FalconH1",
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
            "mamba_expand": 1,
            "lm_head_multiplier": 0.5,
        },
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
}


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FURTHER_FAMILIES = {
    "mistral": ("Mistral", {"sliding_window": None}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 8, "num_hidden_layers": 4}),
    "glm4": ("Glm4", {"head_dim": 8}),
    "gpt_oss": ("GptOss", {"head_dim": 8, "sliding_window": 8, **EXPERTS}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "granite": ("Granite", {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "gemma4": (  # its last layers read the keys of the first
        "Gemma4",
        {
            "head_dim": 8,
            "global_head_dim": 8,
            "sliding_window": 8,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
        },
    ),
    "nemotron_h": (  # a layer of it has experts and no attention
        "NemotronH",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "expand": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
}
"""Families that are tested in one place, `generation/test_families.py`."""

FAMILIES["gemma3_vision"] = FAMILIES["gemma3"]  # its multimodal class, used for text
CLASSES = {"gpt2": "GPT2LMHeadModel", "gemma3_vision": "Gemma3ForConditionalGeneration"}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def tiny_model(
    family: str, seed: int, vocab_size: int = 48, eos: int | None = 1, pad: int | None = 0, **changes
) -> PreTrainedModel:
    """A tiny model of `family` in evaluation mode, its weights drawn from `seed`."""
    prefix, special = {**FAMILIES, **FURTHER_FAMILIES}[family]
    settings = {**COMMON, **special, **changes, "vocab_size": vocab_size}
    settings |= {"eos_token_id": eos, "pad_token_id": pad, "bos_token_id": 2}
    if family == "gpt2":
        settings = {
            "vocab_size": vocab_size,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": settings["max_position_embeddings"],
            "initializer_range": 0.25,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "bos_token_id": 2,
        }
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    if family == "gemma3_vision":
        config = transformers.Gemma3Config(
            text_config=settings,
            vision_config=VISION,
            mm_tokens_per_image=4,
            **{name: settings[name] for name in ("eos_token_id", "pad_token_id")},
            **dict.fromkeys(("image_token_id", "boi_token_id", "eoi_token_id"), vocab_size - 1),
        )
    else:
        named = f"{prefix}TextConfig", f"{prefix}Config"
        config = getattr(transformers, next(name for name in named if hasattr(transformers, name)))(**settings)
    model = getattr(transformers, CLASSES.get(family, f"{prefix}ForCausalLM"))(config)
    if pad is not None:
        _never_sample_inplace(model, pad)
    torch.random.set_rng_state(state)
    return model.eval()


def checkpoint_inplace(model: PreTrainedModel) -> None:
    """Turn gradient checkpointing on, under its newer name where there is one."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def _never_sample_inplace(model: PreTrainedModel, token: int) -> None:
    """A trained model does not emit its padding token; a random one would, so its logit gets a large negative bias."""
    old = model.get_output_embeddings()
    head = torch.nn.Linear(old.in_features, old.out_features)
    with torch.no_grad():
        head.weight.copy_(old.weight)
        head.bias.zero_()
        head.bias[token] = -1000.0
    model.set_output_embeddings(head)
