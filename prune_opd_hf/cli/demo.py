"""The command line of the demo: `prune-opd demo`."""

from dataclasses import dataclass, field
from pathlib import Path

from prune_opd_hf.errors import ConfigError


@dataclass(frozen=True)
class DemoArguments:
    """Arguments of `prune-opd demo`.

    Raises:
        ConfigError: a value outside its range, or an output folder that exists already.
    """

    seconds: float = field(
        default=40.0, metadata={"help": "Training seconds of each of the two students (they train side by side)."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of prompts, rollouts and evaluation."})
    output_dir: str = field(default="runs/demo", metadata={"help": "Folder for everything; must not exist."})
    device: str = field(default="cpu", metadata={"help": "Where to train: cpu or cuda."})
    evaluation_problems: int = field(default=512, metadata={"help": "Fresh problems of the final evaluation."})

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ConfigError(f"seconds must be above 0, got {self.seconds}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")
        if self.evaluation_problems < 1:
            raise ConfigError(f"evaluation_problems must be at least 1, got {self.evaluation_problems}")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, got {self.device!r}")
        if Path(self.output_dir).exists():
            raise ConfigError(f"the folder {self.output_dir} exists already: remove it or choose another --output_dir")


def demo(arguments: DemoArguments) -> int:
    """Run the demo.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: no CUDA device for `device` cuda.
        PruneOPDError: as `run_demo`.
    """
    import torch

    from prune_opd_hf.study.demo import run_demo

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch finds no CUDA device here; use cpu")
    run_demo(**vars(arguments))
    return 0
