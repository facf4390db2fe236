"""`prune-opd preflight`: do this teacher and this student fit, what would pruning save, and with which settings?

compatibility.py  tokenizers, special tokens, chat templates, ends, contexts: before anything is generated
memory.py         what a training step holds, from the models' shapes
cost.py           seconds of a step as a function of its tokens, fitted to one generation
measuring.py      one set of unpruned rollouts, and how long everything took
grid.py           other metrics, thresholds and drops on the same rollouts, and which of them to take
report.py         the findings: text, JSON
drawing.py        the figures
run.py            everything above, from one set of unpruned rollouts
"""

from prune_opd_hf.preflight.report import PreflightReport
from prune_opd_hf.preflight.run import preflight

__all__ = ["PreflightReport", "preflight"]
