"""What will be published, put together and checked before anything leaves the machine.

A bundle is a mapping from paths in the repository to content: weights stay where they are on disk, texts are held in
memory. Only files that a reader of a student needs are taken; checkpoints, optimizer states, logs and pickles stay here.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelInfo, get_token

from prune_opd_hf.errors import ConfigError, HubAccessError, HubError, InputError, PruneOPDError, PublishError
from prune_opd_hf.hub.card import License, ModelFacts, build_card
from prune_opd_hf.hub.client import Patience, is_hub_id, is_local, patiently
from prune_opd_hf.hub.commit import Committed, Target, check_access, commit_once, plan_commit, validate_card
from prune_opd_hf.hub.figures import training_figures
from prune_opd_hf.hub.folder import (
    StudentRecords,
    adapter_config,
    is_replaced,
    left_out,
    readable_size,
    refuse_leaks,
    size_bytes,
    student_facts,
    student_files,
)
from prune_opd_hf.hub.leaks import Machine
from prune_opd_hf.hub.results import eval_results_files
from prune_opd_hf.records.evaluation_report import EvaluationReport
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.records.weights import ADAPTER_CONFIG, weights_hash

CARD_FILE = "README.md"


@dataclass(frozen=True)
class CardOptions:
    """What a card says beyond the records; see `build_card`.

    Attributes:
        license: of the weights.
        example_prompt: what the usage snippet asks.
        limitations: sentences to add.
        language: of prompts and answers.
        preflight: findings of the compatibility check.
    """

    license: License | None = None
    example_prompt: str | None = None
    limitations: tuple[str, ...] = ()
    language: str | None = None
    preflight: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Bundle:
    """A student, ready to be published.

    Attributes:
        files: content by path in the repository: a file on disk, or the bytes themselves.
        card: what stands in README.md.
        facts: what the student is.
        model_hash: identifies its weights.
        left_out: files of the folder that stay here.
        warnings: what a reader of the card will miss.
    """

    files: Mapping[str, Path | bytes]
    card: ModelCard
    facts: ModelFacts
    model_hash: str
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(map(size_bytes, self.files.values()))

    def describe(self) -> str:
        """What will be uploaded and how large it is, one line a file."""
        lines = [f"{readable_size(size_bytes(content)):>10}  {path}" for path, content in sorted(self.files.items())]
        lines.append(
            f"{readable_size(self.size_bytes):>10}  in {len(self.files)} files, weights {self.model_hash[:19]}"
        )
        if self.left_out:
            shown = ", ".join(self.left_out[:8]) + (", ..." if len(self.left_out) > 8 else "")
            lines.append(f"left out: {shown}")
        lines.extend(f"warning: {warning}" for warning in self.warnings)
        return "\n".join(lines)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the folder that would be uploaded, whole or not at all.

        Raises:
            PublishError: the folder exists and is not empty, or cannot be written.
        """
        refuse_full_folder(folder)
        target = Path(folder)
        try:
            self._save(target)
        except OSError as error:
            raise PublishError(
                f"{target} could not be written ({error.strerror}): make room ({readable_size(self.size_bytes)}) or name another "
                "folder; nothing was left there"
            ) from error
        return target

    def _save(self, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".unfinished-") as unfinished:
            for path, content in self.files.items():
                place = Path(unfinished) / path
                place.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    place.write_bytes(content)
                else:
                    shutil.copyfile(content, place)
            for written in Path(unfinished).iterdir():
                written.rename(target / written.name)


def refuse_no_folder(folder: str | os.PathLike[str]) -> None:
    """Raise PublishError unless it is a folder."""
    if not Path(folder).is_dir():
        raise PublishError(f"{folder} is not a folder: name the one that the trained student was saved to")


def refuse_full_folder(folder: str | os.PathLike[str]) -> None:
    """Raise PublishError unless a new folder can be written there."""
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PublishError(f"{target} exists and is not empty: name another folder, nothing was written")


def build_bundle(
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    repo_id: str | None = None,
    records: StudentRecords | None = None,
    options: CardOptions | None = None,
    token: str | None = None,
    figures: bool = True,
) -> Bundle:
    """Check a student's folder and put together what would be published. Needs no network.

    Args:
        folder: as `save_pretrained` and the trainer write it.
        name: what the card calls it; by default the last part of `repo_id`, else the folder's name.
        repo_id: where it will be.
        records: training summary and evaluation reports; by default those that lie in the folder.
        options: what the card says beyond them.
        token: the Hub token in use, which must not appear in any file.
        figures: whether to draw how training went (needs matplotlib; without it they are left out with a warning).

    Raises:
        PublishError: everything in the folder that stands against publishing, each with its remedy.
        LeakError: a secret or a path of this machine stands in what would be published.
    """
    refuse_no_folder(folder)
    root, options = Path(folder), options or CardOptions()
    name = name or (repo_id or root.resolve().name).rsplit("/", 1)[-1]
    facts, model_hash, records = _checked(root, records)
    records = replace(records, training=_without_local_names(records.training))
    captions, drawn, warnings = _figures(records) if figures else ({}, {}, [])
    card = build_card(
        records.training,
        records.reports,
        name=name,
        repo_id=repo_id,
        facts=facts,
        comparisons=records.comparisons,
        figures=captions,
        license=options.license,
        preflight=options.preflight,
        example_prompt=options.example_prompt,
        limitations=options.limitations,
        language=options.language,
    )
    files: dict[str, Path | bytes] = {**student_files(root), **records.files(), **drawn}
    files.update({path: text.encode() for path, text in eval_results_files(records.reports).items()})
    files[CARD_FILE] = str(card).encode()
    names = {part.split("/")[0] for part in (repo_id, *_named_repositories(records)) if part and is_hub_id(part)}
    refuse_leaks(files, Machine.here(root, token), names)
    return Bundle(
        files=files,
        card=card,
        facts=facts,
        model_hash=model_hash,
        left_out=left_out(root, files),
        warnings=(*warnings, *_missing(records, options), *_replaced_card(root, str(card))),
    )


def _checked(root: Path, records: StudentRecords | None) -> tuple[ModelFacts, str, StudentRecords]:
    """What the folder holds, after every check; a user hears of all problems at once."""
    problems: list[PruneOPDError] = []
    facts, model_hash = None, None
    try:
        records = records or StudentRecords.load(root)
    except PruneOPDError as error:
        problems.append(error)
    try:
        facts = student_facts(root)
        student_files(root)
        model_hash = weights_hash(root)
    except PruneOPDError as error:
        problems.append(error)
    if records is not None and facts is not None and model_hash is not None:
        try:
            _check_reports(records.reports, model_hash)
            if facts.adapter:
                records = replace(
                    records, training=_with_base(records, adapter_config(root)["base_model_name_or_path"])
                )
            return facts, model_hash, records
        except PruneOPDError as error:
            problems.append(error)
    if len(problems) == 1:
        raise PublishError(f"{root.resolve().name} cannot be published: {problems[0]}") from problems[0]
    listed = "; ".join(f"({number}) {error}" for number, error in enumerate(problems, start=1))
    raise PublishError(f"{root.resolve().name} cannot be published, for {len(problems)} reasons: {listed}")


def _check_reports(reports: Sequence[EvaluationReport], model_hash: str) -> None:
    for report in reports:
        if report.model_hash != model_hash:
            benchmarks = ", ".join(result.name for result in report.benchmarks)
            raise PublishError(
                f"the report on {benchmarks} was made with other weights ({report.model_hash[:19]}) than those in the folder "
                f"({model_hash[:19]}): evaluate these, or leave the report out"
            )


def _with_base(records: StudentRecords, base: str) -> TrainingSummary | None:
    """The training summary, which must not name another base than the adapter does."""
    training = records.training
    if training is not None and is_hub_id(training.student_base) and training.student_base != base:
        raise PublishError(
            f"the training summary names {training.student_base} as base, {ADAPTER_CONFIG} names {base}: "
            "publish the records of this adapter"
        )
    return None if training is None else replace(training, student_base=base)


def _without_local_names(training: TrainingSummary | None) -> TrainingSummary | None:
    """A relative path such as runs/student has the form of a Hub id; one that leads to something here is not taken for one."""
    if training is None:
        return None
    names = {name: getattr(training, name) for name in ("dataset", "student_base", "teacher")}
    local: dict[str, Any] = {name: f"{Path(value).name} (local)" for name, value in names.items() if is_local(value)}
    return replace(training, **local)


def _figures(records: StudentRecords) -> tuple[dict[str, str], dict[str, bytes], list[str]]:
    if records.training is None:
        return {}, {}, []
    try:
        captions, files = training_figures(records.training)
    except InputError as error:
        return {}, {}, [f"the card has no figures: {error}"]
    return captions, files, []


def _named_repositories(records: StudentRecords) -> list[str]:
    training = records.training
    named = [] if training is None else [training.student_base, training.teacher, training.dataset]
    everything = [*records.reports, *(report for reports in records.comparisons.values() for report in reports)]
    named += [report.model_name for report in everything]
    named += [result.source for report in everything for result in report.benchmarks]
    return [name for name in named if name]


def _replaced_card(root: Path, card: str) -> list[str]:
    """A card in the folder, perhaps written by hand, that is not the one that is published."""
    with contextlib.suppress(OSError):
        if (root / CARD_FILE).read_text(encoding="utf-8", errors="replace") != card:
            return [
                f"the folder's {CARD_FILE} stays here: the card is made from the records. "
                "Say more with --limitations, or edit it on the Hub afterwards"
            ]
    return []


def _missing(records: StudentRecords, options: CardOptions) -> list[str]:
    missing = []
    if records.training is None:
        missing.append("no training summary: the card cannot say how the student was trained")
    elif records.training.student_base is not None and not is_hub_id(records.training.student_base):
        missing.append("the base model is not a repository on the Hub: the card has no base_model")
    if not records.reports:
        missing.append("no evaluation report: the card makes no claim (prune-opd evaluate writes one)")
    if options.license is None:
        missing.append("no licence: the card says that its publisher states none (--license)")
    return missing


@dataclass(frozen=True)
class Uploaded:
    """Files that are on the Hub.

    Attributes:
        url: where people find them: the repository, or the pull request.
        commit_id: hash of the commit that holds them; the exact revision to load.
        found: nothing was sent, because this very content was there already.
    """

    url: str
    commit_id: str
    found: bool = False


@dataclass(frozen=True)
class Published:
    """A student that is on the Hub.

    Attributes:
        url, commit_id, found: as of `Uploaded`.
        bundle: what was published.
    """

    url: str
    commit_id: str
    bundle: Bundle
    found: bool = False


def publish_student(
    folder: str | os.PathLike[str],
    target: Target,
    *,
    records: StudentRecords | None = None,
    options: CardOptions | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    patience: Patience | None = None,
    show: Callable[[str], None] | None = None,
) -> Published:
    """Publish a trained student: weights, tokenizer, card, reports, training summary and figures in one commit.

    Everything is checked before the first byte goes out: that the weights are whole, finite safetensors which load,
    that tokenizer and generation config are there, that each report belongs to these very weights, that no secret and no
    path of this machine stands in any file, that the Hub accepts the card, and that the token may write there. What
    fails for a moment is tried again; a commit whose answer was lost is looked for before it is sent a second time.

    Args:
        folder: as `save_pretrained` and the trainer write it.
        target: where to publish.
        records: training summary and evaluation reports; by default those in the folder.
        options: what the card says beyond them. Without a licence, that of the base model is looked up.
        token: of the Hub; by default the one of `hf auth login` or HF_TOKEN.
        endpoint: of another Hub; by default that of HF_ENDPOINT.
        patience: how long to bear with a Hub that fails.
        show: is told what will be uploaded and how large it is, before it happens.

    Raises:
        PublishError: the folder is not fit to be published.
        LeakError: a secret or a path of this machine stands in what would be published.
        HubAccessError: no token, one that only reads, or somebody else's namespace.
        HubError: the Hub refuses, or still fails after the last try.

    The work of `prune-opd publish`; see `build_bundle` for the part that needs no network:
        >>> from prune_opd_hf.hub import build_bundle
        >>> build_bundle("no/such/folder")
        Traceback (most recent call last):
            ...
        prune_opd_hf.errors.PublishError: no/such/folder is not a folder: name the one that the trained student was saved to
    """
    patience, show = patience or Patience(), show or _show_nothing
    api = HfApi(endpoint=endpoint, token=token, library_name="prune-opd-hf")
    refuse_no_folder(folder)
    _refuse_leaks_in_words(target, folder, api)
    there = check_access(api, target, patience)
    bundle = prepare_bundle(folder, target.repo_id, records=records, options=options, api=api, patience=patience)
    validate_card(api, str(bundle.card), patience)
    show(f"to {target.describe()}:\n{bundle.describe()}")
    sent = upload(api, target, there, bundle.files, patience, replaced=is_replaced, show=show)
    return Published(url=sent.url, commit_id=sent.commit_id, bundle=bundle, found=sent.found)


def _show_nothing(words: str) -> None:
    """Where nobody is to be told."""


def _refuse_leaks_in_words(target: Target, folder: str | os.PathLike[str], api: HfApi) -> None:
    """The words that go to the Hub beside the files."""
    words = {"message": target.message, "revision": target.revision, "tag": target.tag or ""}
    machine = Machine.here(folder, _token(api))
    refuse_leaks({f"the {name}": word.encode() for name, word in words.items()}, machine, {target.owner})


def _token(api: HfApi) -> str | None:
    return api.token if isinstance(api.token, str) else get_token()


def upload(
    api: HfApi,
    target: Target,
    there: ModelInfo | None,
    files: Mapping[str, Path | bytes],
    patience: Patience,
    *,
    replaced: Callable[[str], bool],
    show: Callable[[str], None] = _show_nothing,
) -> Uploaded:
    """Files to the Hub in one commit.

    Args:
        there: what `check_access` says about the repository.
        files: content by path in the repository.
        replaced: which files of an earlier revision the new ones replace.
        show: is told which files of an earlier revision are removed, before it happens.

    Raises:
        HubAccessError: the Hub does not allow it.
        HubError: the Hub refuses, or still fails after the last try.
    """
    if there is None:
        patiently(
            lambda: api.create_repo(target.repo_id, private=target.private, exist_ok=True),
            patience,
            doing=f"creating {target.repo_id}",
        )
    _prepare_branch(api, target, patience)
    plan = plan_commit(api, target, files, patience, replaced)
    if plan.stale and plan.existing is None:
        show(f"removed with this commit, as parts of an earlier revision: {', '.join(plan.stale)}")
    tagged = _tagged_commit(api, target, patience)
    if tagged is not None and (plan.existing is None or plan.existing.commit_id != tagged):
        raise HubError(
            f"the tag {target.tag} of {target.repo_id} stands at {tagged[:8]} already, and tags do not move: choose another "
            "--tag. Nothing was uploaded"
        )
    committed = commit_once(api, plan, patience)
    if target.tag is not None and tagged is None:
        _tag(api, target.repo_id, target.tag, committed, patience)
    return Uploaded(committed.pr_url or f"{api.endpoint}/{target.repo_id}", committed.commit_id, committed.found)


def prepare_bundle(
    folder: str | os.PathLike[str],
    repo_id: str | None,
    *,
    records: StudentRecords | None,
    options: CardOptions | None,
    api: HfApi,
    patience: Patience | None,
) -> Bundle:
    """`build_bundle`, with the base model's licence looked up on the Hub where none is given.

    Args:
        patience: with a Hub that fails; None makes do without the licence then.
    """
    options = options or CardOptions()
    if options.license is None:
        base = _base_model(folder, records)
        options = replace(options, license=license_of(api, base, patience) if base is not None else None)
    return build_bundle(folder, repo_id=repo_id, records=records, options=options, token=_token(api))


def _base_model(folder: str | os.PathLike[str], records: StudentRecords | None) -> str | None:
    """The base model's Hub id, where the records or the adapter name one; what is wrong with them is said later."""
    with contextlib.suppress(PruneOPDError):
        training = (records or StudentRecords.load(folder)).training
        if training is not None and is_hub_id(training.student_base) and not is_local(training.student_base):
            return training.student_base
    with contextlib.suppress(PruneOPDError):
        return adapter_config(Path(folder))["base_model_name_or_path"]
    return None


def license_of(api: HfApi, model_id: str, patience: Patience | None) -> License | None:
    """The licence that a model's card on the Hub states; None where it states none, or the model cannot be seen.

    Args:
        patience: with a Hub that fails. A card that depended on the Hub's mood would make a second publication of the same
            student; None asks once and makes do without an answer.

    Raises:
        HubError: the Hub still fails after the last try.
    """
    try:
        data = patiently(
            lambda: api.model_info(model_id).card_data,
            patience or Patience(attempts=1, timeout_seconds=10.0),
            doing=f"looking up the licence of {model_id} (--license states it)",
        )
    except HubAccessError:
        return None
    except HubError:
        if patience is None:
            return None
        raise
    if data is None or not isinstance(data.get("license"), str):
        return None
    with contextlib.suppress(ConfigError):
        link = data.get("license_link")
        if isinstance(link, str) and "://" not in link:  # a file beside the base model's weights
            link = f"https://huggingface.co/{model_id}/blob/main/{link}"
        return License(data.get("license"), name=data.get("license_name"), link=link)
    return None


def _prepare_branch(api: HfApi, target: Target, patience: Patience) -> None:
    if target.revision == "main" or target.create_pr or target.revision.startswith("refs/pr/"):
        return
    refs = patiently(
        lambda: api.list_repo_refs(target.repo_id), patience, doing=f"listing the branches of {target.repo_id}"
    )
    if target.revision in {branch.name for branch in refs.branches}:
        return
    if target.revision in {tag.name for tag in refs.tags}:
        raise HubError(
            f"{target.revision} is a tag of {target.repo_id}, and tags do not move: choose another --revision"
        )
    patiently(
        lambda: api.create_branch(target.repo_id, branch=target.revision, exist_ok=True),
        patience,
        doing=f"creating the branch {target.revision}",
    )


def _tagged_commit(api: HfApi, target: Target, patience: Patience) -> str | None:
    """The commit that already has the wanted tag."""
    if target.tag is None:
        return None
    refs = patiently(
        lambda: api.list_repo_refs(target.repo_id), patience, doing=f"listing the tags of {target.repo_id}"
    )
    return next((tag.target_commit for tag in refs.tags if tag.name == target.tag), None)


def _tag(api: HfApi, repo_id: str, tag: str, committed: Committed, patience: Patience) -> None:
    patiently(
        lambda: api.create_tag(repo_id, tag=tag, revision=committed.commit_id, exist_ok=True),
        patience,
        doing=f"tagging {committed.commit_id[:8]} as {tag}",
    )
