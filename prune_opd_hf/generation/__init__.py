"""The rollout engines, and the drift watch over what they sample."""

from typing import Any

import torch
from torch import nn

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.generation.compiled_step import StepCompiler
from prune_opd_hf.generation.continuous_batching import IS_WATCHABLE, ContinuousBatchingEngine
from prune_opd_hf.generation.engine import Completion, Request, RolloutEngine, Sampling
from prune_opd_hf.generation.loop import LoopEngine, pruned_generate
from prune_opd_hf.generation.monitor import DriftMonitor, DriftStoppingCriteria, StudentTopKLogitsProcessor
from prune_opd_hf.generation.sampling_copy import SamplingCopy
from prune_opd_hf.generation.vllm.colocated import VLLMColocatedEngine
from prune_opd_hf.generation.vllm.protocol import VLLMSettings
from prune_opd_hf.generation.vllm.server import VLLMServerEngine
from prune_opd_hf.generation.watch import DriftWatch
from prune_opd_hf.generation.watch_settings import DriftProgress
from prune_opd_hf.models.slot_cache import has_slots
from prune_opd_hf.teachers.base import CAPABILITIES, Teacher, require

ENGINES = ("auto", "loop", "continuous_batching", "vllm")
"""Who may sample. "auto": continuous batching on an accelerator where the models and the sampling allow it, the loop elsewhere."""


def make_engine(
    name: str,
    model: nn.Module,
    sampling: Sampling,
    *,
    slots: int,
    teacher: Teacher | None = None,
    vllm: VLLMSettings = VLLMSettings(),
    dtype: str | None = None,
    compile_decoding: bool = False,
) -> RolloutEngine:
    """The engine of this name.

    Args:
        name: one of `ENGINES`.
        model: the student.
        sampling: how to sample.
        slots: rows decoded at a time, where an engine does not size itself.
        teacher: whose watch observes it, if one does.
        vllm: where vLLM runs, if it is it.
        dtype: of a copy of the weights that the loop samples with, such as "bfloat16"; None samples with the model itself.
        compile_decoding: whether the loop's decoding step is compiled.
    """
    name = resolve_engine(name, model, teacher, sampling)
    if name == "loop":
        sampling_copy = SamplingCopy(getattr(torch, dtype)) if dtype else None
        compiler = StepCompiler() if compile_decoding else None
        return LoopEngine(model, sampling, slots=slots, sampling_copy=sampling_copy, compiler=compiler)
    if teacher is not None:
        require(teacher, "ragged_rows", f"the engine {name!r}", "use the engine 'loop'")
    if name == "vllm":
        candidates = 0 if teacher is None else teacher.top_k
        engine = VLLMServerEngine if vllm.mode == "server" else VLLMColocatedEngine
        return engine(model, sampling, slots=slots, candidates=candidates, settings=vllm)
    if teacher is not None and not has_slots(model):  # the student's side is scored in blocks, as the teacher's is
        raise ConfigError(
            f"the engine {name!r} needs a student that {CAPABILITIES['ragged_rows']}, and {type(model).__name__} does not: "
            "use the engine 'loop'"
        )
    return ContinuousBatchingEngine(model, sampling)


def resolve_engine(name: str, model: Any, teacher: Teacher | None = None, sampling: Sampling | None = None) -> str:
    """The engine that "auto" means here; any other name as it is."""
    if name == "continuous_batching" and teacher is not None and not IS_WATCHABLE:
        raise ConfigError(
            f"the engine {name!r} can be watched with transformers>=5.19: update it, or use the engine 'loop'"
        )
    if name != "auto":
        return name
    scores = teacher is None or (IS_WATCHABLE and teacher.capabilities.ragged_rows and has_slots(model))
    follows = sampling is None or not sampling.beyond_warpers()
    return "continuous_batching" if model.device.type == "cuda" and scores and follows else "loop"


__all__ = [
    "ENGINES",
    "Completion",
    "ContinuousBatchingEngine",
    "DriftMonitor",
    "DriftProgress",
    "DriftStoppingCriteria",
    "DriftWatch",
    "LoopEngine",
    "Request",
    "RolloutEngine",
    "Sampling",
    "StudentTopKLogitsProcessor",
    "VLLMSettings",
    "make_engine",
    "pruned_generate",
    "resolve_engine",
]
