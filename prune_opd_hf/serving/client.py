"""HTTP calls to vLLM servers: a transient fault, a final one, or an answer, each in one line with the URL and the remedy.

Each kind of server has an API key of its own, in an environment variable (`VLLM_API_KEY` for those that sample). It goes into one
header of requests to these servers alone; no message repeats it.
"""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

try:  # the client that huggingface_hub brings, under its newer name or its older one
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[no-redef]

from prune_opd_hf.errors import ConfigError, ServingError
from prune_opd_hf.records.files import printable

GENERATE = "/inference/v1/generate"
KEY_VARIABLE = "VLLM_API_KEY"
CONNECT_SECONDS = 10.0
MESSAGE_LENGTH = 300
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

MAY_FAIL_ONCE = ("/health", GENERATE)
"""Where an error of the server may pass; elsewhere it is its answer."""

REMEDIES = {
    "/health": "is this vLLM's address?",
    "/v1/models": "is this vLLM's address?",
    GENERATE: "start it with --enable-scale-out (vLLM 0.32 or newer)",
    "/v1/load_lora_adapter": "start it with --enable-lora, --max-lora-rank of the adapter or more, and "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
}
DEV_MODE = "start it with VLLM_SERVER_DEV_MODE=1, so that it takes new weights (on a trusted network only)"

Result = TypeVar("Result")


class TransientError(Exception):
    """A fault that may pass."""


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine, also where this thread has an event loop already (a notebook)."""
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task]] = Future()

    async def begin() -> Result:
        task = asyncio.current_task()
        assert task is not None
        begun.set_result((asyncio.get_running_loop(), task))
        return await coroutine

    with ThreadPoolExecutor(max_workers=1) as thread:
        result = thread.submit(asyncio.run, begin())
        try:
            return result.result()
        except BaseException:
            if not result.done():  # Ctrl-C here: what runs there is waited for below
                loop, task = begun.result()
                with suppress(RuntimeError):  # it has ended meanwhile
                    loop.call_soon_threadsafe(task.cancel)
            raise


@contextmanager
def reading(url: str) -> Iterator[None]:
    """Refuse an answer that is built otherwise than vLLM's."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ServingError(
            f"vLLM at {url} answers otherwise than version 0.32 does ({type(error).__name__}: {error}): it needs vllm>=0.32"
        ) from error


def is_address(url: str) -> bool:
    """Whether a URL names a host that can be asked and a port that there is, and leaves room for a path."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    port_is_there = parts.port is None or 0 < parts.port < 2**16
    return (
        parts.scheme in ("http", "https")
        and bool(parts.host)
        and not parts.query
        and not parts.fragment
        and port_is_there
    )


async def served_model(client: "Client", url: str) -> tuple[str, int]:
    """The Hub id or folder that a server was started with, and tokens of the longest sequence that it takes."""
    await client.call(url, "/health")
    models = await client.call(url, "/v1/models")
    try:
        model = models["data"][0]
        return str(model.get("root") or model["id"]), int(model["max_model_len"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ServingError(
            f"{url} is no vLLM server: its /v1/models says nothing of max_model_len. Is this its address?"
        ) from error


class Client:
    """An HTTP client for any number of streams at a time; use it inside of one event loop.

    Args:
        timeout: seconds without an answer; streams wait for as long as it takes.
        key_variable: the environment variable with the servers' API key, where they want one; blanks around it, such as the
            last line break of a file, do not count.

    Raises:
        ConfigError: a key that no header can hold.
    """

    def __init__(self, timeout: float, key_variable: str = KEY_VARIABLE) -> None:
        self.timeout, self.key_variable = timeout, key_variable
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):  # the HTTP library would repeat it in its error
            raise ConfigError(
                f"{key_variable} in the environment is no API key: it may hold one line of ASCII characters"
            )
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        waits = httpx.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout))
        self._http = httpx.AsyncClient(headers=headers, limits=limits, timeout=waits)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._http.aclose()

    async def call(self, url: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What a server answers to a POST, or to a GET where there is no body: JSON, or None where it is something else.

        Raises:
            TransientError: it cannot be reached, hangs, failed, or sent tokens or scores in part.
            ServingError: it refuses.
        """
        try:
            response = await self._http.request("GET" if body is None else "POST", url + path, json=body)
        except httpx.HTTPError as error:
            raise self._fault(error, url) from error
        self._check(response, url, path)
        try:
            return response.json()
        except ValueError as error:
            if path == GENERATE:
                raise TransientError("sent an answer that is no JSON, or a part of one") from error
            return None

    async def events(self, url: str, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The server-sent events of a POST, until it says that there are no more.

        Raises:
            TransientError: as for `call`; or the stream broke off.
            ServingError: it refuses.
        """
        stream = self._http.stream(
            "POST", url + path, json=body, timeout=httpx.Timeout(None, connect=self._http.timeout.connect)
        )
        try:
            async with stream as response:
                if response.status_code != 200:
                    await response.aread()
                    self._check(response, url, path)
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    if line[5:].strip() == "[DONE]":
                        return
                    event = json.loads(line[5:])
                    if "error" in event:
                        raise TransientError(f"failed in mid-answer ({self._message(event)})")
                    yield event
        except httpx.HTTPError as error:
            raise self._fault(error, url) from error
        except ValueError as error:
            raise TransientError("sent an event that is no JSON") from error
        raise TransientError("ended its answer too early")

    def _check(self, response: Any, url: str, path: str) -> None:
        status = response.status_code
        if status < 300:
            return
        try:
            message = self._message(response.json())
        except ValueError:
            message = self._clean(response.text)
        if status in TRANSIENT_STATUS and (status != 500 or path in MAY_FAIL_ONCE):
            raise TransientError(f"answered {status} to {path} ({message})")
        if status < 400:
            message, hint = self._clean(response.headers.get("location", "")), "name the address that this leads to"
        elif status == 401:  # whose message may repeat the key
            message, hint = "it wants another API key", f"put the one that it was started with into {self.key_variable}"
        elif status == 403:
            hint = f"it, or a proxy before it, refuses: is the API key in {self.key_variable} the right one?"
        elif "JSON compliant" in message:
            hint = "the logits of its model are NaN or infinite"
        elif "logprobs" in message and "max" in message:
            hint = "start it with a larger --max-logprobs: at least as many as were requested"
        elif status in (404, 405) and "adapter" not in message:
            hint = REMEDIES.get(path.split("?")[0], DEV_MODE)
        elif path in ("/collective_rpc", "/v1/load_lora_adapter"):
            hint = "do new weights have one path there and here? Name a common folder in vllm_weights_dir; if so, see its log"
        else:
            hint = "see its log"
        raise ServingError(f"vLLM at {url} answered {status} to {path} ({message}): {hint}")

    def _fault(self, error: Exception, url: str) -> ServingError | TransientError:
        """Of a request without an answer."""
        text = self._clean(str(error)) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in text or "WRONG_VERSION_NUMBER" in text:  # OpenSSL's words
            remedy = "put its certificate into SSL_CERT_FILE of the environment, or does it answer to http://?"
            return ServingError(f"vLLM at {url} cannot be asked by https ({text}): {remedy}")
        if isinstance(error, httpx.ConnectTimeout):
            return TransientError(f"did not accept a connection within {self._http.timeout.connect:g} s")
        if isinstance(error, httpx.TimeoutException):
            return TransientError(f"gave no answer within {self.timeout:g} s")
        did = "cannot be reached" if isinstance(error, httpx.ConnectError) else "broke the connection"
        return TransientError(f"{did} ({text})")

    def _message(self, answer: Any) -> str:
        found = answer
        for name in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(name):
                found = found[name]
        return self._clean(found if isinstance(found, str) else json.dumps(found))

    def _clean(self, text: str) -> str:
        lines = (text.replace(self._key, "***") if self._key else text).strip().splitlines()
        return printable(lines[0])[:MESSAGE_LENGTH] if lines else ""
