"""The Hub's JSON interface: who am I, repositories, references, trees and commits."""

import base64
import json
import re
from collections.abc import Callable
from typing import Any

from loopback_hub.cards import card_errors
from loopback_hub.messages import Answer, Request, json_answer, unquoted
from loopback_hub.state import Blob, Commit, HubState, PullRequest, RefusalError, Repository, User

DATE = "2026-11-23T00:00:00.000Z"
_REPO = r"/api/models/([^/]+/[^/]+)"


class Api:
    """Answers to JSON requests."""

    def __init__(self, state: HubState, endpoint: str, large_from_bytes: int) -> None:
        self.state = state
        self.endpoint = endpoint
        self.large_from_bytes = large_from_bytes
        self.routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", self.validate_yaml),
            ("POST", rf"{_REPO}/preupload/([^/]+)", self.preupload),
            ("POST", rf"{_REPO}/commit/([^/]+)", self.commit),
            ("POST", rf"{_REPO}/branch/([^/]+)", self.create_branch),
            ("POST", rf"{_REPO}/tag/([^/]+)", self.create_tag),
            ("POST", rf"{_REPO}/paths-info/([^/]+)", self.paths_info),
            ("GET", rf"{_REPO}/refs", self.refs),
            ("GET", rf"{_REPO}/discussions", self.discussions),
            ("GET", rf"{_REPO}/commits/([^/]+)", self.commits),
            ("GET", rf"{_REPO}/tree/([^/]+)", self.tree),
            ("GET", rf"{_REPO}/revision/([^/]+)", self.info),
            ("GET", _REPO, self.info),
        ]

    def whoami(self, request: Request) -> Answer:
        user = self._user(request)
        token: dict[str, Any] = {"displayName": "test", "role": user.role}
        if user.role == "fineGrained":
            scoped = [
                {"entity": {"name": name, "type": "user"}, "permissions": list(p)} for name, p in user.scopes.items()
            ]
            token["fineGrained"] = {"global": [], "scoped": scoped}
        organisations = [{"name": name, "roleInOrg": role} for name, role in user.organisations.items()]
        return json_answer(
            {
                "type": "user",
                "name": user.name,
                "orgs": organisations,
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    def create(self, request: Request) -> Answer:
        user, wanted = self._user(request), request.json
        owner = wanted.get("organization") or user.name
        repo_id = f"{owner}/{wanted['name']}"
        if not user.may_write(owner, repo_id):
            raise RefusalError(403, f"You don't have the rights to create a model under the namespace {owner}")
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self.state.repositories:
            return json_answer({"error": "You already created this model repo", "url": url}, 409)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.state.repositories[repo_id] = Repository(repo_id, private, user.name)
        return json_answer({"url": url, "name": repo_id})

    def validate_yaml(self, request: Request) -> Answer:
        errors = card_errors(request.json["content"])
        listed = [{"message": message} for message in errors]
        return json_answer({"errors": listed, "warnings": []}, 400 if errors else 200)

    def preupload(self, request: Request, repo: str, revision: str) -> Answer:
        repository = self._writable(request, repo, bool(request.query.get("create_pr")))
        tree = repository.resolve(*unquoted(revision)).tree
        files = []
        for file in request.json["files"]:
            there = tree.get(file["path"])
            large = file["size"] >= self.large_from_bytes or file["path"].endswith(".safetensors")
            oid = None if there is None else there.sha256 if there.large else there.oid
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return json_answer({"files": files})

    def commit(self, request: Request, repo: str, revision: str) -> Answer:
        create_pr = request.query.get("create_pr") == "1"
        repository, user = self._writable(request, repo, create_pr), self._user(request)
        (branch,) = unquoted(revision)
        base = repository.resolve(branch)
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        assert header["key"] == "header", header
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != base.id and not create_pr:
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict((repository.commits[parent] if create_pr and parent else base).tree)
        for operation in operations:
            self._apply(operation["key"], operation["value"], tree)
        title, message = header["value"]["summary"], header["value"].get("description", "")
        commit = repository.add_commit(base.id, title, message, user.name, tree)
        result = {
            "success": True,
            "commitOid": commit.id,
            "commitUrl": f"{self.endpoint}/{repo}/commit/{commit.id}",
            "hookOutput": "",
        }
        if create_pr:
            number = len(repository.pull_requests) + 1
            pull = PullRequest(number, title, user.name)
            repository.pull_requests[number] = pull
            repository.branches[pull.reference] = commit.id
            result["pullRequestUrl"] = f"{self.endpoint}/{repo}/discussions/{number}"
        elif branch in repository.branches:
            repository.branches[branch] = commit.id
        else:
            raise RefusalError(404, f"{branch} is not a branch", "RevisionNotFound")
        return json_answer(result)

    def _apply(self, key: str, value: dict[str, Any], tree: dict[str, Blob]) -> None:
        path = value["path"]
        if key == "file":
            assert value["encoding"] == "base64", value["encoding"]
            content = base64.b64decode(value["content"])
            if path == "README.md" and (errors := card_errors(content.decode())):
                raise RefusalError(400, f"Invalid metadata in README.md: {errors[0]}")
            tree[path] = Blob(content, large=False)
        elif key == "lfsFile":
            stored = self.state.large_files.get(value["oid"])
            if stored is None or len(stored) != value["size"]:
                raise RefusalError(400, f"LFS object {value['oid']} of {path} was not uploaded")
            tree[path] = Blob(stored, large=True)
        elif key == "deletedFile":
            if path not in tree:
                raise RefusalError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            del tree[path]
        else:
            raise RefusalError(400, f"unknown operation {key}")

    def create_branch(self, request: Request, repo: str, branch: str) -> Answer:
        repository = self._writable(request, repo, False)
        (name,) = unquoted(branch)
        _check_reference(name)
        if name in repository.branches:
            raise RefusalError(409, "Reference already exists")
        repository.branches[name] = repository.resolve((request.json or {}).get("startingPoint", "main")).id
        return json_answer({})

    def create_tag(self, request: Request, repo: str, revision: str) -> Answer:
        repository = self._writable(request, repo, False)
        _check_reference(request.json["tag"])
        if request.json["tag"] in repository.tags:
            raise RefusalError(409, "Tag already exists")
        repository.tags[request.json["tag"]] = repository.resolve(*unquoted(revision)).id
        return json_answer({})

    def paths_info(self, request: Request, repo: str, revision: str) -> Answer:
        tree = self._visible(request, repo).resolve(*unquoted(revision)).tree
        wanted = dict(re.findall(r"(paths)=([^&]+)", request.body.decode()))
        return json_answer(
            [_entry(path, tree[path], self.state.xet_hashes) for path in unquoted(*wanted.values()) if path in tree]
        )

    def refs(self, request: Request, repo: str) -> Answer:
        repository = self._visible(request, repo)
        branches = {name: target for name, target in repository.branches.items() if not name.startswith("refs/pr/")}
        return json_answer(
            {
                "branches": [_reference(name, f"refs/heads/{name}", target) for name, target in branches.items()],
                "tags": [_reference(name, f"refs/tags/{name}", target) for name, target in repository.tags.items()],
                "converts": [],
                "pullRequests": [],
            }
        )

    def discussions(self, request: Request, repo: str) -> Answer:
        repository = self._visible(request, repo)
        status = request.query.get("status", "all")
        found = [
            {
                "title": pull.title,
                "num": pull.number,
                "author": {"name": pull.author},
                "createdAt": DATE,
                "status": pull.status,
                "repo": {"name": repo, "type": "model"},
                "isPullRequest": True,
            }
            for pull in repository.pull_requests.values()
            if status in ("all", pull.status)
        ]
        return json_answer({"discussions": found, "count": len(found), "start": 0})

    def commits(self, request: Request, repo: str, revision: str) -> Answer:
        history = self._visible(request, repo).history(*unquoted(revision))
        return json_answer(
            [
                {"id": c.id, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": DATE}
                for c in history
            ]
        )

    def tree(self, request: Request, repo: str, revision: str) -> Answer:
        tree = self._visible(request, repo).resolve(*unquoted(revision)).tree
        return json_answer([_entry(path, blob, self.state.xet_hashes) for path, blob in sorted(tree.items())])

    def info(self, request: Request, repo: str, revision: str = "main") -> Answer:
        repository = self._visible(request, repo)
        commit = repository.resolve(*unquoted(revision))
        return json_answer(
            {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": commit.id,
                "private": repository.private,
                "tags": [],
                "siblings": [{"rfilename": path} for path in sorted(commit.tree)],
                "cardData": _card_data(commit),
            }
        )

    def _user(self, request: Request) -> User:
        user = self.state.user(request.token)
        if user is None:
            raise RefusalError(401, "Invalid username or password.")
        return user

    def _visible(self, request: Request, repo: str) -> Repository:
        return self.state.visible(repo, self.state.user(request.token))

    def _writable(self, request: Request, repo: str, proposal: bool) -> Repository:
        """A repository that the user may change, or propose a change to."""
        repository, user = self._visible(request, repo), self._user(request)
        may = user.role != "read" if proposal else user.may_write(repo.split("/")[0], repo)
        if not may:
            raise RefusalError(403, "You don't have the required permissions to perform this action")
        return repository


def _entry(path: str, blob: Blob, xet_hashes: dict[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
    if blob.large:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
    if blob.sha256 in xet_hashes:
        entry["xetHash"] = xet_hashes[blob.sha256]
    return entry


def _check_reference(name: str) -> None:
    """Names that Git takes, as far as tests need it (git-check-ref-format(1))."""
    if re.search(r"[\s~^:?*\[\\]|\.\.", name) or re.fullmatch("[0-9a-f]{40}", name):
        raise RefusalError(400, f"Invalid reference name: {name}")


def _reference(name: str, ref: str, target: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": target}


def _card_data(commit: Commit) -> dict[str, Any] | None:
    import yaml

    card = commit.tree.get("README.md")
    found = re.match(r"---\n(.*?)\n---\n", card.content.decode(), re.DOTALL) if card else None
    return yaml.safe_load(found[1]) if found else None
