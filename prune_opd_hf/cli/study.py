"""The command line of studies: `prune-opd study --config FILE.yaml`."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from prune_opd_hf.cli.parser import QuietArguments
from prune_opd_hf.records.files import publishable
from prune_opd_hf.records.settings import NEEDED, setting


@dataclass(frozen=True)
class StudyArguments(QuietArguments):
    """Arguments of `prune-opd study`."""

    config: str = setting(NEEDED, "YAML file of the study; see examples/configs/study_embedded.yaml.")
    output_dir: str = setting("runs/study", "Report, figures and finished runs go here; a killed study continues here.")
    processes: int | None = setting(None, "Runs at a time; by default what the config says.")


def study(arguments: StudyArguments) -> int:
    """Run the study, print its verdict, and say where the report lies; returns the exit code, 0."""
    from prune_opd_hf.study import StudySettings, run_study

    settings = StudySettings.load(arguments.config)
    if arguments.processes is not None:
        settings = replace(settings, processes=arguments.processes)
    config, output_dir = (
        publishable(path).removesuffix(" (local)") for path in (arguments.config, arguments.output_dir)
    )
    command = shlex.join(["prune-opd", "study", "--config", config, "--output_dir", output_dir])
    console = Console(quiet=arguments.quiet, soft_wrap=True)
    report = run_study(settings, arguments.output_dir, command=command, console=console)
    print("\n".join(report.verdict))
    print(f"The report lies in {Path(arguments.output_dir) / 'README.md'}")
    return 0
