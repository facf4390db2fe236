"""What a model's generation config says of sampling: which of it would change the distribution, and whether it can be saved.

The names come from Transformers' own class, so that a warper of a later version is known here as well.
"""

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from prune_opd_hf.errors import ConfigError

KEPT = frozenset(
    "eos_token_id pad_token_id bos_token_id decoder_start_token_id max_length max_new_tokens use_cache cache_implementation "
    "cache_config max_cache_len compile_config disable_compile prefill_chunk_size continuous_batching_config low_memory "
    "transformers_version".split()
)
"""Settings that do not decide which token is drawn: special tokens, lengths, caches, compilation."""

KNOWN = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))
"""Every setting of a generation config."""

NEUTRAL: Mapping[str, Any] = {
    **{name: GenerationConfig._get_default_generation_params().get(name) for name in sorted(KNOWN - KEPT)},
    "top_k": 0,  # Transformers samples from the 50 most likely tokens unless it is told otherwise
}
"""Every other setting at the value at which it changes nothing."""

WITHOUT_EFFECT = "GenerationConfig is invalid:"
"""How Transformers begins its refusal of settings that it would use, and that have no effect."""

MODES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")
"""Settings that decide which of the others have an effect."""


def warping_settings(config: GenerationConfig) -> dict[str, Any]:
    """What in this config would change the distribution that tokens are drawn from; False asks for nothing.

    Example:
        >>> warping_settings(GenerationConfig(repetition_penalty=1.1, top_k=20, eos_token_id=2, do_sample=True))
        {'repetition_penalty': 1.1, 'top_k': 20}
    """
    found = {name: getattr(config, name, None) for name in NEUTRAL if name not in MODES}
    return {name: value for name, value in found.items() if value not in (None, NEUTRAL[name]) and value is not False}


def make_savable(config: GenerationConfig) -> dict[str, Any]:
    """Reset what Transformers will not save: settings without an effect in the mode that others choose, such as a temperature
    with `do_sample=False`. What `generate` does with the config stays the same.

    Returns:
        What was reset, with its values.

    Raises:
        ConfigError: it cannot be saved for another reason.

    Example:
        >>> config = GenerationConfig(do_sample=False)
        >>> config.temperature = 0.6
        >>> make_savable(config), config.temperature
        ({'temperature': 0.6}, None)
    """
    if _fault(config) is None:
        return {}
    modes = {name: getattr(config, name, None) for name in MODES}
    reset = {}
    for name in sorted(KNOWN - set(MODES)):
        value, probe = getattr(config, name, None), GenerationConfig()
        for setting, chosen in {**modes, name: value}.items():
            setattr(probe, setting, chosen)
        if str(_fault(probe)).startswith(WITHOUT_EFFECT):
            reset[name] = value
            setattr(config, name, None)
    fault = _fault(config)
    if fault is not None:
        raise ConfigError(f"the student's generation config cannot be saved: {fault}")
    return reset


def _fault(config: GenerationConfig) -> str | None:
    """Why Transformers refuses to save this config; None where it does not."""
    try:
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        return " ".join(str(error).split())[:300]
    return None
