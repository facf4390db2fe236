"""`prune-opd publish` and `prune-opd download`: arguments in, lines for people out.

The records' fields are the command line's options; the first of each is also taken without its name
(`prune-opd publish runs/student --repo-id me/student`). Errors are raised; the command line prints them in one line.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_opd_hf.cli.parser import QuietArguments
from prune_opd_hf.errors import ConfigError, HubError
from prune_opd_hf.records.evaluation_report import EvaluationReport
from prune_opd_hf.records.files import printable
from prune_opd_hf.records.folders import refuse_used_folder
from prune_opd_hf.records.settings import NEEDED, setting
from prune_opd_hf.records.student_records import StudentRecords, load_reports
from prune_opd_hf.records.training_summary import TrainingSummary

if TYPE_CHECKING:
    from prune_opd_hf.hub import Retries


@dataclass(frozen=True)
class PublishArguments(QuietArguments):
    """Put a trained student on the Hub: weights, tokenizer, card, reports and training summary in one commit."""

    folder: str = setting(NEEDED, "Folder that the student was saved to.")
    repo_id: str = setting(NEEDED, "Where to: OWNER/NAME.")
    private: bool = setting(False, "Create the repository so that only its owner sees it.")
    create_pr: bool = setting(False, "Propose the change to an existing repository as a pull request.")
    revision: str = setting("main", "Branch; created from main if it is not there.")
    tag: str | None = setting(None, "Name for the commit, such as v1.")
    commit_message: str = setting("Publish student", "First line of the commit message.")
    reports: list[str] = setting(
        [], "Evaluation reports of this student: files or folders. Default: those in FOLDER/evaluation."
    )
    compare: list[str] = setting(
        [], "Reports of other models for the card's table: NAME=FILE, for example teacher=teacher.json."
    )
    license: str | None = setting(
        None, "The Hub's short name, such as apache-2.0. Default: that of the base model, if it has one."
    )
    license_name: str | None = setting(None, "With --license other: the licence's name.")
    license_link: str | None = setting(None, "With --license other: a link to its text.")
    base_model: str | None = setting(None, "The Hub id of the base model, where training took it from a folder.")
    teacher_model: str | None = setting(None, "The Hub id of the teacher, likewise.")
    language: str | None = setting(None, "Of prompts and answers, such as en.")
    example_prompt: str | None = setting(None, "What the card's usage snippet asks.")
    limitations: list[str] = setting([], "Sentences to add to the card's limitations.")
    dry_run: bool = setting(False, "Check everything and write the folder, but upload nothing.")
    output_dir: str = setting("runs/publish", "With --dry-run: where the folder is written to.")

    def __post_init__(self) -> None:
        if self.license is None and (self.license_name or self.license_link):
            raise ConfigError("--license-name and --license-link go with --license other")


@dataclass(frozen=True)
class DownloadArguments(QuietArguments):
    """Fetch a published student and check it; only safetensors and texts are fetched, and nothing is executed."""

    repo_id: str = setting(NEEDED, "Which: OWNER/NAME.")
    revision: str = setting("main", "Branch, tag, commit, or pull request (refs/pr/1).")
    output_dir: str | None = setting(None, "Folder to write to. Default: the Hub's cache.")


def publish(arguments: PublishArguments, retries: "Retries | None" = None) -> int:
    """Publish, or with `dry_run` write what would be published, and say where it is; `retries` as for `publish_student`."""
    from huggingface_hub import HfApi, get_token

    from prune_opd_hf.hub import CardOptions, License, Retries, Target, build_bundle, publish_student
    from prune_opd_hf.hub.publish import with_license

    target = Target(
        arguments.repo_id,
        private=arguments.private,
        create_pr=arguments.create_pr,
        revision=arguments.revision,
        tag=arguments.tag,
        commit_message=arguments.commit_message,
    )
    records = _records(arguments)
    license = None
    if arguments.license is not None:
        license = License(arguments.license, name=arguments.license_name, link=arguments.license_link)
    options = CardOptions(
        license=license,
        example_prompt=arguments.example_prompt,
        limitations=tuple(arguments.limitations),
        language=arguments.language,
    )
    if arguments.dry_run:
        place = Path(arguments.output_dir) / target.repo_id.split("/")[1]
        refuse_used_folder(place, "remove it, or choose another --output_dir")
        with contextlib.suppress(HubError):  # a dry run needs no network
            once = Retries(attempts=1, timeout_seconds=10.0)
            options = with_license(options, arguments.folder, records, HfApi(), once)
        bundle = build_bundle(
            arguments.folder, repo_id=target.repo_id, records=records, options=options, token=get_token()
        )
        bundle.save(place)
        print(bundle.describe())
        print(f"dry run: nothing was uploaded; the folder is {place}")
        return 0
    chosen: dict[str, Any] = {"retries": retries} if arguments.quiet else {"retries": retries, "show": print}
    published = publish_student(arguments.folder, target, records=records, options=options, **chosen)
    what = "was there already" if published.found else "is published"
    print(f"{arguments.repo_id} {what}: {published.url} (commit {published.commit_id})")
    return 0


def download(arguments: DownloadArguments, retries: "Retries | None" = None) -> int:
    """Download, and say what came; `retries` as for `download_student`."""
    from prune_opd_hf.hub import download_student

    student = download_student(
        arguments.repo_id, revision=arguments.revision, folder=arguments.output_dir, retries=retries
    )
    facts = student.facts
    print(f"{facts.architecture}, {facts.parameters:,} parameters, {facts.dtype}, weights {student.model_hash[:19]}")
    training = student.records.training
    if training is not None:
        _print(f"trained: {training.steps} steps, pruning {training.pruning}, teacher {training.teacher or 'unknown'}")
    for report in student.records.reports:
        _print(report.to_markdown())
    for doubt in student.doubts:
        _print(f"warning: {doubt}")
    print(f"{arguments.repo_id} at {student.commit_id} is in {student.folder}")
    return 0


def _print(text: str) -> None:
    """Print what somebody else wrote, with the characters escaped that could steer a terminal."""
    print(printable(text, lines=True))


def _records(arguments: PublishArguments) -> StudentRecords | None:
    """The folder's records with those and the names that the command line gives; None where it gives none."""
    names = {"student_base": arguments.base_model, "teacher": arguments.teacher_model}
    names = {name: value for name, value in names.items() if value is not None}
    if not (arguments.reports or arguments.compare or names):
        return None
    records = StudentRecords.load(arguments.folder)
    if names:
        records = replace(records, training=_with_names(records.training, names))
    if arguments.reports:
        records = replace(records, reports=load_reports(arguments.reports))
    return replace(records, comparisons={**records.comparisons, **_comparisons(arguments.compare)})


def _with_names(training: TrainingSummary | None, names: Mapping[str, Any]) -> TrainingSummary:
    """The summary with Hub ids in place of what it knows by a folder's name alone."""
    from prune_opd_hf.hub.client import is_hub_id

    if training is None:
        raise ConfigError(
            "--base-model and --teacher-model name what a training summary knows, and the folder has none"
        )
    for name, value in names.items():
        known = getattr(training, name)
        if not is_hub_id(value) or (is_hub_id(known) and known != value):
            raise ConfigError(
                f"{name.replace('_', ' ')}: the training summary says {known!r}; a Hub id OWNER/NAME can stand in its place where "
                f"that is none, got {value!r}"
            )
    return replace(training, **names)


def _comparisons(entries: Sequence[str]) -> dict[str, tuple[EvaluationReport, ...]]:
    named: dict[str, tuple[EvaluationReport, ...]] = {}
    for entry in entries:
        name, separator, path = entry.partition("=")
        if not separator or not name.strip() or not path.strip():
            raise ConfigError(f"--compare takes NAME=FILE, for example teacher=teacher.json, got {entry!r}")
        named[name.strip()] = (*named.get(name.strip(), ()), *load_reports([path]))
    return named
