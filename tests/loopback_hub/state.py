"""What the Hub remembers: users, repositories with their commits and references, and large files by their hash."""

import hashlib
import itertools
import threading
from dataclasses import dataclass, field


class RefusalError(Exception):
    """An answer that is an error, with the Hub's code for it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class User:
    """An account with one token.

    Attributes:
        token: what the client sends.
        role: of the token: "write", "read" or "fineGrained".
        organisations: role in each, "admin", "write", "contributor" or "read".
        scopes: of a fine-grained token: permissions by the name of a user, organisation or repository.
    """

    name: str
    token: str
    role: str = "write"
    organisations: dict[str, str] = field(default_factory=dict)
    scopes: dict[str, list[str]] = field(default_factory=dict)

    def may_write(self, owner: str, repo_id: str) -> bool:
        """Whether the token may change a repository of `owner`."""
        belongs = owner == self.name or self.organisations.get(owner, "read") != "read"
        if self.role == "fineGrained":
            return belongs and any("repo.write" in self.scopes.get(name, []) for name in (owner, repo_id))
        return belongs and self.role == "write"


@dataclass(frozen=True)
class Blob:
    """A file's content; large ones are also known by their SHA-256."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """Git's name of the content."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        """The large-file store's name of the content."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A state of all files."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    tree: dict[str, Blob]


@dataclass
class PullRequest:
    """A proposed commit."""

    number: int
    title: str
    author: str
    status: str = "open"

    @property
    def reference(self) -> str:
        """Its name among the references."""
        return f"refs/pr/{self.number}"


class Repository:
    """Commits and the names that point at them."""

    def __init__(self, repo_id: str, private: bool, author: str) -> None:
        self.id = repo_id
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pull_requests: dict[int, PullRequest] = {}
        self._serial = itertools.count()
        first = self.add_commit(
            None, "initial commit", "", author, {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}
        )
        self.branches["main"] = first.id

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request or hash names."""
        names = {**self.tags, **self.branches}
        commit_id = names.get(revision, revision)
        if commit_id not in self.commits:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit_id]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def add_commit(self, parent: str | None, title: str, message: str, author: str, tree: dict[str, Blob]) -> Commit:
        """A new commit; no reference points at it yet."""
        listing = "\n".join(f"{path} {blob.oid}" for path, blob in sorted(tree.items()))
        words = f"{next(self._serial)}\n{parent}\n{title}\n{message}\n{listing}"
        commit = Commit(hashlib.sha1(words.encode()).hexdigest(), parent, title, message, author, dict(tree))
        self.commits[commit.id] = commit
        return commit


class HubState:
    """Everything, behind one lock: a request sees and leaves a whole state."""

    def __init__(self, users: list[User]) -> None:
        self.users = {user.token: user for user in users}
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.xet_hashes: dict[str, str] = {}
        self.lock = threading.RLock()

    def user(self, token: str | None) -> User | None:
        """Whose token it is."""
        if token is None:
            return None
        if token not in self.users:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return self.users[token]

    def visible(self, repo_id: str, user: User | None) -> Repository:
        """A repository that this user may see; a private one of somebody else is as if it were not there."""
        repository = self.repositories.get(repo_id)
        owner = repo_id.split("/")[0]
        allowed = repository is not None and (
            not repository.private or (user is not None and (owner == user.name or owner in user.organisations))
        )
        if repository is None or not allowed:
            raise RefusalError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository
