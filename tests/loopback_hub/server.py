"""Sockets: reads requests, lets faults strike, sends answers. Listens on 127.0.0.1 only and stops with its context."""

import re
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from loopback_hub.api import Api
from loopback_hub.faults import Fault
from loopback_hub.files import Files
from loopback_hub.messages import Answer, Request, json_answer
from loopback_hub.state import HubState, RefusalError, Repository, User
from loopback_hub.xet import Xet

Routes = Sequence[tuple[str, str, Callable[..., Answer]]]


class LoopbackHub:
    """A Hub and its CDN, for the time of a `with` block.

    Attributes:
        endpoint: its address.
        state: what it remembers.
        faults: what goes wrong from now on.
        xet: its Xet storage, for clients that use it.
        requests: "METHOD /path" of every request that came, in order.
    """

    def __init__(self, users: list[User], *, large_from_bytes: int = 10_000, part_bytes: int | None = None) -> None:
        self.state = HubState(users)
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._stopping = threading.Event()
        self._servers = [_Server(self), _Server(self)]
        self.endpoint = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.cdn = f"http://localhost:{self._servers[1].server_port}"  # another host by name, as a CDN is
        files = Files(self.state, self.endpoint, self.cdn, part_bytes)
        self.xet = Xet(self.state, self.cdn)
        self._servers[0].routes = [
            *Api(self.state, self.endpoint, large_from_bytes).routes,
            *files.routes,
            *self.xet.routes,
        ]
        self._servers[1].routes = [*files.cdn_routes, *self.xet.storage_routes]
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in self._servers
        ]

    def __enter__(self) -> "LoopbackHub":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()

    def repository(self, repo_id: str) -> Repository:
        """A repository, seen from inside."""
        return self.state.repositories[repo_id]

    def add_repository(self, repo_id: str, private: bool = False) -> Repository:
        """An empty repository, as its owner would create it."""
        repository = Repository(repo_id, private, repo_id.split("/")[0])
        self.state.repositories[repo_id] = repository
        return repository

    def fault_for(self, request: str) -> Fault | None:
        """The first fault that strikes this request."""
        return next((fault for fault in self.faults if fault.strikes(request)), None)

    def wait(self, seconds: float) -> None:
        """Let a client wait, but not the end of a test."""
        self._stopping.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    routes: Routes = ()

    def __init__(self, hub: LoopbackHub) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what many tests are about; anything else shows in the answer (500)."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: `LoopbackHub.requests` holds what tests look at."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, url.path, dict(parse_qsl(url.query)), headers, self._read_body())
        name = f"{request.method} {request.path}"
        hub = self.server.hub
        hub.requests.append(name)
        fault = hub.fault_for(name)
        if fault is not None and fault.kind == "drop_before":
            return self._drop()
        if fault is not None and fault.kind == "status":
            return self._send(_fault_answer(fault))
        with hub.state.lock:
            if fault is not None and fault.effect is not None:
                fault.effect()
            answer = self._answer(request)
        if fault is None or fault.kind == "meanwhile":
            return self._send(answer)
        if fault.kind == "drop_after":
            return self._drop()
        if fault.kind == "status_after":
            return self._send(_fault_answer(fault))
        if fault.kind == "truncate":
            return self._send(answer, keep=len(answer.body) // 2)
        if fault.kind == "flip":
            return self._send(replace(answer, body=_flipped(answer.body)))
        hub.wait(fault.seconds)
        return self._send(answer)

    do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815

    def _answer(self, request: Request) -> Answer:
        try:
            for method, pattern, route in self.server.routes:
                found = re.fullmatch(pattern, request.path)
                if method == request.method and found:
                    return route(request, *found.groups())
            raise RefusalError(404, f"no route for {request.method} {request.path}")
        except RefusalError as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            return json_answer({"error": str(refusal)}, refusal.status, **headers)
        except Exception as error:
            return json_answer({"error": f"the loopback Hub failed: {error!r}"}, 501)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Answer, keep: int | None = None) -> None:
        """Send an answer, or promise all of it and send only `keep` bytes."""
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body if keep is None else answer.body[:keep])
        if keep is not None:
            self._drop()

    def _drop(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _flipped(content: bytes) -> bytes:
    """The content with the lowest bit of its middle byte flipped."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else content


def _fault_answer(fault: Fault) -> Answer:
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    if fault.html:
        return Answer(fault.status, b"<html><body>Gateway</body></html>", {"Content-Type": "text/html", **headers})
    return json_answer({"error": "a fault"}, fault.status, **headers)
