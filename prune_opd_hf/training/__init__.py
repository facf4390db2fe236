"""Training: the settings, the trainer, and the record a run leaves."""

from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.evaluate_student import Completion
from prune_opd_hf.training.trainer import PruneOPDTrainer

__all__ = ["Completion", "PruneOPDConfig", "PruneOPDTrainer", "TrainingSummary"]
