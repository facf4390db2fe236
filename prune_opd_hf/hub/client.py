"""Calls to the Hub that may fail or hang for a while: retries with growing waits, a time limit, errors in one line.

`huggingface_hub` repeats most of its requests, but not the creation of a repository, a branch, a tag or a commit, and it has no
time limit. A request whose answer was lost may still have been carried out: whoever repeats it here can say how to look for
its effect first.
"""

import contextlib
import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, validate_repo_id

from prune_opd_hf.errors import ConfigError, HubAccessError, HubError, PruneOPDError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Retries:
    """How often and how long to try a request that fails for a while.

    Attributes:
        attempts: of one request, the first included.
        first_wait_seconds: before the second attempt; it doubles from attempt to attempt.
        max_wait_seconds: bound of one wait, also of one that the Hub asks for.
        timeout_seconds: without any sign of the Hub, after which a request counts as failed.
        max_seconds: after which no new attempt is begun. One attempt may hold several requests of the client's own, so that
            the whole takes at most about this and six times `timeout_seconds`.

    Raises:
        ConfigError: a value is outside its range.
    """

    attempts: int = 6
    first_wait_seconds: float = 1.0
    max_wait_seconds: float = 120.0
    timeout_seconds: float = 120.0
    max_seconds: float = 1800.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < (name == "attempts") or (name == "timeout_seconds" and value == 0):
                raise ConfigError(f"{name} is too small: {value}")


def with_retries(
    call: Callable[[], Result],
    retries: Retries,
    *,
    doing: str,
    find_effect: Callable[[], Result | None] | None = None,
) -> Result:
    """The result of `call`, tried again while the error is transient.

    Args:
        call: asks the Hub once.
        retries: how often and how long.
        doing: what is being done, for messages: "creating the repository".
        find_effect: looks whether an earlier attempt was carried out although its answer was lost; needed where doing it
            twice does harm.

    Raises:
        HubAccessError: the Hub does not know or not allow the user.
        HubError: it refuses, or still fails after the last attempt.
    """
    started, attempts = time.monotonic(), 0
    while True:
        attempts += 1
        try:
            with time_limit(retries.timeout_seconds):
                return call()
        except Exception as error:
            if not _is_transient(error):
                raise _translated(error, doing) from error
            failure = error
        backoff = retries.first_wait_seconds * 2 ** (attempts - 1) * random.uniform(0.75, 1.25)
        wait = min(max(backoff, _asked_for_seconds(failure)), retries.max_wait_seconds)
        last = attempts == retries.attempts or time.monotonic() - started + wait > retries.max_seconds
        if not last:
            logger.warning("%s failed (%s); trying again in %.0f s", doing, _reason(failure), wait)
        if not last or find_effect is not None:  # an effect may take a moment to be seen
            time.sleep(wait)
        effect = find_effect() if find_effect is not None else None
        if effect is not None:
            return effect
        if last:
            break
    detour = " (HF_HUB_DISABLE_XET=1 avoids Xet storage)" if isinstance(failure, ConnectionError) else ""
    raise HubError(
        f"{doing} failed {attempts} time{'s' * (attempts > 1)}, last: {_reason(failure)}{detour}. "
        "Run the same command again later: what has arrived is found and not sent twice"
    ) from failure


def _translated(error: Exception, doing: str) -> PruneOPDError:
    """An error of the client as one of ours, in one line that says what to do."""
    if isinstance(error, PruneOPDError):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"{doing} needs the network, and HF_HUB_OFFLINE forbids it: unset it and run again")
    if isinstance(error, LocalTokenNotFoundError):
        return HubAccessError(f"{doing} needs a token: run `hf auth login`, or set HF_TOKEN to one that may write")
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{doing} failed: there is no such revision. Look up its name on the repository's page")
    if isinstance(error, RepositoryNotFoundError):
        return HubAccessError(
            f"{doing} failed: the repository does not exist, or this token may not see it. "
            "Check its name, and with `hf auth whoami` who you are"
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status == 401:
        return HubAccessError(f"{doing} failed: the Hub does not know this token. Run `hf auth login` with a valid one")
    if status == 403:
        return HubAccessError(
            f"{doing} failed: this token may not do that ({_reason(error)}). Use one with write permission, and a "
            "namespace that is yours (`hf auth whoami`); to a repository of others send a pull request (--create-pr)"
        )
    return HubError(f"{doing} failed: {_reason(error)}")


def _is_transient(error: Exception) -> bool:
    """Whether the same request may well succeed in a moment, or may even have succeeded."""
    for each in _causes(error):
        if isinstance(each, (OfflineModeIsEnabled, PruneOPDError)):
            return False
        if isinstance(each, HfHubHTTPError):
            return each.response is not None and each.response.status_code in TRANSIENT_STATUS
        refused = re.search(r"HTTP status client error \((\d+)", str(each))  # how Xet storage says it
        if refused and int(refused[1]) not in TRANSIENT_STATUS:
            return False
        if isinstance(each, (HTTPError, json.JSONDecodeError, ConnectionError, TimeoutError)):
            return True  # no answer, or one that was cut short; the last two are what Xet storage raises
    return False


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, outermost first, each once."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__
    return chain


def _asked_for_seconds(error: Exception) -> float:
    """The wait that the Hub asked for in Retry-After; 0 where it asked for none."""
    if not isinstance(error, HfHubHTTPError) or error.response is None:
        return 0.0
    value = error.response.headers.get("Retry-After", "").strip()
    return float(value) if value.isdecimal() else 0.0


def _reason(error: BaseException) -> str:
    """What the Hub or the network said, with the root of it where an error wraps another."""
    causes = _causes(error)
    root = next((each for each in causes if isinstance(each, HfHubHTTPError)), causes[-1])
    messages = [
        getattr(each, "server_message", None) or str(each).strip() or type(each).__name__ for each in (error, root)
    ]
    return "; ".join(dict.fromkeys(" ".join(message.split())[:300].rstrip(".") for message in messages))


_time_limits: list[float] = []
_installing = threading.Lock()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Let no request of the client, in any thread, wait longer than this for the next sign of the Hub.

    A hook sees every request before it is sent, because several of the client's calls ask for no limit themselves. A limit
    that the client does set (as for downloads) stays. The innermost of nested limits holds.
    """
    with _installing:
        _install_hook()
    _time_limits.append(seconds)
    try:
        yield
    finally:
        _time_limits.remove(seconds)


def _install_hook() -> None:
    """Hook the client's session, and those that it opens after a refused connection; a user's own session keeps its settings."""
    session = get_session()
    requests = session.event_hooks["request"]
    if _limit_request in requests:
        return
    hooks = {**session.event_hooks, "request": [*requests, _limit_request]}
    if requests and all(hook.__module__.startswith("huggingface_hub.") for hook in requests):
        set_client_factory(lambda: type(session)(event_hooks=hooks, follow_redirects=True, timeout=None))
    else:
        session.event_hooks = hooks


def _limit_request(request: Any) -> None:
    if _time_limits:
        limits = request.extensions.get("timeout", {})
        for phase in ("connect", "read", "write", "pool"):
            limits = {**limits, phase: _time_limits[-1] if limits.get(phase) is None else limits[phase]}
        request.extensions["timeout"] = limits


def is_hub_id(name: str | None) -> bool:
    """Whether `name` has the form owner/name that the Hub gives to repositories.

    Example:
        >>> is_hub_id("Qwen/Qwen3-1.7B"), is_hub_id("qwen (local)"), is_hub_id("gpt2"), is_hub_id(None)
        (True, False, False, False)
    """
    if not name or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_local(name: str | None) -> bool:
    """Whether `name` has the form of a Hub id but leads to a file or folder here; Transformers take it for the path, too."""
    return is_hub_id(name) and Path(str(name)).exists()
