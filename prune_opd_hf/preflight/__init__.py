"""`prune-opd preflight`: do this teacher and this student fit, what would pruning save, and with which settings?

pair_checks.py       tokenizers, special tokens, chat templates, end tokens, contexts; how the first rollouts end
replay.py            what other drift settings would have made of stored rollouts
step_cost.py         one set of unpruned rollouts, the seconds of a step fitted to it, and the memory that a step holds
settings_grid.py     other metrics, thresholds and drops on the same rollouts, and which of them to take
preflight_report.py  the findings: text, JSON, figures
run_preflight.py     `preflight`: all of this from one set of unpruned rollouts
"""

import sys
from types import ModuleType

from prune_opd_hf.preflight.preflight_report import PreflightReport
from prune_opd_hf.preflight.run_preflight import preflight

__all__ = ["PreflightReport", "preflight"]


class _CallableRoom(ModuleType):
    """`prune_opd_hf.preflight` names this package and the public function: the package can be called as the function."""

    __call__ = staticmethod(preflight)


sys.modules[__name__].__class__ = _CallableRoom
