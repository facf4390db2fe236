"""The command line of studies: `prune-opd study --config FILE.yaml`."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from prune_opd_hf.records.files import publishable


@dataclass(frozen=True)
class StudyArguments:
    """Arguments of `prune-opd study`."""

    config: str = field(metadata={"help": "YAML file of the study; see examples/configs/study_embedded.yaml."})
    output_dir: str = field(
        default="runs/study",
        metadata={"help": "Report, figures and finished runs go here; a killed study continues here."},
    )
    processes: int | None = field(default=None, metadata={"help": "Runs at a time; by default what the config says."})


def study(arguments: StudyArguments) -> int:
    """Run the study, print its verdict, and say where the report lies.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError, FileNotFoundError, PruneOPDError: as `run_study`.
    """
    from rich.console import Console

    from prune_opd_hf.study import StudySettings, run_study

    settings = StudySettings.load(arguments.config)
    if arguments.processes is not None:
        settings = replace(settings, processes=arguments.processes)
    console = Console()
    command = f"prune-opd study --config {_shown(arguments.config)} --output_dir {_shown(arguments.output_dir)}"
    report = run_study(settings, arguments.output_dir, command=command, console=console)
    for line in report.verdict:
        console.print(line, highlight=False, markup=False)
    console.print(
        f"The report lies in {Path(arguments.output_dir) / 'README.md'}", highlight=False, markup=False, soft_wrap=True
    )
    return 0


def _shown(path: str) -> str:
    return publishable(path).removesuffix(" (local)")
