"""May this user write there? Asked before the first byte goes out, so that a refusal costs nothing."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from prune_opd_hf.errors import ConfigError, HubAccessError, HubError
from prune_opd_hf.hub.hub_ids import is_hub_id, is_ref_name
from prune_opd_hf.hub.patience import Patience, patiently


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
