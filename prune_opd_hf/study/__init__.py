"""`prune-opd study`: controls for drift pruning. Several arms, several seeds, one evaluation, one verdict.

study_settings.py     what is compared: arms, seeds, budgets
learning_curve.py     accuracy against what training had spent
arm_training.py       trains one arm with one seed under the budgets, in a process of its own
run_study.py          trains all arms, side by side where there are cores; continues after a kill
study_report.py       intervals over seeds, paired differences, the verdict
study_page.py         the report as Markdown, and its figures
demo.py               `prune-opd demo`: a study of two arms on the embedded task, with saved students
"""

from prune_opd_hf.study.run_study import run_study
from prune_opd_hf.study.study_report import StudyReport
from prune_opd_hf.study.study_settings import ArmSettings, StudySettings

__all__ = ["ArmSettings", "StudyReport", "StudySettings", "run_study"]
