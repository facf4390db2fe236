"""vLLM as a rollout engine: on servers, or in this process."""

from prune_opd_hf.generation.vllm.protocol import MODES

__all__ = ["MODES"]
