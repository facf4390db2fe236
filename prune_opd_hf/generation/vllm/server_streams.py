"""The requests of one `generate` over vLLM's servers: a coroutine each, on an event loop in a thread of its own.

    coroutines -> server-sent events -> a queue -> `streams.completions` in the caller's thread

A server that fails is asked nothing until it has recovered, with the right weights; its answers begin anew, there or elsewhere.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from prune_opd_hf.errors import ServingError
from prune_opd_hf.generation.engine import NewTokens
from prune_opd_hf.serving import GENERATE, Client, Server, ServerPool, TransientError

if TYPE_CHECKING:
    from prune_opd_hf.generation.vllm.server import VLLMServerEngine

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""Times that one response is begun; a server that is not there is waited for and not counted."""

GATHER_SECONDS, GATHER_GAP_SECONDS = 0.02, 0.003
"""A server's step sends tokens of all its rows one after the other: so long they are gathered, so that one pass scores them."""

FIRST_WAIT_SECONDS = 0.5
MAX_WAIT_SECONDS = 8.0


class ServerStreams:
    """The requests of one `generate`, as a `TokenSource`."""

    def __init__(self, engine: "VLLMServerEngine", bodies: list[dict[str, Any]]) -> None:
        self.engine, self.bodies = engine, bodies
        self.arrived: queue.SimpleQueue[NewTokens | BaseException] = queue.SimpleQueue()
        self.cancelled: set[int] = set()
        self.running: dict[int, tuple[Server, asyncio.Task]] = {}
        self.last_sign: dict[Server, float] = {}
        self.loop = asyncio.new_event_loop()
        self.all: asyncio.Task | None = None
        self.thread = threading.Thread(target=self._run, name="vllm-streams", daemon=True)
        self.thread.start()

    def next(self) -> list[NewTokens]:
        found, deadline = [self.arrived.get()], time.monotonic() + GATHER_SECONDS
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < deadline:
                found.append(self.arrived.get(timeout=GATHER_GAP_SECONDS))
        return self._drain(found)

    def finish(self) -> None:
        """Wait for the end, which every row has come to, and for what is found then."""
        self.thread.join()
        self._drain([])

    def _drain(self, found: list[Any]) -> list[NewTokens]:
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
        for row in rows:
            if row in self.running:
                self.running[row][1].cancel()

    async def _every_row(self) -> None:
        prompts = {tuple(body["token_ids"]): None for body in self.bodies}
        numbers = {prompt: number for number, prompt in enumerate(prompts)}
        servers = self.engine.settings.servers
        async with Client(servers.timeout) as self.client, ServerPool(servers, self.client, self._recover) as self.pool:
            tasks = [
                asyncio.create_task(self._row(row, numbers[tuple(body["token_ids"])]))
                for row, body in enumerate(self.bodies)
            ]
            canceller = asyncio.create_task(self._cancel_stalled_streams(servers.timeout))
            try:
                for done in asyncio.as_completed(tasks):
                    await done
                await self._check_versions()
            finally:
                for task in (*tasks, canceller):
                    task.cancel()
                await asyncio.gather(*tasks, canceller, return_exceptions=True)

    async def _row(self, row: int, home: int) -> None:
        """One response: samples of one prompt have one home, so that its tokens are read once."""
        for attempt in range(ATTEMPTS):
            if row in self.cancelled:
                return None
            server = await self.pool.available(home)
            stream = asyncio.create_task(self._stream(server, row))
            self.running[row] = server, stream
            try:
                await asyncio.wait([stream])
            except asyncio.CancelledError:
                stream.cancel()
                await asyncio.wait([stream])
                raise
            del self.running[row]
            if row in self.cancelled:
                return None
            try:
                return stream.result()
            except asyncio.CancelledError:
                fault = f"gave no sign for {self.engine.settings.server_timeout:g} s"
            except TransientError as error:
                fault = str(error)
            self.pool.mark_unavailable(server, fault)
            await asyncio.sleep(min(FIRST_WAIT_SECONDS * 2**attempt, MAX_WAIT_SECONDS))
        raise ServingError(
            f"vLLM at {server.url} {fault}; a response was begun {ATTEMPTS} times. Look into its log; a training run goes on "
            "with --resume_from_checkpoint true"
        )

    async def _stream(self, server: Server, row: int) -> None:
        if [other for other, _ in self.running.values()].count(server) == 1:
            self.last_sign[server] = time.monotonic()
        start = 0
        async with contextlib.aclosing(self.client.events(server.url, GENERATE, self.bodies[row])) as events:
            async for event in events:
                self.last_sign[server] = time.monotonic()
                new = self.engine.new_tokens(server.url, row, start, event)
                self.arrived.put(new)
                if new.end is not None:  # the answer is whole, whatever becomes of the connection
                    return
                start += len(new.token_ids)
        raise TransientError("ended its answer too early")

    async def _cancel_stalled_streams(self, limit: float) -> None:
        """End the streams of a server that hangs."""
        while True:
            await asyncio.sleep(min(limit / 4, 5.0))
            for server, stream in self.running.values():
                if time.monotonic() - self.last_sign[server] > limit:
                    stream.cancel()

    async def _check_versions(self) -> None:
        """Answers that were cancelled did not say which weights they came from: those that the servers have still."""
        weights = self.engine.weights
        if weights is None or not self.cancelled:
            return
        for server in self.pool.servers:
            if server.ready.is_set() and not await self.engine.has_weights(self.client, server.url, weights):
                raise ServingError(
                    f"vLLM at {server.url} was given other weights than {weights.version} while it sampled: let one run use it at "
                    "a time"
                )

    async def _recover(self, client: Client, url: str) -> None:
        await client.call(url, "/health")
        weights = self.engine.weights
        if weights is not None and not await self.engine.has_weights(client, url, weights):
            logger.warning("vLLM at %s has other weights than %s; they are sent again", url, weights.version)
            await self.engine.send_weights(client, url, weights)
