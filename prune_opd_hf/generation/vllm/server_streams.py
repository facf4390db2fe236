"""The requests of one `generate` over vLLM's servers: a coroutine each, on an event loop in a thread of its own.

    coroutines -> server-sent events -> a queue -> `streams.completions` in the caller's thread

A server that fails is asked nothing more until it is well, with the right weights; its answers begin anew, there or elsewhere.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prune_opd_hf.errors import ServingError
from prune_opd_hf.generation.engine import NewTokens
from prune_opd_hf.generation.vllm.client import GENERATE, Client, TransientError

if TYPE_CHECKING:
    from prune_opd_hf.generation.vllm.server import VLLMServerEngine

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""Times that one response is begun; a server that is not there is waited for and not counted."""

GATHER_SECONDS, GATHER_GAP_SECONDS = 0.02, 0.003
"""A server's step sends tokens of all its rows one after the other: so long they are gathered, so that one pass scores them."""

FIRST_WAIT_SECONDS = 0.5
MAX_WAIT_SECONDS = 8.0


@dataclass(eq=False)
class _Server:
    """One server while requests run.

    Attributes:
        streams: the answers that it is giving, by row.
        last_sign: when it last sent anything.
        back: set while it can be asked.
        fault: why it cannot, where it is given up.
    """

    url: str
    streams: dict[int, asyncio.Task] = field(default_factory=dict)
    last_sign: float = 0.0
    back: asyncio.Event = field(default_factory=asyncio.Event)
    reviving: asyncio.Task | None = None
    fault: Exception | None = None


class ServerStreams:
    """The requests of one `generate`, as a `TokenSource`."""

    def __init__(self, engine: "VLLMServerEngine", bodies: list[dict[str, Any]]) -> None:
        self.engine, self.bodies = engine, bodies
        self.arrived: queue.SimpleQueue[NewTokens | BaseException] = queue.SimpleQueue()
        self.cancelled: set[int] = set()
        self.loop = asyncio.new_event_loop()
        self.all: asyncio.Task | None = None
        self.thread = threading.Thread(target=self._run, name="vllm-streams", daemon=True)
        self.thread.start()

    def next(self) -> list[NewTokens]:
        found, deadline = [self.arrived.get()], time.monotonic() + GATHER_SECONDS
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < deadline:
                found.append(self.arrived.get(timeout=GATHER_GAP_SECONDS))
        return self._taken(found)

    def finish(self) -> None:
        """Wait for the end, which every row has come to, and for what is found then."""
        self.thread.join()
        self._taken([])

    def _taken(self, found: list[Any]) -> list[NewTokens]:
        """These, and what else has arrived."""
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self.arrived.get_nowait())
        for item in found:
            if isinstance(item, BaseException):
                raise item
        return found

    def cancel(self, rows: Sequence[int]) -> None:
        self._in_thread(self._cancel, list(rows))

    def undisturbed(self) -> contextlib.nullcontext:
        return contextlib.nullcontext()

    def close(self) -> None:
        """End whatever still runs."""
        self._in_thread(lambda: self.all is not None and self.all.cancel())
        self.thread.join()

    def _in_thread(self, call: Callable[..., Any], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and every stream with it
            self.loop.call_soon_threadsafe(call, *arguments)

    # ------------------------------------------------------------------ in the thread of the event loop

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.all = self.loop.create_task(self._every_row())
            self.loop.run_until_complete(self.all)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self.arrived.put(error)
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def _cancel(self, rows: list[int]) -> None:
        self.cancelled.update(rows)
        for server in self.servers:
            for row in rows:
                if row in server.streams:
                    server.streams[row].cancel()

    async def _every_row(self) -> None:
        settings = self.engine.settings
        self.servers = [_Server(url) for url in settings.server_base_url]
        prompts = {tuple(body["token_ids"]): None for body in self.bodies}
        numbers = {prompt: number for number, prompt in enumerate(prompts)}
        async with Client(settings.server_timeout) as self.client:
            await asyncio.gather(*(self._revive(server) for server in self.servers))
            tasks = [
                asyncio.create_task(self._row(row, numbers[tuple(body["token_ids"])]))
                for row, body in enumerate(self.bodies)
            ]
            others = [asyncio.create_task(self._watch_over(server)) for server in self.servers]
            try:
                for done in asyncio.as_completed(tasks):
                    await done
                await self._check_versions()
            finally:
                others += [server.reviving for server in self.servers if server.reviving is not None]
                for task in (*tasks, *others):
                    task.cancel()
                await asyncio.gather(*tasks, *others, return_exceptions=True)

    async def _row(self, row: int, home: int) -> None:
        """One response: samples of one prompt have one home, so that its tokens are read once."""
        fault, server = "", self.servers[home % len(self.servers)]
        for attempt in range(ATTEMPTS):
            if row in self.cancelled:
                return
            server = await self._available(home)
            stream = asyncio.create_task(self._stream(server, row))
            server.streams[row] = stream
            try:
                await asyncio.wait([stream])
            except asyncio.CancelledError:
                stream.cancel()
                await asyncio.wait([stream])
                raise
            del server.streams[row]
            if row in self.cancelled:
                return
            if stream.cancelled():
                fault = f"gave no sign for {self.engine.settings.server_timeout:g} s"
            elif stream.exception() is None:
                return
            else:
                try:
                    stream.result()
                except TransientError as error:
                    fault = str(error)
            self._suspect(server, fault)
            await asyncio.sleep(min(FIRST_WAIT_SECONDS * 2**attempt, MAX_WAIT_SECONDS))
        raise ServingError(
            f"vLLM at {server.url} {fault}; a response was begun {ATTEMPTS} times. Look into its log; a training run goes on "
            "with --resume_from_checkpoint true"
        )

    async def _available(self, home: int) -> _Server:
        """A server that can be asked: the row's own, else the next."""
        while True:
            order = [self.servers[(home + step) % len(self.servers)] for step in range(len(self.servers))]
            for server in order:
                if server.back.is_set():
                    return server
            faults = [server.fault for server in order if server.fault is not None]
            if len(faults) == len(order):
                raise faults[0]
            waits = [asyncio.create_task(server.back.wait()) for server in order]
            waits += [server.reviving for server in order if server.reviving is not None and not server.reviving.done()]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits[: len(order)]:
                wait.cancel()

    async def _stream(self, server: _Server, row: int) -> None:
        if len(server.streams) == 1:
            server.last_sign = time.monotonic()
        start = 0
        async with contextlib.aclosing(self.client.events(server.url, GENERATE, self.bodies[row])) as events:
            async for event in events:
                server.last_sign = time.monotonic()
                new = self.engine.new_tokens(server.url, row, start, event)
                self.arrived.put(new)
                if new.end is not None:  # the answer is whole, whatever becomes of the connection
                    return
                start += len(new.token_ids)
        raise TransientError("ended its answer too early")

    async def _watch_over(self, server: _Server) -> None:
        """End the streams of a server that hangs."""
        limit = self.engine.settings.server_timeout
        while True:
            await asyncio.sleep(min(limit / 4, 5.0))
            if server.streams and time.monotonic() - server.last_sign > limit:
                for stream in list(server.streams.values()):
                    stream.cancel()

    def _suspect(self, server: _Server, fault: str) -> None:
        """Ask it nothing more until it has been seen to be well, with the right weights."""
        if not server.back.is_set():
            return
        logger.warning("vLLM at %s %s; its answers begin anew", server.url, fault)
        server.back.clear()
        server.reviving = asyncio.create_task(self._revive(server))

    async def _revive(self, server: _Server) -> None:
        try:
            await self.engine.patiently(self._make_well, self.client, server.url)
            server.back.set()
        except Exception as error:  # whatever it is: rows wait for this server, and are told by its fault
            server.fault = error

    async def _check_versions(self) -> None:
        """Answers that were cancelled did not say which weights they came from: those that the servers have still."""
        weights = self.engine.weights
        if weights is None or not self.cancelled:
            return
        for server in self.servers:
            if server.back.is_set() and not await self.engine.has_weights(self.client, server.url, weights):
                raise ServingError(
                    f"vLLM at {server.url} was given other weights than {weights.version} while it sampled: let one run use it at "
                    "a time"
                )

    async def _make_well(self, client: Client, url: str) -> None:
        await client.call(url, "/health")
        weights = self.engine.weights
        if weights is not None and not await self.engine.has_weights(client, url, weights):
            logger.warning("vLLM at %s has other weights than %s; they are sent again", url, weights.version)
            await self.engine.send_weights(client, url, weights)
