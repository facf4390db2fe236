"""vLLM as a rollout engine: on servers, or in this process.

protocol.py        settings, sampling parameters and candidates in vLLM's words
base.py            what both engines have in common
server.py          servers: set-up, what is asked and how answers read
server_streams.py  the requests of one `generate`: back-pressure, and what is done about faults
server_weights.py  the weights that servers hold
colocated.py       `vllm.LLM` in this process
weights.py         the student's weights on disk
same_model.py      does vLLM sample with what it was sent?
"""

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
