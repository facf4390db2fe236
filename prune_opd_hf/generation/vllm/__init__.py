"""vLLM as a rollout engine: on servers, or in this process."""

from torch import nn

from prune_opd_hf.generation.engine import Sampling
from prune_opd_hf.generation.vllm.colocated import VLLMColocatedEngine
from prune_opd_hf.generation.vllm.protocol import MODES, VLLMSettings
from prune_opd_hf.generation.vllm.server import VLLMServerEngine

__all__ = ["MODES", "VLLMColocatedEngine", "VLLMServerEngine", "VLLMSettings", "vllm_engine"]


def vllm_engine(
    model: nn.Module, sampling: Sampling, *, slots: int, candidates: int, settings: VLLMSettings
) -> VLLMServerEngine | VLLMColocatedEngine:
    """The engine that the settings ask for."""
    if settings.mode == "server":
        return VLLMServerEngine(model, sampling, slots=slots, candidates=candidates, settings=settings)
    return VLLMColocatedEngine(model, sampling, slots=slots, candidates=candidates, settings=settings)
