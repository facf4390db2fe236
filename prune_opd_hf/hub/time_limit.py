"""A time limit for the Hub's client, which has none: its session waits without end, and several of its calls say so anew.

The limit stands in a hook that sees every request before it is sent, so that it reaches requests of the client's own threads,
and of the new session that the client opens after a refused connection. Outside of `time_limit` the hook does nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from huggingface_hub.utils import _http, get_session

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
