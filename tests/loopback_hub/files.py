"""Contents: uploads of large files, whole or in parts, and downloads by way of a second address, as from a CDN."""

import hashlib
import re
from collections.abc import Callable

from loopback_hub.messages import Answer, Request, json_answer, unquoted
from loopback_hub.state import HubState, RefusalError

_REPO = r"/([^/]+/[^/]+)"


class Files:
    """Answers to requests for contents."""

    def __init__(self, state: HubState, endpoint: str, cdn: str, part_bytes: int | None) -> None:
        self.state = state
        self.endpoint = endpoint
        self.cdn = cdn
        self.part_bytes = part_bytes
        self.routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("POST", rf"{_REPO}\.git/info/lfs/objects/batch", self.batch),
            ("PUT", r"/_store/([0-9a-f]{64})", self.store),
            ("PUT", r"/_store/([0-9a-f]{64})/(\d+)", self.store_part),
            ("POST", r"/_store/([0-9a-f]{64})/complete", self.complete),
            ("POST", r"/_store/verify", self.verify),
            ("HEAD", rf"{_REPO}/resolve/([^/]+)/(.+)", self.resolve),
            ("GET", rf"{_REPO}/resolve/([^/]+)/(.+)", self.resolve),
        ]
        self.cdn_routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", r"/([0-9a-f]{64})", self.large_content),
            ("HEAD", r"/([0-9a-f]{64})", self.large_content),
        ]

    def batch(self, request: Request, repo: str) -> Answer:
        self.state.visible(repo, self.state.user(request.token))
        objects = []
        for item in request.json["objects"]:
            oid, size = item["oid"], item["size"]
            entry = {"oid": oid, "size": size}
            if oid not in self.state.large_files:
                entry["actions"] = {
                    "upload": self._upload_action(oid, size),
                    "verify": {"href": f"{self.endpoint}/_store/verify"},
                }
            objects.append(entry)
        return json_answer({"transfer": "basic", "objects": objects})

    def _upload_action(self, oid: str, size: int) -> dict:
        place = f"{self.endpoint}/_store/{oid}"
        if self.part_bytes is None or size <= self.part_bytes:
            return {"href": place}
        count = -(-size // self.part_bytes)
        parts = {str(number): f"{place}/{number}" for number in range(1, count + 1)}
        return {"href": f"{place}/complete", "header": {"chunk_size": str(self.part_bytes), **parts}}

    def store(self, request: Request, oid: str) -> Answer:
        self._keep(oid, request.body)
        return Answer(200)

    def store_part(self, request: Request, oid: str, number: str) -> Answer:
        self.state.parts.setdefault(oid, {})[int(number)] = request.body
        return Answer(200, headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def complete(self, request: Request, oid: str) -> Answer:
        parts = self.state.parts.get(oid, {})
        if oid in self.state.large_files:
            return json_answer({})
        named = {part["partNumber"]: part["etag"].strip('"') for part in request.json["parts"]}
        if named != {number: hashlib.md5(content).hexdigest() for number, content in parts.items()}:
            raise RefusalError(400, "The parts do not fit")
        self._keep(oid, b"".join(content for _, content in sorted(self.state.parts.pop(oid).items())))
        return json_answer({})

    def verify(self, request: Request) -> Answer:
        wanted = request.json
        if len(self.state.large_files.get(wanted["oid"], b"")) != wanted["size"]:
            raise RefusalError(404, "Object does not exist")
        return json_answer({})

    def resolve(self, request: Request, repo: str, revision: str, path: str) -> Answer:
        repository = self.state.visible(repo, self.state.user(request.token))
        commit = repository.resolve(*unquoted(revision))
        blob = commit.tree.get(*unquoted(path))
        if blob is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        if blob.sha256 in self.state.xet_hashes:
            headers |= {"X-Xet-Hash": self.state.xet_hashes[blob.sha256]}
            headers |= {"Link": f'<{self.endpoint}/api/models/{repo}/xet-read-token/{commit.id}>; rel="xet-auth"'}
        if blob.large:
            headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-Etag": f'"{blob.sha256}"'}
            return Answer(302, b"", {**headers, "ETag": f'"{blob.oid}"', "Location": f"{self.cdn}/{blob.sha256}"})
        return ranged(request, blob.content, {**headers, "ETag": f'"{blob.oid}"'})

    def large_content(self, request: Request, oid: str) -> Answer:
        if "authorization" in request.headers:
            raise RefusalError(400, "The token was sent to another host")
        return ranged(request, self.state.large_files[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusalError(400, "The content does not have this hash")
        self.state.large_files[oid] = content


def ranged(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    """The whole content, or the range that was asked for."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not found:
        return Answer(200, content, headers)
    first = int(found[1])
    last = int(found[2]) if found[2] else len(content) - 1
    if first >= len(content):
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
    return Answer(206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"})
