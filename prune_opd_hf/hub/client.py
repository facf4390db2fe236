"""Calls to the Hub that may fail for a while: waiting, trying again, and knowing when a try must not be repeated.

The Hub's client repeats most of its requests by itself, but not the creation of a repository, a branch, a tag or a commit,
and it has no time limit (see `time_limit`). A request whose answer was lost may still have been carried out: whoever repeats
it here can say how to look for its effect first.
"""

import contextlib
import importlib
import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http, get_session, validate_repo_id

from prune_opd_hf.errors import ConfigError, HubAccessError, HubError, PruneOPDError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Patience:
    """How long to bear with a Hub that fails.

    Attributes:
        attempts: tries of one request, the first included.
        first_wait_seconds: before the second try; it doubles from try to try.
        longest_wait_seconds: bound of one wait, also of one that the Hub asks for.
        timeout_seconds: without any sign of the Hub, after which a request counts as failed.
        longest_seconds: after which no new try is begun. One try may hold several requests of the client's own, so that it
            bounds the whole to about this and six times `timeout_seconds`.

    Raises:
        ConfigError: a value is outside its range.
    """

    attempts: int = 6
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 120.0
    timeout_seconds: float = 120.0
    longest_seconds: float = 1800.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigError(f"attempts must be at least 1, got {self.attempts}")
        for name in ("first_wait_seconds", "longest_wait_seconds", "longest_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds must be above 0, got {self.timeout_seconds}")

    def wait_seconds(self, attempt: int, asked_for: float | None) -> float:
        """How long to wait after the try number `attempt` (from 0); at least what the Hub asked for, within the bound."""
        backoff = self.first_wait_seconds * 2**attempt * random.uniform(0.75, 1.25)
        return min(max(backoff, asked_for or 0.0), self.longest_wait_seconds)


def patiently(
    call: Callable[[], Result],
    patience: Patience,
    *,
    doing: str,
    find_effect: Callable[[], Result | None] | None = None,
) -> Result:
    """The result of `call`, tried again while the failure is one that passes.

    Args:
        call: asks the Hub once.
        patience: how often and how long.
        doing: what is being done, for messages: "creating the repository".
        find_effect: looks whether an earlier try was carried out although its answer was lost; needed where doing it
            twice does harm.

    Raises:
        HubAccessError: the Hub does not know or not allow the user.
        HubError: it refuses, or still fails after the last try.
    """
    failure: Exception | None = None
    started, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            with time_limit(patience.timeout_seconds):
                return call()
        except Exception as error:
            if not _passes(error):
                raise translated(error, doing) from error
            failure = error
        wait = patience.wait_seconds(tries - 1, _asked_for_seconds(failure))
        last = tries == patience.attempts or time.monotonic() - started + wait > patience.longest_seconds
        if not last:
            logger.warning("%s failed (%s); trying again in %.0f s", doing, _reason(failure), wait)
        if not last or find_effect is not None:  # an effect may take a moment to be seen
            time.sleep(wait)
        effect = find_effect() if find_effect is not None else None
        if effect is not None:
            return effect
        if last:
            break
    way_round = " (HF_HUB_DISABLE_XET=1 goes round Xet storage)" if isinstance(failure, ConnectionError) else ""
    raise HubError(
        f"{doing} failed {tries} time{'s' * (tries > 1)}, last: {_reason(failure)}{way_round}. "
        "Run the same command again later: what has arrived is found and not sent twice"
    ) from failure


def translated(error: Exception, doing: str) -> PruneOPDError:
    """An error of the Hub's client as one of ours, in one line that says what to do."""
    if isinstance(error, PruneOPDError):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"{doing} needs the network, and HF_HUB_OFFLINE forbids it: unset it and run again")
    if isinstance(error, LocalTokenNotFoundError):
        return HubAccessError(f"{doing} needs a token: run `hf auth login`, or set HF_TOKEN to one that may write")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{doing} failed: there is no such revision. Look up its name on the repository's page")
    if isinstance(error, RepositoryNotFoundError):
        return HubAccessError(
            f"{doing} failed: the repository does not exist, or this token may not see it. "
            "Check its name, and with `hf auth whoami` who you are"
        )
    if status == 401:
        return HubAccessError(f"{doing} failed: the Hub does not know this token. Run `hf auth login` with a valid one")
    if status == 403:
        return HubAccessError(
            f"{doing} failed: this token may not do that ({_reason(error)}). Use one with write permission"
        )
    return HubError(f"{doing} failed: {_reason(error)}")


def _passes(error: Exception) -> bool:
    """Whether the same request may well succeed in a moment, or may even have succeeded."""
    for each in _causes(error):
        if isinstance(each, (OfflineModeIsEnabled, PruneOPDError)):
            return False
        if isinstance(each, HfHubHTTPError):
            return each.response is not None and each.response.status_code in PASSING_STATUS
        refused = re.search(r"HTTP status client error \((\d+)", str(each))  # how Xet storage says it
        if refused and int(refused[1]) not in PASSING_STATUS:
            return False
        if isinstance(each, (_transport_error(), json.JSONDecodeError, ConnectionError, TimeoutError)):
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


def _asked_for_seconds(error: Exception) -> float | None:
    """The wait that the Hub asked for: Retry-After in seconds or as a date (RFC 9110, 10.2.3)."""
    if not isinstance(error, HfHubHTTPError) or error.response is None:
        return None
    value = error.response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (until - datetime.now(timezone.utc)).total_seconds()) if until.tzinfo is not None else None


def _transport_error() -> type[Exception]:
    """What the client's HTTP library raises when an answer does not come; the library's name changed between versions."""
    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    return library.RequestError


def _reason(error: BaseException) -> str:
    """What the Hub or the network said, with the root of it where an error wraps another."""
    causes = _causes(error)
    root = next((each for each in causes if isinstance(each, HfHubHTTPError)), causes[-1])
    said = [getattr(each, "server_message", None) or str(each).strip() or type(each).__name__ for each in (error, root)]
    return "; ".join(dict.fromkeys(" ".join(message.split())[:300].rstrip(".") for message in said))


_limits: list[float] = []


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Let no request of the client, in any thread, wait longer than this for the next sign of the Hub.

    A limit that the client sets itself (as for downloads) stays. The innermost of nested limits holds.

    Example:
        >>> from huggingface_hub import HfApi
        >>> def exists(repo_id: str) -> bool:
        ...     with time_limit(20.0):
        ...         return HfApi().repo_exists(repo_id)
    """
    _install()
    _limits.append(seconds)
    try:
        yield
    finally:
        _limits.remove(seconds)


def _install() -> None:
    _add_hook(get_session())
    factory = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None)  # there is no public way to ask for it
    if factory is not None and not isinstance(factory, _LimitedFactory):
        _http._GLOBAL_CLIENT_FACTORY = _LimitedFactory(factory)


class _LimitedFactory:
    """Makes the client's sessions as before, each with the hook."""

    def __init__(self, factory: Any) -> None:
        self.factory = factory

    def __call__(self) -> Any:
        return _add_hook(self.factory())


def _add_hook(session: Any) -> Any:
    hooks = session.event_hooks
    if _limit_request not in hooks["request"]:
        session.event_hooks = {**hooks, "request": [*hooks["request"], _limit_request]}
    return session


def _limit_request(request: Any) -> None:
    if _limits:
        limits = request.extensions.get("timeout", {})
        for phase in ("connect", "read", "write", "pool"):
            limits = {**limits, phase: _limits[-1] if limits.get(phase) is None else limits[phase]}
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
    """Whether `name` has the form of a Hub id but leads to a file or folder from where this process stands.

    Transformers and Datasets take such a name for the path, too.
    """
    return is_hub_id(name) and (Path.cwd() / str(name)).exists()


def is_ref_name(name: str) -> bool:
    """Whether Git takes `name` for a branch or tag (git-check-ref-format(1), whose rules these are).

    Example:
        >>> is_ref_name("v1.0"), is_ref_name("refs/pr/1"), is_ref_name("v 1"), is_ref_name("a..b"), is_ref_name("-x")
        (True, True, False, False, False)
    """
    if re.fullmatch("[0-9a-f]{40}", name):  # would be taken for a commit
        return False
    if (
        re.search(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//", name)
        or name.startswith(("-", "/"))
        or name in {"", "@", "HEAD"}
    ):
        return False
    return not name.endswith(("/", ".")) and not any(
        part.startswith(".") or part.endswith(".lock") for part in name.split("/")
    )
