"""Files to the Hub in one commit, exactly once, whatever happens to its answer.

Every publication has an identity, the hash of its paths and contents, and carries it in its commit message. Before a
commit is sent again, and before the first time too, the Hub is asked whether a commit of this identity is there. On a
branch the commit also names its parent, so that the Hub itself refuses a second one. Who may write where, and which names
are allowed, is for the Hub to say.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from prune_opd_hf.errors import ConfigError, HubError
from prune_opd_hf.hub.client import Retries, is_hub_id, with_retries

_MARK = "prune-opd-publication: "


@dataclass(frozen=True)
class Target:
    """Where to publish.

    Attributes:
        repo_id: owner/name.
        private: only its owner may see a repository that has to be created; an existing public one is refused.
        create_pr: propose the change to the existing repository instead of making it.
        revision: branch; one that is not there is created from main.
        tag: name given to the commit.
        commit_message: its first line.

    Raises:
        ConfigError: not of the form owner/name, a contradiction, or an empty revision or message.
    """

    repo_id: str
    private: bool = False
    create_pr: bool = False
    revision: str = "main"
    tag: str | None = None
    commit_message: str = "Publish student"

    def __post_init__(self) -> None:
        if not is_hub_id(self.repo_id):
            raise ConfigError(f"repo_id must have the form owner/name, got {self.repo_id!r}")
        if self.tag is not None and self.tag in {"main", self.revision}:
            raise ConfigError(f"tag and branch must have different names, got {self.tag!r} for both")
        if self.create_pr and self.tag:
            raise ConfigError("a pull request cannot be tagged before it is merged: leave out tag or create_pr")
        if not self.revision.strip() or not self.commit_message.strip():
            raise ConfigError("revision and commit_message must not be empty")


@dataclass(frozen=True)
class Committed:
    """A commit that is on the Hub.

    Attributes:
        commit_id: its hash; the exact revision to load.
        url: where people find it: the repository, or the pull request.
        found: whether it was there already: of an earlier run, or of an attempt whose answer was lost.
    """

    commit_id: str
    url: str
    found: bool = False


def commit_files(
    api: HfApi,
    target: Target,
    files: Mapping[str, Path | bytes],
    retries: Retries,
    *,
    is_replaced: Callable[[str], bool],
    show: Callable[[str], None] = lambda message: None,
) -> Committed:
    """Files to the Hub in one commit. Either the whole commit is there in the end, or nothing of it.

    Args:
        files: content by path in the repository.
        is_replaced: which files of an earlier revision the new ones replace; those without a successor are removed.
        show: gets a line about the files that are removed, before it happens.

    Raises:
        HubAccessError: the Hub does not allow it.
        HubError: it refuses the card, the branch moved meanwhile, or it still fails after the last attempt.
    """
    repo_id = target.repo_id
    if not target.create_pr:
        with_retries(
            lambda: api.repo_exists(repo_id) or api.create_repo(repo_id, private=target.private, exist_ok=True),
            retries,
            doing=f"creating {repo_id}",
        )
    tags = _prepare_references(api, target, retries)
    additions = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
    identity = _identity(additions)
    doing = f"reading the state of {repo_id}"
    head = with_retries(lambda: api.model_info(repo_id, revision=target.revision), retries, doing=doing)
    if target.private and not head.private:
        raise HubError(
            f"{repo_id} exists and is public: publish without --private, make it private on its settings page, or choose "
            "another name. Nothing was uploaded"
        )
    commit = with_retries(lambda: _find(api, target, identity, None), retries, doing=doing)
    if target.tag in tags and (commit is None or commit.commit_id != tags[target.tag]):
        raise HubError(
            f"the tag {target.tag} of {repo_id} stands at {tags[target.tag][:8]} already, and tags do not move: choose "
            "another --tag. Nothing was uploaded"
        )
    if commit is None:
        there = with_retries(lambda: api.list_repo_files(repo_id, revision=target.revision), retries, doing=doing)
        stale = sorted(filter(is_replaced, set(there) - set(files)))
        if stale:
            show(f"removed with this commit, as parts of an earlier revision: {', '.join(stale)}")
        commit = _commit_once(api, target, additions, stale, identity, head.sha, retries)
    if target.tag is not None and target.tag not in tags:
        tag, commit_id = target.tag, commit.commit_id
        with_retries(
            lambda: api.create_tag(repo_id, tag=tag, revision=commit_id, exist_ok=True),
            retries,
            doing=f"the files are published as commit {commit_id[:8]}; tagging it as {tag}",
        )
    return commit


def _prepare_references(api: HfApi, target: Target, retries: Retries) -> dict[str, str]:
    """Create the branch where it is not there; the commits of the repository's tags, where they matter."""
    is_new_branch = not (target.create_pr or target.revision == "main" or target.revision.startswith("refs/pr/"))
    if not is_new_branch and target.tag is None:
        return {}
    repo_id, branch = target.repo_id, target.revision
    refs = with_retries(lambda: api.list_repo_refs(repo_id), retries, doing=f"listing the branches of {repo_id}")
    tags = {tag.name: tag.target_commit for tag in refs.tags}
    if branch in tags:
        raise HubError(f"{branch} is a tag of {repo_id}, and tags do not move: choose another --revision")
    if is_new_branch and branch not in {each.name for each in refs.branches}:
        with_retries(
            lambda: api.create_branch(repo_id, branch=branch, exist_ok=True),
            retries,
            doing=f"creating the branch {branch}",
        )
    return tags


def _commit_once(
    api: HfApi,
    target: Target,
    additions: list[CommitOperationAdd],
    stale: list[str],
    identity: str,
    parent: str | None,
    retries: Retries,
) -> Committed:
    where = f"{target.repo_id}, {target.revision}"
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *additions,
        *(CommitOperationDelete(path, is_folder=False) for path in stale),
    ]

    def find() -> Committed | None:
        return with_retries(
            lambda: _find(api, target, identity, parent), retries, doing=f"looking for the commit in {where}"
        )

    def send() -> Committed:
        try:
            sent = api.create_commit(
                target.repo_id,
                operations,
                commit_message=target.commit_message,
                commit_description=f"{_MARK}{identity}",
                revision=target.revision,
                create_pr=target.create_pr,
                parent_commit=parent,
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
        return Committed(sent.oid, sent.pr_url or f"{api.endpoint}/{target.repo_id}")

    return with_retries(send, retries, doing=f"committing to {where}", find_effect=find)


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
            return Committed(commit.commit_id, f"{api.endpoint}/{target.repo_id}", found=True)
        if parent is None or commit.commit_id == parent:
            break
    return None
