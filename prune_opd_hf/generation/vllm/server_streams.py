"""The requests of one `generate` over vLLM's servers: a coroutine each, on an event loop in a thread of its own.

    coroutines -> server-sent events -> a queue -> `streams.completions` in the caller's thread

A server that fails is asked nothing until it has recovered, with the right weights; its answers begin anew, there or elsewhere.
The end of an answer says which weights it came from. One that is cancelled has no end: its server is asked instead.

Streams have no back-pressure: a server samples on while the watch scores. Where the watch may stop rows, each is therefore asked
for in pieces of a block, whose prompt is what there is of the row (the prefix cache knows it), and the next piece is asked for
when at most one block is not scored yet:

    asked for  |one block|one block|one block|
    scored     ==========

So at most two blocks are sampled past a stop, however slowly a watch scores that scores every block. A piece's prompt is sent
whole: that of long rows is 1/32 of them where this is more than a block, or what is sent would grow with the square of their
length. Where pieces end depends on lengths alone, and so do their seeds.
"""

import asyncio
import contextlib
import logging
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from prune_opd_hf.errors import ServingError
from prune_opd_hf.generation.engine import NewTokens, Request, request_seed
from prune_opd_hf.generation.ragged_watch import RaggedDriftWatch
from prune_opd_hf.serving.client import GENERATE, Client, TransientError
from prune_opd_hf.serving.servers import ATTEMPTS, Server, ServerPool, gather_or_cancel, pause_before

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from prune_opd_hf.generation.vllm.server import VLLMServerEngine

logger = logging.getLogger(__name__)

GATHER_GAP_STEPS, GATHER_STEPS, LONGEST_STEP_SECONDS = 2, 4, 0.05
"""A server's step sends tokens of all its rows one after the other, and rows that began together are a step or two apart. Where
the watch has to wait for tokens, they are gathered, so that one pass scores them: until nothing has come for the time of two
steps, and for that of four at most."""

PLAIN_INTERVAL = 64
"""Tokens of an event where no watch waits for them."""

SHORTEST_BLOCK, ROW_PARTS = 16, 32
"""Where the watch may stop rows, they are asked for in pieces: of a block, which has at least 16 tokens, or of the 32nd part of
what there is of a longer row."""

MOST_STREAMS, OTHER_FILES = 512, 256
"""Whole responses that a server is asked for at a time: as many as it samples at once, few enough to be accepted within
seconds; and files that a process may want beside its streams."""


class ServerStreams:
    """The requests of one `generate`, as a `TokenSource`."""

    def __init__(
        self,
        engine: "VLLMServerEngine",
        requests: Sequence[Request],
        caps: Sequence[int],
        watch: RaggedDriftWatch | None,
    ) -> None:
        self.engine, self.requests, self.caps = engine, requests, caps
        self.interval = PLAIN_INTERVAL if watch is None else watch.check_every
        self.block = max(SHORTEST_BLOCK, self.interval)
        earliest = None if watch is None else watch.earliest_stop
        self.first_piece = None if earliest is None else -(-max(earliest, 1) // self.block) * self.block
        self.arrived: queue.SimpleQueue[tuple[int, NewTokens] | BaseException] = queue.SimpleQueue()
        self.handed_out: dict[int, tuple[int, int]] = {}
        """Of each row the attempt, and how many of its tokens the caller has got."""
        self.cancelled: dict[int, int] = {}
        """Rows of which nothing more is wanted, and the attempt whose tokens are kept."""
        self.attempts = [0] * len(requests)
        self.begun: dict[tuple[int, int], tuple[Server, int]] = {}
        """By row and attempt: where its last piece was begun, and how often weights had been sent there again."""
        self.sent_again: Counter[str] = Counter()
        self.running: dict[int, asyncio.Task] = {}
        self.asked: dict[int, Server] = {}
        self.last_sign: dict[Server, float] = {}
        self.step_seconds = 0.0
        """Of one of the server's decoding steps, as its events come in."""
        self.scored = [0] * len(requests)
        self.news = [asyncio.Event() for _ in requests]
        self.loop = asyncio.new_event_loop()
        self.all: asyncio.Task | None = None
        self.thread = threading.Thread(target=self._run, name="vllm-streams", daemon=True)
        self.thread.start()

    def next(self) -> list[NewTokens]:
        news = self._drain([])
        if news:
            return news
        found = [self.arrived.get()]
        deadline = time.monotonic() + GATHER_STEPS * self.step_seconds
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < deadline:
                found.append(self.arrived.get(timeout=GATHER_GAP_STEPS * self.step_seconds))
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
        news = []
        for item in found:
            if isinstance(item, BaseException):
                raise item
            attempt, new = item
            self.handed_out[new.row] = attempt, new.start + len(new.token_ids)
            news.append(new)
        return news

    def cancel(self, rows: Sequence[int]) -> None:
        self._in_thread(self._cancel, {row: self.handed_out[row][0] for row in rows}, dict(self.handed_out))

    def undisturbed(self) -> contextlib.nullcontext:
        return contextlib.nullcontext()

    def close(self) -> None:
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

    def _cancel(self, rows: dict[int, int], scored: dict[int, tuple[int, int]]) -> None:
        self.cancelled.update(rows)
        for row in rows:
            if row in self.running:
                self.running[row].cancel()
        for row, (attempt, tokens) in scored.items():
            if attempt == self.attempts[row]:
                self.scored[row] = tokens
                self.news[row].set()

    async def _every_row(self) -> None:
        prompts = dict.fromkeys(request.prompt_ids for request in self.requests)
        homes = {prompt: number for number, prompt in enumerate(prompts)}
        servers = self.engine.servers
        # Pieces of more rows than the servers take at a time would wait behind each other. Whole responses may wait at the server.
        wanted = MOST_STREAMS * len(servers.urls) if self.first_piece is None else self.engine.slots
        self.slots = asyncio.Semaphore(min(wanted, _most_connections()))
        async with servers.client() as self.client, ServerPool(servers, self.client, self._recover) as self.pool:
            canceller = asyncio.create_task(self._cancel_stalled_streams())
            try:
                await gather_or_cancel(
                    self._row(row, homes[request.prompt_ids]) for row, request in enumerate(self.requests)
                )
            finally:
                canceller.cancel()
                await asyncio.gather(canceller, return_exceptions=True)

    async def _row(self, row: int, home: int) -> None:
        """One response: samples of one prompt have one home, so that its tokens are read once."""
        async with self.slots:
            for attempt in range(ATTEMPTS):
                await pause_before(attempt)
                server = await self.pool.available(home)
                if row in self.cancelled:  # while it waited to begin anew
                    return await self._check_weights(row)
                self.attempts[row] = attempt
                self.running[row] = response = asyncio.create_task(self._response(server, row))
                try:
                    await asyncio.wait([response])
                except asyncio.CancelledError:
                    response.cancel()
                    await asyncio.wait([response])
                    raise
                del self.running[row]
                if row in self.cancelled:
                    return await self._check_weights(row)
                try:
                    return response.result()
                except asyncio.CancelledError:
                    fault = f"gave no sign for {self.engine.servers.timeout:g} s"
                except TransientError as error:
                    fault = str(error)
                self.pool.mark_unavailable(server, fault)
            raise ServingError(
                f"vLLM at {server.url} {fault}; a response was begun {ATTEMPTS} times. Look into its log; a training run goes on "
                "with --resume_from_checkpoint true"
            )

    async def _response(self, server: Server, row: int) -> None:
        """One response from its beginning, piece by piece."""
        tokens: list[int] = []
        self.scored[row] = 0
        count = self.first_piece or self.caps[row]
        while not await self._piece(server, row, tokens, min(count, self.caps[row] - len(tokens))):
            while len(tokens) - self.scored[row] > self.block:
                self.news[row].clear()
                await self.news[row].wait()
            count = self.block * max(1, len(tokens) // (ROW_PARTS * self.block))

    async def _piece(self, server: Server, row: int, tokens: list[int], count: int) -> bool:
        """The next `count` tokens of a response. Returns whether it has ended."""
        if not server.ready.is_set():  # it may be there, with other weights
            raise TransientError("failed while this response waited to be scored")
        request, start, attempt = self.requests[row], len(tokens), self.attempts[row]
        self.begun[row, attempt] = server, self.sent_again[server.url]
        seed = request_seed(request.seed, start) if start else request.seed
        body = self.engine.body([*request.prompt_ids, *tokens], count, seed=seed, interval=self.interval)
        if server not in self.asked.values():
            self.last_sign[server] = time.monotonic()
        self.asked[row], before = server, None
        try:
            async with contextlib.aclosing(self.client.events(server.url, GENERATE, body)) as events:
                async for event in events:
                    self.last_sign[server] = now = time.monotonic()
                    new = self.engine.new_tokens(server.url, row, len(tokens), event)
                    tokens += new.token_ids
                    if before is not None and new.token_ids:
                        self._note_step((now - before) / len(new.token_ids))
                    before = now
                    is_last = new.end == "eos" or len(tokens) == self.caps[row]
                    if new.end == "length" and len(tokens) < start + count:
                        break
                    self.arrived.put((attempt, new if is_last else new._replace(end=None)))
                    if new.end is not None:  # the answer is whole, whatever becomes of the connection
                        return is_last
        finally:
            del self.asked[row]
        raise TransientError("ended its answer too early")

    def _note_step(self, seconds: float) -> None:
        """Seconds of one more decoding step, into their running mean."""
        share = 1 / 8 if self.step_seconds else 1.0
        self.step_seconds += (min(seconds, LONGEST_STEP_SECONDS) - self.step_seconds) * share

    async def _cancel_stalled_streams(self) -> None:
        """End the streams of a server that hangs."""
        limit = self.engine.servers.timeout
        while True:
            await asyncio.sleep(min(limit / 4, 5.0))
            for row, server in self.asked.items():
                if time.monotonic() - self.last_sign[server] > limit:
                    self.running[row].cancel()

    async def _check_weights(self, row: int) -> None:
        """A row that was cancelled came from the weights that its server has still, and has had since the last piece was begun. One
        that is gone had them when it was begun."""
        server, sent_again = self.begun[row, self.cancelled[row]]
        weights, servers = self.engine.weights, self.engine.servers
        are_held = await servers.retry_until_timeout(weights.are_held_by, self.client, server.url, weights.gone)
        if are_held is None:
            return
        if not are_held or self.sent_again[server.url] != sent_again:
            raise ServingError(
                f"vLLM at {server.url} was started anew, or was given other weights than {self.engine.weights_version}, while it "
                "sampled: let one run use it at a time; a training run goes on with --resume_from_checkpoint true"
            )

    async def _recover(self, client: Client, url: str) -> None:
        await client.call(url, "/health")
        weights = self.engine.weights
        if weights.current is not None and not await weights.are_held_by(client, url):
            logger.warning("vLLM at %s has other weights than %s; they are sent again", url, weights.current.version)
            self.sent_again[url] += 1
            await weights.send(client, url, weights.current)
        weights.gone.discard(url)


def _most_connections() -> int:
    """How many a process may have: most machines allow 1,024 open files."""
    if resource is None:  # Windows
        return MOST_STREAMS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(soft - OTHER_FILES, soft // 2)
