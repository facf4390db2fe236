"""`model.generate(..., custom_generate="OWNER/NAME", trust_remote_code=True)`: decoding that stops where the student drifts.

To publish it: `hf upload OWNER/NAME examples/generate_repository`.
"""

from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig

from prune_opd_hf import DriftConfig, DriftMonitor, pruned_generate


def generate(
    model: Any,
    teacher_model: Any = None,
    drift: "Mapping[str, Any] | None" = None,
    check_every: int = 32,
    return_rollouts: bool = False,
    **arguments: Any,
) -> Any:
    """Greedy decoding or sampling with row compaction; rows that drift from what a teacher says are stopped.

    Args:
        model: the student; `generate` passes itself.
        teacher_model: a causal LM with the student's vocabulary, or the Hub id or folder of one; None removes finished rows only.
        drift: settings of `DriftConfig`: metric, top_k, threshold, weight_drop, min_length.
        check_every: tokens between two passes of the teacher.
        return_rollouts: also return the record of who drifted where.
        arguments: everything else that `generate` takes.

    Returns:
        What `generate` returns; with `return_rollouts` a pair of that and the `Rollouts`.
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
