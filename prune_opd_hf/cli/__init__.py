"""`prune-opd`: one command, its subcommands, and what it says when something is wrong: one line, exit code 2.

parser.py   the parser of every command; each other file is a command: frozen dataclasses of its arguments, and what it does

A command's module is imported when the command is called, and what it needs of torch and models when it runs, so that help and
mistyped arguments need not wait for them. `train` has the fields of Transformers' TrainingArguments and does wait.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from inspect import signature

from prune_opd_hf import __version__
from prune_opd_hf.cli.parser import fail, parse
from prune_opd_hf.errors import PruneOPDError
from prune_opd_hf.records.files import first_line, printable


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        help: what it does, in one line.
        function: where it is, as module:name. It takes a dataclass of arguments, or the words themselves.
        positional: fields that may come first without their names.
        interrupted: what becomes of the work after Ctrl-C, where the command does not say it itself.
    """

    help: str
    function: str
    positional: tuple[str, ...] = ()
    interrupted: str = ""


GOES_ON = "what is done is kept; the same command goes on from there"

COMMANDS = {
    "demo": Command(
        "train, evaluate and save a small student on this machine, in minutes and without a download",
        "cli.demo:demo",
    ),
    "preflight": Command(
        "do a student and a teacher fit, what would pruning save, and with which settings?", "cli.preflight:run"
    ),
    "train": Command(
        "distil a teacher into a student: --config FILE.yaml, every field also on the command line",
        "cli.train:main",
    ),
    "evaluate": Command(
        "answer benchmarks and grade the answers, with intervals and everything needed to repeat it",
        "cli.evaluate:evaluate",
        ("model",),
        interrupted=GOES_ON,
    ),
    "report": Command(
        "show an evaluation report, or compare two: is the difference larger than the noise?",
        "cli.evaluate:report",
        ("action", "report", "other"),
    ),
    "study": Command(
        "train with and without pruning, with fixed and random lengths, over several seeds, and compare: --config FILE.yaml",
        "cli.study:study",
        interrupted=GOES_ON,
    ),
    "view": Command(
        "show stored rollouts in one HTML file: text tinted by overlap, events, candidates",
        "cli.view:view",
        ("rollouts",),
    ),
    "merge": Command(
        "add an adapter's weights to its base's: a plain student, for whatever knows no adapters",
        "cli.merge:merge",
        ("adapter",),
    ),
    "publish": Command(
        "put a trained student on the Hub: weights, card and reports in one commit", "cli.publish:publish", ("folder",)
    ),
    "download": Command(
        "fetch a published student, check it, and show its records", "cli.publish:download", ("repo_id",)
    ),
    "env": Command("versions, devices, and what is optional and missing, for bug reports", "cli.env:env"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `prune-opd`: 0, or 2 where an argument, a file or the data cannot be worked with, 130 after Ctrl-C, and 141
    where nobody reads the output any more, as with `| head`.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        prune-opd ...
        0
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        try:
            return _run(name, rest)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        return 141
    except FileNotFoundError as error:
        return fail(f"no such file: {error.filename}" if error.filename else str(error))
    except PruneOPDError as error:
        return fail(str(error))
    except OSError as error:  # what Transformers and the Hub's client raise for models and files that are not there
        return fail(first_line(error))
    except KeyboardInterrupt as interrupt:
        further = str(interrupt) or COMMANDS[name].interrupted
        print(f"prune-opd: interrupted{': ' if further else ''}{printable(further)}", file=sys.stderr)
        return 130


def _run(name: str, arguments: list[str]) -> int:
    if name in ("-h", "--help", "--version"):
        print(f"prune-opd {__version__}" if name == "--version" else _help())
        return 0
    if name not in COMMANDS:
        return fail(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    module, _, function = command.function.partition(":")
    run = getattr(import_module(f"prune_opd_hf.{module}"), function)
    record = signature(run).parameters["arguments"].annotation
    if not (isinstance(record, type) and is_dataclass(record)):
        return run(arguments)
    if not fields(record) and not arguments:  # without the parser, whose Transformers may be what is broken
        return run(record())
    return run(*parse([record], arguments, name, description=command.help, positional=command.positional))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
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
