"""One commit, exactly once, whatever happens to its answer.

Every publication has an identity, the hash of its paths and contents, and carries it in its commit message. Before a
commit is sent again, and before the first time too, the Hub is asked whether a commit of this identity is there. On a
branch the commit also names its parent, so that the Hub itself refuses a second one.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import BadRequestError, HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_session, hf_raise_for_status

from prune_opd_hf.errors import HubError, PublishError
from prune_opd_hf.hub.access import Target
from prune_opd_hf.hub.patience import Patience, patiently

_MARK = "prune-opd-publication: "


@dataclass(frozen=True)
class Committed:
    """A commit that is on the Hub.

    Attributes:
        commit_id: its hash.
        pr_url: of the pull request that holds it; None for a branch.
        found: whether it was there already: of an earlier run, or of a try whose answer was lost.
    """

    commit_id: str
    pr_url: str | None = None
    found: bool = False


def validate_card(api: HfApi, card: str, patience: Patience) -> None:
    """Ask the Hub whether it accepts the card's metadata.

    Raises:
        PublishError: it does not, with its reasons.
    """

    def ask() -> None:
        response = get_session().post(
            f"{api.endpoint}/api/validate-yaml",
            json={"repoType": "model", "content": card},
            headers={"Accept": "text/plain"},
        )
        try:
            hf_raise_for_status(response)
        except BadRequestError as error:
            raise PublishError(f"the Hub does not accept the card: {' '.join(response.text.split())[:300]}") from error

    patiently(ask, patience, doing="checking the card")


@dataclass(frozen=True)
class Plan:
    """A commit that is ready to be sent.

    Attributes:
        target: where it goes.
        additions: its files.
        stale: paths of an earlier student that it removes.
        identity: what its commit message says about its content.
        parent: the commit that it goes on top of.
        existing: the same content at the head of the branch or in an open pull request; nothing is to be sent then.
    """

    target: Target
    additions: tuple[CommitOperationAdd, ...]
    stale: tuple[str, ...]
    identity: str
    parent: str | None
    existing: Committed | None


def plan_commit(
    api: HfApi,
    target: Target,
    files: Mapping[str, Path | bytes],
    patience: Patience,
    replaced: Callable[[str], bool],
) -> Plan:
    """See what is there, and what a commit of `files` would add and remove. The repository and the branch exist.

    Args:
        replaced: which files of an earlier revision the new ones replace; those without a successor are removed.

    Raises:
        HubAccessError: the Hub does not allow it.
        HubError: the Hub still fails after the last try.
    """
    additions = [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in sorted(files.items())
    ]
    identity = _identity(additions)
    doing = f"reading the state of {target.repo_id}"
    parent = patiently(lambda: api.model_info(target.repo_id, revision=target.revision).sha, patience, doing=doing)
    existing = patiently(lambda: _find(api, target, identity, None), patience, doing=doing)
    stale = patiently(lambda: _stale_files(api, target, set(files), replaced), patience, doing=doing)
    return Plan(target, tuple(additions), tuple(stale), identity, parent, existing)


def commit_once(api: HfApi, plan: Plan, patience: Patience) -> Committed:
    """Send a planned commit, unless it is there.

    Raises:
        HubAccessError: the Hub does not allow it.
        HubError: the branch moved meanwhile, or the Hub still fails after the last try. Either the whole commit is there
            or nothing of it.
    """
    if plan.existing is not None:
        return plan.existing
    target = plan.target
    where = f"{target.repo_id}, {target.revision}"

    def find() -> Committed | None:
        return patiently(
            lambda: _find(api, target, plan.identity, plan.parent), patience, doing=f"looking for the commit in {where}"
        )

    def send() -> Committed:
        try:
            sent = api.create_commit(
                target.repo_id,
                [*plan.additions, *[CommitOperationDelete(path_in_repo=path, is_folder=False) for path in plan.stale]],
                commit_message=target.message,
                commit_description=f"{_MARK}{plan.identity}",
                revision=target.revision,
                create_pr=target.create_pr,
                parent_commit=plan.parent,
            )
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code not in {409, 412}:
                raise
            arrived = find()
            if arrived is not None:
                return arrived
            raise HubError(
                f"somebody else changed {where} while this was uploaded, and nothing of it was committed: run the same "
                "command again to publish on top of that change"
            ) from error
        return Committed(sent.oid, sent.pr_url)

    return patiently(send, patience, doing=f"committing to {where}", find_effect=find)


def _identity(additions: list[CommitOperationAdd]) -> str:
    """The hash of everything that is published. It reads every file once; the upload needs these hashes anyway."""
    digest = hashlib.sha256()
    for addition in additions:
        digest.update(f"{addition.path_in_repo}\0{addition.upload_info.sha256.hex()}\n".encode())
    return digest.hexdigest()


def _find(api: HfApi, target: Target, identity: str, parent: str | None) -> Committed | None:
    """The commit of this identity: in an open pull request, or on the branch above `parent` (None: only at its head)."""
    if target.create_pr:
        for discussion in api.get_repo_discussions(
            target.repo_id, discussion_type="pull_request", discussion_status="open"
        ):
            for commit in api.list_repo_commits(target.repo_id, revision=discussion.git_reference):
                if identity in commit.message:
                    return Committed(commit.commit_id, discussion.url, found=True)
        return None
    for commit in api.list_repo_commits(target.repo_id, revision=target.revision):
        if identity in commit.message:
            return Committed(commit.commit_id, found=True)
        if parent is None or commit.commit_id == parent:
            break
    return None


def _stale_files(api: HfApi, target: Target, new_files: set[str], replaced: Callable[[str], bool]) -> list[str]:
    """Files of an earlier student that the new one does not overwrite."""
    there = api.list_repo_tree(target.repo_id, recursive=True, revision=target.revision)
    paths = {item.path for item in there if isinstance(item, RepoFile)}
    return sorted(path for path in paths - new_files if replaced(path))
