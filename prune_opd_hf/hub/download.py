"""From the Hub back to a folder: the student, and its records as records. Nothing that is downloaded is executed."""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError

from prune_opd_hf.errors import ConfigError, FileFormatError
from prune_opd_hf.hub.card import ModelFacts
from prune_opd_hf.hub.client import Patience, is_hub_id, patiently
from prune_opd_hf.hub.folder import DOWNLOADED_PATTERNS, StudentRecords, is_replaced, student_facts, student_files
from prune_opd_hf.records.weights import weights_hash


@dataclass(frozen=True)
class Downloaded:
    """A student that came from the Hub.

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
    patience: Patience | None = None,
) -> Downloaded:
    """Fetch a published student and check it. Only safetensors and texts are fetched: no pickle, no code.

    Args:
        repo_id: owner/name.
        revision: branch, tag, commit or pull request ("refs/pr/1").
        folder: where to; by default the Hub's cache. What is there and the same is not fetched again.
        token: of the Hub, for private repositories.
        endpoint: of another Hub.
        patience: how long to bear with a Hub that fails.

    Raises:
        ConfigError: `repo_id` is not of the form owner/name, or files of another student lie in `folder`.
        HubAccessError: there is no such repository, or the token may not see it.
        HubError: no such revision, or the Hub still fails after the last try.
        FileFormatError: what came is not a whole student that loads without foreign code.
    """
    if not is_hub_id(repo_id):
        raise ConfigError(f"repo_id must have the form owner/name, got {repo_id!r}")
    patience = patience or Patience()
    api = HfApi(endpoint=endpoint, token=token, library_name="prune-opd-hf")
    doing = f"downloading {repo_id}, {revision}"
    commit_id = patiently(lambda: api.model_info(repo_id, revision=revision).sha, patience, doing=doing)
    assert commit_id is not None
    names = patiently(lambda: api.list_repo_files(repo_id, revision=commit_id), patience, doing=doing)
    if not any(name.endswith(".safetensors") for name in names):
        raise FileFormatError(
            f"{repo_id} at {commit_id[:8]} holds no weights as safetensors, and others are not fetched: loading a pickle runs "
            "its code. Nothing was downloaded"
        )
    if folder is not None and Path(folder).exists():
        _refuse_other_files(Path(folder), set(names))

    def fetch() -> str:
        local = None if folder is None else Path(folder)
        try:
            return api.snapshot_download(
                repo_id, revision=commit_id, local_dir=local, allow_patterns=list(DOWNLOADED_PATTERNS)
            )
        except LocalEntryNotFoundError as error:
            raise (error.__cause__ or error) from None  # what happened, rather than what the client tried instead

    place = Path(patiently(fetch, patience, doing=doing))
    try:
        student_files(place)
        facts = student_facts(place)
        records = StudentRecords.load(place)
        model_hash = weights_hash(place)
    except FileFormatError as error:
        raise FileFormatError(f"{repo_id} at {commit_id[:8]} is not a student to be used: {error}") from error
    doubts = tuple(
        f"the report on {', '.join(result.name for result in report.benchmarks)} was made with other weights"
        for report in records.reports
        if report.model_hash != model_hash
    )
    return Downloaded(place, commit_id, facts, model_hash, records, doubts)


def _refuse_other_files(folder: Path, names: set[str]) -> None:
    """Files that were not downloaded must not be overwritten; those of another student would be loaded with this one's."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name a folder")
    notes = folder / ".cache" / "huggingface" / "download"  # where the client notes what it fetched
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        ours = name in names and (notes / f"{name}.metadata").is_file()
        if path.is_file() and (is_replaced(name) or name == "README.md") and not ours:
            raise ConfigError(
                f"{folder} holds {name}, which did not come from this revision: name another folder, or empty this one. "
                "Nothing was downloaded"
            )
