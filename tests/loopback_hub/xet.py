"""Xet storage, as far as the client needs it: xorbs and shards come in, reconstructions and byte ranges go out.

Formats as in the Xet protocol's specification (huggingface.co/docs/xet). Chunks are expected uncompressed, which the client
is told by its setting HF_XET_XORB_COMPRESSION_POLICY=none; the newer upload interfaces are answered with 404, upon which
the client takes the specified ones.
"""

import hashlib
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loopback_hub.files import ranged
from loopback_hub.messages import Answer, Request, json_answer
from loopback_hub.state import HubState, RefusalError

_RECORD = 48
_SHARD_HEADER = 48
_BOOKEND = b"\xff" * 32
_WITH_VERIFICATION, _WITH_METADATA = 1 << 31, 1 << 30
_REPO = r"/api/models/([^/]+/[^/]+)"


@dataclass(frozen=True)
class Term:
    """A run of chunks of one xorb."""

    xorb: str
    unpacked_bytes: int
    first: int
    end: int


@dataclass(frozen=True)
class XetFile:
    """A file as runs of chunks."""

    hash: str
    sha256: str
    terms: tuple[Term, ...]


class Xet:
    """Answers to requests for Xet tokens (on the Hub) and contents (on its own address)."""

    def __init__(self, state: HubState, address: str) -> None:
        self.state = state
        self.address = address
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, XetFile] = {}
        self.routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", rf"{_REPO}/xet-(read|write)-token/([^/]+)", self.token)
        ]
        self.storage_routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", r"/v1/chunks/.*", self.unknown_chunk),
            ("POST", r"/v1/xorbs/default/([0-9a-f]{64})", self.put_xorb),
            ("POST", r"/v1/shards", self.put_shard),
            ("GET", r"/v1/reconstructions/([0-9a-f]{64})", self.reconstruction),
            ("GET", r"/xorbs/([0-9a-f]{64})", self.get_xorb),
            ("POST", r"/v1/telemetry", lambda request: json_answer({})),
        ]

    def token(self, request: Request, repo: str, kind: str, revision: str) -> Answer:
        user = self.state.user(request.token)
        self.state.visible(repo, user)
        if kind == "write" and (user is None or user.role == "read"):
            raise RefusalError(403, "This token may not write")
        expires = int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": self.address, "X-Xet-Access-Token": kind, "X-Xet-Token-Expiration": str(expires)}
        return json_answer({"casUrl": self.address, "accessToken": kind, "exp": expires}, **headers)

    def unknown_chunk(self, request: Request) -> Answer:
        raise RefusalError(404, "not deduplicated")

    def put_xorb(self, request: Request, name: str) -> Answer:
        self._allow(request, "write")
        self.xorbs[name] = request.body
        return json_answer({"was_inserted": True})

    def put_shard(self, request: Request) -> Answer:
        self._allow(request, "write")
        for file in _read_shard(request.body):
            content = b"".join(self._chunks(term) for term in file.terms)
            if hashlib.sha256(content).hexdigest() != file.sha256:
                raise RefusalError(400, "The content does not have this hash")
            self.files[file.hash] = file
            self.state.large_files[file.sha256] = content
            self.state.xet_hashes[file.sha256] = file.hash
        return json_answer({"result": 1})

    def reconstruction(self, request: Request, name: str) -> Answer:
        self._allow(request, "read")
        file = self.files[name]
        first, last = 0, sum(term.unpacked_bytes for term in file.terms) - 1
        if "range" in request.headers:
            first, last = (int(part) for part in request.headers["range"].removeprefix("bytes=").split("-"))
        terms, fetch_info = [], {}
        start, offset = 0, None
        for term in file.terms:
            stop = start + term.unpacked_bytes
            if start <= last and stop > first:
                offset = first - start if offset is None else offset
                places = list(_chunk_places(self.xorbs[term.xorb]))
                chunks = {"start": term.first, "end": term.end}
                terms.append({"hash": term.xorb, "unpacked_length": term.unpacked_bytes, "range": chunks})
                fetch_info.setdefault(term.xorb, []).append(
                    {
                        "range": chunks,
                        "url": f"{self.address}/xorbs/{term.xorb}",
                        "url_range": {"start": places[term.first][0], "end": places[term.end - 1][1] - 1},
                    }
                )
            start = stop
        if not terms:
            return Answer(416)
        return json_answer({"offset_into_first_range": offset, "terms": terms, "fetch_info": fetch_info})

    def get_xorb(self, request: Request, name: str) -> Answer:
        return ranged(request, self.xorbs[name], {"Accept-Ranges": "bytes"})

    def _chunks(self, term: Term) -> bytes:
        xorb = self.xorbs[term.xorb]
        places = list(_chunk_places(xorb))[term.first : term.end]
        if any(xorb[start + 4] != 0 for start, _ in places):
            raise RefusalError(400, "compressed chunks: set HF_XET_XORB_COMPRESSION_POLICY=none")
        return b"".join(xorb[start + 8 : end] for start, end in places)

    def _allow(self, request: Request, kind: str) -> None:
        if request.token != kind:
            raise RefusalError(401, "wrong Xet token")


def _chunk_places(xorb: bytes) -> Iterator[tuple[int, int]]:
    """Where each chunk lies, its header of 8 bytes (version, size, scheme, unpacked size) included."""
    start = 0
    while start + 8 <= len(xorb) and xorb[start] == 0:
        end = start + 8 + int.from_bytes(xorb[start + 1 : start + 4], "little")
        yield start, end
        start = end


def _read_shard(shard: bytes) -> Iterator[XetFile]:
    """The files of a shard: a header, its runs of chunks, their verifications, and its SHA-256."""
    at = _SHARD_HEADER
    while (name := shard[at : at + 32]) != _BOOKEND:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        at += _RECORD
        terms = []
        for record in range(at, at + count * _RECORD, _RECORD):
            _, unpacked, first, end = struct.unpack_from("<IIII", shard, record + 32)
            terms.append(Term(_hex(shard[record : record + 32]), unpacked, first, end))
        at += count * _RECORD * (2 if flags & _WITH_VERIFICATION else 1)
        assert flags & _WITH_METADATA, "a shard without SHA-256"
        yield XetFile(_hex(name), _hex(shard[at : at + 32]), tuple(terms))
        at += _RECORD


def _hex(value: bytes) -> str:
    """A hash as the protocol writes it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", value))
