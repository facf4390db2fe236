"""Who samples tokens, and the watch over them.

engine.py               requests, completions, and what an engine and a watch are to each other
loop.py                 the decoding loop: continuous batching with row compaction; `pruned_generate`, `LoopEngine`
continuous_batching.py  Transformers' own continuous batching
monitor.py              `DriftMonitor` and its two hooks beside plain `generate`
watch.py                the state of one generation, from tokens to a record of drift
"""

from prune_opd_hf.generation.continuous_batching import ContinuousBatchingEngine
from prune_opd_hf.generation.engine import Completion, Request, RolloutEngine, Sampling, Watch
from prune_opd_hf.generation.loop import LoopEngine, pruned_generate
from prune_opd_hf.generation.monitor import DriftMonitor, DriftStoppingCriteria, StudentTopKLogitsProcessor
from prune_opd_hf.generation.watch import DriftProgress, DriftWatch

ENGINES: dict[str, type[LoopEngine] | type[ContinuousBatchingEngine]] = {
    "loop": LoopEngine,
    "continuous_batching": ContinuousBatchingEngine,
}
"""Every rollout engine by its name: ENGINES[name](model, sampling, slots=...)."""

ROLLOUT_ENGINES = {name: engine for name, engine in ENGINES.items() if engine.takes_watch}
"""Those that a trainer may sample with."""

__all__ = [
    "ENGINES",
    "ROLLOUT_ENGINES",
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
    "Watch",
    "pruned_generate",
]
