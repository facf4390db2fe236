"""`prune-opd`: one command, its subcommands, and what it says when something is wrong: one line, exit code 2.

Thin: every subcommand parses its arguments into a frozen record and calls the library. Subcommands are imported when they
are called, so that `--help` is quick.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from prune_opd_hf.errors import ConfigError, PruneOPDError

COMMANDS = {
    "demo": "train, evaluate and save a small student on this machine, in minutes and without a download",
    "preflight": "do a student and a teacher fit, what would pruning save, and with which settings?",
    "train": "distil a teacher into a student: --config FILE.yaml, every field also on the command line",
    "evaluate": "answer benchmarks and grade the answers, with intervals and everything needed to repeat it",
    "report": "show an evaluation report, or compare two: is the difference larger than the noise?",
    "study": "train with and without pruning, with fixed and random lengths, over several seeds, and compare: --config FILE.yaml",
    "view": "show stored rollouts in one HTML file: text tinted by overlap, events, candidates",
    "publish": "put a trained student on the Hub: weights, card and reports in one commit",
    "download": "fetch a published student, check it, and show its records",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `prune-opd`.

    Returns:
        0, or 2 where an argument, a file or the data cannot be worked with.

    Example:
        >>> main(["--version"])
        prune-opd 0.1.0
        0
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        from prune_opd_hf import __version__

        print(f"prune-opd {__version__}")
        return 0
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise ConfigError(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
        return _command(name)(rest)
    except PruneOPDError as error:
        return _fail(str(error))
    except FileNotFoundError as error:
        return _fail(f"no such file: {error.filename}" if error.filename else str(error))
    except OSError as error:  # what Transformers and the Hub's client raise for models and files that are not there
        return _fail(str(error).strip().splitlines()[0])
    except KeyboardInterrupt:
        print("prune-opd: interrupted", file=sys.stderr)
        return 130


def _command(name: str) -> Callable[[list[str]], int]:
    return {
        "demo": _demo,
        "preflight": _preflight,
        "train": _train,
        "evaluate": _evaluate,
        "report": _report,
        "study": _study,
        "view": _view,
        "publish": _publish,
        "download": _download,
    }[name]


def _demo(arguments: list[str]) -> int:
    from prune_opd_hf.cli.demo import DemoArguments, demo

    return demo(parse(DemoArguments, arguments, "demo"))


def _preflight(arguments: list[str]) -> int:
    from prune_opd_hf.cli.preflight import PreflightArguments, run

    return run(parse(PreflightArguments, arguments, "preflight"))


def _train(arguments: list[str]) -> int:
    from prune_opd_hf.cli.train import main as train

    return train(arguments)


def _evaluate(arguments: list[str]) -> int:
    from prune_opd_hf.cli.evaluate import EvaluateArguments, evaluate

    return evaluate(parse(EvaluateArguments, arguments, "evaluate", first="model"))


def _report(arguments: list[str]) -> int:
    from prune_opd_hf.cli.evaluate import report

    return report(arguments)


def _study(arguments: list[str]) -> int:
    from prune_opd_hf.cli.study import StudyArguments, study

    return study(parse(StudyArguments, arguments, "study"))


def _view(arguments: list[str]) -> int:
    from prune_opd_hf.cli.view import ViewArguments, view

    return view(parse(ViewArguments, arguments, "view", first="rollouts"))


def _publish(arguments: list[str]) -> int:
    from prune_opd_hf.cli.publish import PublishArguments, publish

    return publish(parse(PublishArguments, arguments, "publish", first="folder"))


def _download(arguments: list[str]) -> int:
    from prune_opd_hf.cli.publish import DownloadArguments, download

    return download(parse(DownloadArguments, arguments, "download", first="repo_id"))


def parse(record: type, arguments: list[str], command: str, first: str | None = None) -> Any:
    """Arguments of one subcommand as its record.

    Args:
        record: a dataclass; its fields are the options.
        arguments: what follows the subcommand.
        command: the subcommand.
        first: the option that may also come first without its name.

    Raises:
        SystemExit: with code 2 and one line on standard error for arguments that do not fit, with code 0 after `--help`.
        PruneOPDError: the record refuses a value.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            sys.exit(_fail(f"{message} (see {self.prog} --help)"))

    if first is not None and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{first}", *arguments]
    parser = Parser(record, prog=f"prune-opd {command}", allow_abbrev=False, description=COMMANDS[command])
    return record(**vars(parser.parse_args(arguments)))


def _fail(message: str) -> int:
    print(f"prune-opd: error: {message}", file=sys.stderr)
    return 2


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: prune-opd COMMAND [ARGUMENTS]",
            "",
            "On-policy distillation that stops where teacher and student drift apart.",
            "",
            *lines,
            "",
            "prune-opd COMMAND --help explains every argument.",
        ]
    )
