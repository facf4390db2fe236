"""Does agreement say where the signal is? Diagnostics of that premise on stored rollouts, with any pair of models.

statistics.py  rank correlation and AUC with intervals that know tokens of one rollout belong together
scores.py      every drift metric as a score of each token
labels.py      of the embedded task: which tokens are clean, wrong, or drift
gradients.py   per-token gradients, and how they point along a reference gradient
signals.py     spread of the reward, the teacher's entropy, its probability of the gold continuation
report.py      all of it together: correlations, by position, by events so far, and the cases that do not fit
"""

from prune_opd_hf.diagnostics.report import DiagnosticsReport, diagnose

__all__ = ["DiagnosticsReport", "diagnose"]
