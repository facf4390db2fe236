"""Generation under a teacher's eye: the drift monitor and its two drivers.

`pair.py` plugs the monitor into plain `model.generate`; `loop.py` decodes and drops finished rows. What both call
(`DriftMonitor.open / watch / take / end_rows / stopped / settle / finish`) is the seam for any other decoding loop.
"""

from prune_opd_hf.generation.hooks import DriftStoppingCriteria, StudentTopKLogitsProcessor
from prune_opd_hf.generation.loop import pruned_generate
from prune_opd_hf.generation.monitor import DriftMonitor, DriftProgress

__all__ = ["DriftMonitor", "DriftProgress", "DriftStoppingCriteria", "StudentTopKLogitsProcessor", "pruned_generate"]
