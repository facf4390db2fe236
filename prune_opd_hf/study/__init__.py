"""`prune-opd study`: controls for drift pruning. Several arms, several seeds, one path of evaluation, one verdict.

settings.py   what is compared: arms, seeds, budgets
worker.py     trains one arm with one seed in a process of its own
run.py        runs all of them, side by side where there are cores; continues after a kill
report.py     intervals over seeds, paired differences, the verdict, as Markdown and JSON
drawing.py    the figures, each with its numbers
"""

from prune_opd_hf.study.report import StudyReport
from prune_opd_hf.study.run import run_study
from prune_opd_hf.study.settings import ArmSettings, StudySettings

__all__ = ["ArmSettings", "StudyReport", "StudySettings", "run_study"]
