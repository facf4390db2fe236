"""May this user write there? Asked before the first byte goes out, so that a refusal costs nothing."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import BadRequestError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_session, hf_raise_for_status

from prune_opd_hf.errors import ConfigError, HubAccessError, HubError, PublishError
from prune_opd_hf.hub.client import Patience, is_hub_id, is_ref_name, patiently


@dataclass(frozen=True)
class Target:
    """Where to publish.

    Attributes:
        repo_id: owner/name.
        private: only its owner may see a repository that has to be created; an existing public one is refused.
        create_pr: propose the change to the existing repository instead of making it.
        revision: branch; one that is not there is created from main.
        tag: name given to the commit.
        message: first line of the commit.

    Raises:
        ConfigError: not of the form owner/name, a contradiction, an empty message, or a branch or tag that Git cannot have.

    Example:
        >>> Target("me/student", create_pr=True, tag="v1")
        Traceback (most recent call last):
            ...
        prune_opd_hf.errors.ConfigError: a pull request cannot be tagged before it is merged: leave out tag or create_pr
    """

    repo_id: str
    private: bool = False
    create_pr: bool = False
    revision: str = "main"
    tag: str | None = None
    message: str = "Publish student"

    def __post_init__(self) -> None:
        if not is_hub_id(self.repo_id):
            raise ConfigError(f"repo_id must have the form owner/name, got {self.repo_id!r}")
        if self.tag is not None and self.tag in {"main", self.revision}:
            raise ConfigError(f"tag and branch must have different names, got {self.tag!r} for both")
        if self.create_pr and self.tag:
            raise ConfigError("a pull request cannot be tagged before it is merged: leave out tag or create_pr")
        if self.create_pr and self.private:
            raise ConfigError("a pull request goes to an existing repository: leave out private or create_pr")
        if not self.revision.strip() or not self.message.strip():
            raise ConfigError("revision and message must not be empty")
        for name, value in (("revision", self.revision), ("tag", self.tag)):
            if value is not None and not is_ref_name(value):
                raise ConfigError(
                    f"{name} must be a name that Git takes, without spaces and signs such as ~^:?*[, got {value!r}"
                )

    def describe(self) -> str:
        """For people.

        Example:
            >>> Target("me/student", private=True, tag="v1").describe()
            'me/student, private, branch main, tag v1'
        """
        branch = f"pull request to {self.revision}" if self.create_pr else f"branch {self.revision}"
        parts = [self.repo_id, "private" if self.private else "", branch, f"tag {self.tag}" if self.tag else ""]
        return ", ".join(filter(None, parts))

    @property
    def owner(self) -> str:
        """User or organisation."""
        return self.repo_id.split("/")[0]


def check_access(api: HfApi, target: Target, patience: Patience) -> ModelInfo | None:
    """Check token, namespace and repository.

    Returns:
        What the Hub says about the repository; None if it does not exist yet.

    Raises:
        HubAccessError: no token, one that only reads, or a namespace where this user may not write.
        HubError: a pull request to a repository that does not exist, or a public one where a private one is wanted.
    """
    user = patiently(api.whoami, patience, doing="asking the Hub who you are")
    _check_token(user, target)
    _check_namespace(user, target)
    info = patiently(lambda: _repository(api, target.repo_id), patience, doing=f"looking for {target.repo_id}")
    if info is None and target.create_pr:
        raise HubError(
            f"{target.repo_id} does not exist (or you may not see it), so there is nothing to send a pull request to"
        )
    if info is not None and target.private and not info.private:
        raise HubError(
            f"{target.repo_id} exists and is public: publish without --private, make it private on its settings page, "
            "or choose another name. Nothing was uploaded"
        )
    return info


def _repository(api: HfApi, repo_id: str) -> ModelInfo | None:
    try:
        return api.model_info(repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def _check_token(user: dict[str, Any], target: Target) -> None:
    token = user.get("auth", {}).get("accessToken", {})
    remedy = "create one with write permission at https://huggingface.co/settings/tokens and run `hf auth login`"
    if token.get("role") == "read":
        raise HubAccessError(f"this token may only read: {remedy}. Nothing was uploaded")
    if token.get("role") == "fineGrained" and "fineGrained" in token:
        wanted = "discussion.write" if target.create_pr else "repo.write"
        granted = set(token["fineGrained"].get("global", []))
        for scope in token["fineGrained"].get("scoped", []):
            if scope.get("entity", {}).get("name") in {target.owner, target.repo_id}:
                granted.update(scope.get("permissions", []))
        if not granted & {wanted, "repo.write"}:
            raise HubAccessError(f"this token lacks {wanted} for {target.repo_id}: {remedy}. Nothing was uploaded")


def _check_namespace(user: dict[str, Any], target: Target) -> None:
    organisations = {item["name"]: item.get("roleInOrg") for item in user.get("orgs", [])}
    if target.create_pr or target.owner == user["name"]:
        return
    if target.owner not in organisations:
        own = ", ".join([user["name"], *organisations])
        raise HubAccessError(
            f"{target.owner} is neither you ({user['name']}) nor an organisation you belong to: publish under one of {own}, "
            "or send a pull request (--create-pr). Nothing was uploaded"
        )
    if organisations[target.owner] == "read":
        raise HubAccessError(
            f"you may only read in the organisation {target.owner}: ask it for the role of a contributor, or send a pull "
            "request (--create-pr). Nothing was uploaded"
        )


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
