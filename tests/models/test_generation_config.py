"""A generation config: what of it would warp a distribution, and that it can always be saved without a change of behaviour."""

import copy

import pytest
import torch
from tiny_models import tiny_model
from transformers import GenerationConfig

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.models.generation_config import KNOWN, NEUTRAL, make_savable, warping_settings

SAMPLING_ONLY = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "typical_p": 0.9,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 3e-4,
}


# huggingface/transformers#29988, #29665, QwenLM/Qwen3-ASR#210: found out at the first checkpoint, hours into a run
@pytest.mark.parametrize("name", SAMPLING_ONLY)
@pytest.mark.parametrize("do_sample", [False, None])
def test_settings_without_effect_are_reset_so_that_the_config_can_be_saved(tmp_path, name, do_sample):
    config = GenerationConfig(do_sample=do_sample, eos_token_id=[2, 6], repetition_penalty=1.1)
    setattr(config, name, SAMPLING_ONLY[name])
    with pytest.raises(ValueError, match="Fix these issues"):
        config.save_pretrained(tmp_path)
    assert make_savable(config) == {name: SAMPLING_ONLY[name]}
    config.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.eos_token_id, saved.repetition_penalty, getattr(saved, name)) == ([2, 6], 1.1, None)


def test_generate_does_the_same_before_and_after():
    model = tiny_model("qwen3", 1)
    for name, value in {**SAMPLING_ONLY, "length_penalty": 2.0, "early_stopping": True, "output_scores": True}.items():
        setattr(model.generation_config, name, value)
    ids = torch.tensor([[5, 6, 7]])
    before = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)
    assert set(make_savable(model.generation_config)) == {
        *SAMPLING_ONLY,
        "length_penalty",
        "early_stopping",
        "output_scores",
    }
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9), before)


def test_a_config_that_can_be_saved_is_left_alone():
    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, repetition_penalty=1.1)
    before = copy.deepcopy(config)
    assert make_savable(config) == {}
    assert config == before


def test_what_cannot_be_mended_is_one_line():
    config = GenerationConfig()
    config.cache_implementation = "no such cache"
    with pytest.raises(ConfigError, match="cannot be saved: Invalid `cache_implementation`") as refusal:
        make_savable(config)
    assert "\n" not in str(refusal.value)


def test_every_setting_is_either_neutralized_or_known_to_decide_no_token():
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} == KNOWN
    assert {"repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "forced_eos_token_id", "top_h"} <= set(
        NEUTRAL
    )
    assert (
        warping_settings(GenerationConfig(**{name: value for name, value in NEUTRAL.items() if value is not None}))
        == {}
    )


def test_a_config_made_of_a_models_config_says_nothing_of_sampling():
    """One whose folder has no generation_config.json gets `output_attentions=False` and its like."""
    assert warping_settings(tiny_model("llama", 0).generation_config) == {}
    assert warping_settings(GenerationConfig(output_attentions=False, temperature=0.0)) == {"temperature": 0.0}
