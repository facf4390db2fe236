"""The entry point of the decoding loop as a Hub repository: `model.generate(..., custom_generate="owner/name")`.

`generate_repository` puts this file there as `custom_generate/generate.py`, beside the modules that it imports.
"""

from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig

from prune_opd_hf.algorithm.drift import DriftConfig
from prune_opd_hf.generation.loop import pruned_generate
from prune_opd_hf.generation.monitor import DriftMonitor


def generate(
    model: Any,
    teacher_model: Any = None,
    drift: "Mapping[str, Any] | None" = None,
    check_every: int = 32,
    return_rollouts: bool = False,
    **arguments: Any,
) -> Any:
    """Greedy decoding or sampling that drops rows as they finish, and stops those that drift from what a teacher says.

    Args:
        model: the student; `generate` passes itself.
        teacher_model: a causal LM with the student's vocabulary, or the Hub id or folder of one. None drops finished rows only.
        drift: settings of `DriftConfig`: metric, top_k, threshold, weight_drop, min_length.
        check_every: tokens between two passes of the teacher.
        return_rollouts: also return the record of who drifted where.
        arguments: everything else that `generate` takes.

    Returns:
        What `generate` returns, or with `return_rollouts` a pair of that and the `Rollouts`.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, eos_token_id=1, pad_token_id=0)
        >>> student, teacher = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config)
        >>> sequences, rollouts = generate(student, teacher, drift={"top_k": 4}, return_rollouts=True,
        ...                                inputs=torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)
        >>> len(rollouts), sequences.shape[1] <= 6
        (1, True)
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if teacher_model is None:
        if return_rollouts:
            raise ValueError("return_rollouts needs a teacher_model: without one nothing is recorded")
        return model.generate(**given, custom_generate=pruned_generate)
    if isinstance(teacher_model, str):
        teacher_model = AutoModelForCausalLM.from_pretrained(teacher_model, dtype=model.dtype).to(model.device)
    settings: GenerationConfig = given.get("generation_config", model.generation_config)
    ends = given.get("eos_token_id", settings.eos_token_id)
    monitor = DriftMonitor(teacher_model, DriftConfig(**(drift or {})), check_every=check_every, eos_token_id=ends)
    output = model.generate(**given, custom_generate=pruned_generate, drift_monitor=monitor)
    if not return_rollouts:
        return output
    return output, monitor.finish(output if not hasattr(output, "sequences") else output.sequences)
