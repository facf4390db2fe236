"""What a user can choose about the demo, and the training settings that follow from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.tasks import ChainTask

ARMS = {"none": "OPD", "drift": "Prune-OPD"}
"""The two students of the demo: value of `pruning` and the name in tables."""

CAP_TOKENS = 112
"""Longest response: that of the task's longest trace, rounded up."""


@dataclass(frozen=True)
class DemoArguments:
    """Arguments of `prune-opd demo`.

    Raises:
        ConfigError: a value outside its range, an output folder that exists already, or a device that is not there.
    """

    seconds: float = field(
        default=40.0, metadata={"help": "Training seconds of each of the two students (they train side by side)."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of prompts, rollouts and evaluation."})
    output: str = field(default="runs/demo", metadata={"help": "Folder for everything; must not exist."})
    device: str = field(default="cpu", metadata={"help": "Where to train: cpu or cuda."})
    evaluation_problems: int = field(default=512, metadata={"help": "Fresh problems of the final evaluation."})

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ConfigError(f"--seconds must be above 0, got {self.seconds}")
        if self.seed < 0:
            raise ConfigError(f"--seed must be at least 0, got {self.seed}")
        if self.evaluation_problems < 1:
            raise ConfigError(f"--evaluation-problems must be at least 1, got {self.evaluation_problems}")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"--device must be cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu")
        if Path(self.output).exists():
            raise ConfigError(
                f"the output folder {self.output} exists already: remove it or choose another with --output"
            )


def training_settings(pruning: str, seed: int, device: str, output_dir: str) -> dict[str, Any]:
    """Arguments of `PruneOPDConfig` for one student; the two differ in nothing but `pruning`.

    The drift settings suit a vocabulary of 64, where a large top-k is mostly noise: top 2 at 0.5, and a tenth of the
    reliability for each event. The published settings (top 16 at 0.7, 0.01) are for real vocabularies.
    """
    return {
        "output_dir": output_dir,
        "pruning": pruning,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": device == "cpu",
        "learning_rate": 2e-4,
        "max_steps": 100_000,  # the clock ends the run
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 256,
        "num_generations": 1,
        "max_prompt_length": ChainTask().prompt_tokens,
        "max_completion_length": CAP_TOKENS,
        "budget_initial": CAP_TOKENS,
        "budget_minimum": 16,
        "budget_step": 16,
        "budget_margin": 16,
        "drift_top_k": 2,
        "drift_threshold": 0.5,
        "drift_weight_drop": 0.25,
        "drift_min_length": 0,
        "check_every": 8,
        "loss_top_k": 16,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
