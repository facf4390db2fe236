"""Several vLLM servers: where they are, retries until a time-out, load balance, and which of them can be asked.

It knows neither what they are asked nor which weights they should hold; whoever asks says what a server needs to recover.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from prune_opd_hf.errors import ConfigError, ServingError
from prune_opd_hf.serving.client import KEY_VARIABLE, Client, TransientError, is_address

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5

ATTEMPTS = 5
"""Times that one request is sent; waiting for a server that is known to be away is not counted."""

FIRST_PAUSE_SECONDS = 0.5
"""Between two attempts: twice as long before each further one."""

FIRST_ANSWER_SECONDS = 10.0
"""For the first answer of each server of a pool; then requests go to those that are there."""

Ask = Callable[[Client, str], Awaitable[Any]]
"""A question to the server at a URL; `TransientError` says that it may be asked again."""


async def pause_before(attempt: int) -> None:
    """Wait before an attempt, which are counted from 0, but the first."""
    if attempt:
        await asyncio.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))


def split_urls(text: str | None) -> tuple[str, ...]:
    """URLs that a setting separates by commas.

    Example:
        >>> split_urls("http://127.0.0.1:8000/, http://127.0.0.1:8001")
        ('http://127.0.0.1:8000', 'http://127.0.0.1:8001')
    """
    return tuple(url.strip().rstrip("/") for url in (text or "").split(",") if url.strip())


@dataclass(frozen=True)
class Servers:
    """Where servers are, and how long a silent one is waited for.

    Attributes:
        urls: of one server or several.
        timeout: seconds without any sign of a server, after which it counts as gone.
        url_setting, timeout_setting: the settings that say so, for messages.
        key_variable: the environment variable with their API key.

    Raises:
        ConfigError: a URL or a number of seconds that cannot be worked with.
    """

    urls: tuple[str, ...]
    timeout: float = 240.0
    url_setting: str = "vllm_server_base_url"
    timeout_setting: str = "vllm_server_timeout"
    key_variable: str = KEY_VARIABLE

    def __post_init__(self) -> None:
        if not self.urls:
            raise ConfigError(f"{self.url_setting} must name at least one server, such as http://127.0.0.1:8000")
        for url in self.urls:
            if not is_address(url) or "@" in url:
                raise ConfigError(
                    f"{self.url_setting} must be http://HOST:PORT, several separated by commas, without a user or a key "
                    f"({self.key_variable} in the environment); got {url.split('@')[-1]!r}"
                )
        if not 0 < self.timeout < float("inf"):
            raise ConfigError(f"{self.timeout_setting} must be a number of seconds above 0, got {self.timeout}")

    def client(self) -> Client:
        """A client for these servers, which get their key and no others."""
        return Client(self.timeout, self.key_variable)

    async def ask_each(self, ask: Ask, gone: set[str] | None = None) -> dict[str, Any]:
        """What each server answers, by URL, without those that are `gone`; transient faults are waited for, together. Where one
        refuses, requests to the others are cancelled, and their last words are waited for: a paused server is resumed."""
        asked = [url for url in self.urls if url not in (gone or ())]
        async with self.client() as client:
            answers = await gather_or_cancel([self.retry_until_timeout(ask, client, url, gone) for url in asked])
        return {url: answer for url, answer in zip(asked, answers, strict=True) if url not in (gone or ())}

    async def retry_until_timeout(self, ask: Ask, client: Client, url: str, gone: set[str] | None = None) -> Any:
        """What a server answers.

        Args:
            gone: where these are given, a server that fails until the time-out becomes one of them and answers None, if another is
                left.

        Raises:
            ServingError: it refuses, or fails until the time-out.
        """
        deadline, logged = time.monotonic() + self.timeout, False
        while True:
            try:
                return await ask(client, url)
            except TransientError as error:
                if time.monotonic() + POLL_SECONDS > deadline:
                    if gone is not None and {*gone, url} != {*self.urls}:
                        gone.add(url)
                        logger.warning("vLLM at %s %s, and is given up; the others go on without it", url, error)
                        return None
                    raise ServingError(
                        f"vLLM at {url} {error}, and was waited for {self.timeout:g} s ({self.timeout_setting}): start it, or "
                        "look into its log; a training run goes on with --resume_from_checkpoint true"
                    ) from error
                if not logged:
                    logger.warning("vLLM at %s %s; waiting for up to %g s", url, error, self.timeout)
                    logged = True
            await asyncio.sleep(POLL_SECONDS)


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """What all of them return, in their order. Where one fails the others are cancelled, and its error is raised when they have
    ended."""
    tasks = [asyncio.create_task(each) for each in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(eq=False)
class Server:
    """One of a pool.

    Attributes:
        url: where it is.
        asked: set once it has answered, or failed, for the first time.
        ready: set while it can be asked.
        recovery: under way where it is neither ready nor given up, or over.
        fault: why it is given up, where it is.
    """

    url: str
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    recovery: asyncio.Task | None = None
    fault: Exception | None = None


class ServerPool:
    """Servers that share requests, on one event loop: those that fail are not asked until they have recovered.

    Args:
        servers: where they are.
        client: for what they need to recover.
        recover: asked of a server before it is used, and after each fault: is it there, does it hold what it should?
    """

    def __init__(self, servers: Servers, client: Client, recover: Ask) -> None:
        self._settings, self._client, self._ask = servers, client, recover
        self.servers = [Server(url) for url in servers.urls]

    async def __aenter__(self) -> "ServerPool":
        for server in self.servers:
            server.recovery = asyncio.create_task(self._recover(server))
        first_answers = asyncio.gather(*(server.asked.wait() for server in self.servers))
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(first_answers, FIRST_ANSWER_SECONDS)
        except asyncio.CancelledError:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: Any) -> None:
        recoveries = [server.recovery for server in self.servers if server.recovery is not None]
        for recovery in recoveries:
            recovery.cancel()
        await asyncio.gather(*recoveries, return_exceptions=True)

    async def available(self, home: int) -> Server:
        """A server that can be asked: number `home`, counted around, else the next. Waits until there is one.

        Raises:
            ServingError: every server was given up.
        """
        order = [self.servers[(home + step) % len(self.servers)] for step in range(len(self.servers))]
        while True:
            for server in order:
                if server.ready.is_set():
                    return server
            if order[0].fault is not None and all(server.fault is not None for server in order):
                raise order[0].fault
            recoveries = [server.recovery for server in order if server.fault is None and server.recovery is not None]
            await asyncio.wait(recoveries, return_when=asyncio.FIRST_COMPLETED)

    def mark_unavailable(self, server: Server, fault: str) -> None:
        """Ask it nothing more until it has recovered."""
        if not server.ready.is_set():
            return
        logger.warning("vLLM at %s %s; its answers begin anew", server.url, fault)
        server.ready.clear()
        server.recovery = asyncio.create_task(self._recover(server))

    async def _recover(self, server: Server) -> None:
        async def ask(client: Client, url: str) -> None:
            try:
                await self._ask(client, url)
            finally:
                server.asked.set()

        try:
            await self._settings.retry_until_timeout(ask, self._client, server.url)
            server.ready.set()
        except Exception as error:  # whatever it is: requests wait for this server, and are told by its fault
            server.fault = error
