"""The command line of the demo: `prune-opd demo`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.records.folders import check_folder
from prune_opd_hf.records.settings import setting


@dataclass(frozen=True)
class DemoArguments:
    """Arguments of `prune-opd demo`."""

    seconds: float = setting(40.0, "Training seconds of each of the two students (they train side by side).")
    seed: int = setting(0, "Seed of prompts, rollouts and evaluation.")
    output_dir: str = setting("runs/demo", "Folder for everything; must not exist.")
    device: Literal["cpu", "cuda"] = setting("cpu", "Where to train.")
    evaluation_problems: int = setting(512, "Fresh problems of the final evaluation.")

    def __post_init__(self) -> None:
        check_folder(self.output_dir)
        if Path(self.output_dir).exists():
            raise ConfigError(f"the folder {self.output_dir} exists already: remove it or choose another --output_dir")


def demo(arguments: DemoArguments) -> int:
    """Run the demo; returns the exit code, 0."""
    import torch

    from prune_opd_hf.study.demo import run_demo

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch finds no CUDA device here; use cpu")
    run_demo(**vars(arguments))
    return 0
