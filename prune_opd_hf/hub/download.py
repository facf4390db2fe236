"""From the Hub back to a folder: the student, and its records as records. Nothing that is downloaded is executed."""

import glob
import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError

from prune_opd_hf.errors import ConfigError, FileFormatError, HubError, PruneOPDError
from prune_opd_hf.hub.card import ModelFacts
from prune_opd_hf.hub.client import Retries, is_hub_id, with_retries
from prune_opd_hf.hub.folder import DOWNLOADED_PATTERNS, is_replaced, student_facts, student_files
from prune_opd_hf.records.folders import check_folder
from prune_opd_hf.records.student_records import StudentRecords
from prune_opd_hf.records.weights import weights_hash


@dataclass(frozen=True)
class Downloaded:
    """A student that came from the Hub; every file equals the hash that the Hub states for it.

    Attributes:
        folder: where it lies; `AutoModelForCausalLM.from_pretrained` takes it.
        commit_id: the exact revision.
        facts: what the student is.
        model_hash: identifies its weights.
        records: how it was trained and how well it does.
        doubts: reports that were not made with these weights.
    """

    folder: Path
    commit_id: str
    facts: ModelFacts
    model_hash: str
    records: StudentRecords
    doubts: tuple[str, ...] = ()


def download_student(
    repo_id: str,
    *,
    revision: str = "main",
    folder: str | os.PathLike[str] | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    retries: Retries | None = None,
) -> Downloaded:
    """Fetch a published student and check it. Only safetensors and texts are fetched: no pickle, no code.

    Args:
        repo_id: owner/name.
        revision: branch, tag, commit or pull request ("refs/pr/1").
        folder: where to; by default the Hub's cache. What is there and the same is not fetched again.
        token: of the Hub, for private repositories.
        endpoint: of another Hub.
        retries: how often and how long to try.

    Raises:
        ConfigError: `repo_id` is not of the form owner/name, no revision, or `folder` is a file or holds files of another student.
        HubAccessError: there is no such repository, or the token may not see it.
        HubError: no such revision, the Hub still fails after the last attempt, or a file does not have its hash.
        FileFormatError: what came is not a complete student that loads without foreign code.
    """
    if not is_hub_id(repo_id) or not revision.strip():
        raise ConfigError(f"need a repository owner/name and a revision, got {repo_id!r} and {revision!r}")
    retries = retries or Retries()
    api = HfApi(endpoint=endpoint, token=token, library_name="prune-opd-hf")
    doing = f"downloading {repo_id}, {revision}"
    info = with_retries(lambda: api.model_info(repo_id, revision=revision), retries, doing=doing)
    commit_id, names = str(info.sha), {each.rfilename for each in info.siblings or ()}
    if not any(name.endswith(".safetensors") for name in names):
        raise FileFormatError(
            f"{repo_id} at {commit_id[:8]} holds no weights as safetensors, and others are not fetched: loading a pickle runs "
            "its code. Nothing was downloaded"
        )
    if folder is not None:
        check_folder(folder)
        _refuse_other_files(Path(folder), names)

    def fetch(patterns: list[str], force_download: bool = False) -> Path:
        try:
            place = api.snapshot_download(
                repo_id,
                revision=commit_id,
                local_dir=None if folder is None else Path(folder),
                allow_patterns=patterns,
                force_download=force_download,
            )
        except LocalEntryNotFoundError as error:
            raise (error.__cause__ or error) from None  # what happened, rather than what the client tried instead
        return Path(place)

    def find_wrong_files() -> list[str]:
        """Files that are missing, or whose hash is not the one that the Hub states."""
        check = api.verify_repo_checksums(repo_id, revision=commit_id, local_dir=place)
        return sorted(filter(_is_fetched, [*(each["path"] for each in check.mismatches), *check.missing_paths]))

    place = with_retries(lambda: fetch(list(DOWNLOADED_PATTERNS)), retries, doing=doing)
    wrong = with_retries(find_wrong_files, retries, doing=f"checking {repo_id}")
    if wrong:
        with_retries(lambda: fetch([glob.escape(path) for path in wrong], force_download=True), retries, doing=doing)
        wrong = with_retries(find_wrong_files, retries, doing=f"checking {repo_id}")
    if wrong:
        for path in wrong:
            (place / path).unlink(missing_ok=True)
        raise HubError(
            f"{', '.join(wrong)} came twice with another content than the Hub states for {repo_id} at {commit_id[:8]}, and "
            "was removed. Run the same command again, on another network if it happens again"
        )
    try:
        student_files(place)
        facts, records, model_hash = student_facts(place), StudentRecords.load(place), weights_hash(place)
    except PruneOPDError as error:
        raise FileFormatError(f"{repo_id} at {commit_id[:8]} is not a student to be used: {error}") from error
    doubts = tuple(
        f"the report on {', '.join(result.name for result in report.benchmarks)} was made with other weights"
        for report in records.reports
        if report.model_hash != model_hash
    )
    return Downloaded(place, commit_id, facts, model_hash, records, doubts)


def _is_fetched(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in DOWNLOADED_PATTERNS)


def _refuse_other_files(folder: Path, names: set[str]) -> None:
    """Files that were not downloaded must not be overwritten; those of another student would be loaded with this one's."""
    notes = folder / ".cache" / "huggingface" / "download"  # where the client notes what it fetched
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        ours = name in names and (notes / f"{name}.metadata").is_file()
        overwritten = name in names and _is_fetched(name)
        if path.is_file() and (is_replaced(name) or overwritten) and not ours:
            raise ConfigError(
                f"{folder} holds {name}, which did not come from this revision: name another folder, or empty this one. "
                "Nothing was downloaded"
            )
