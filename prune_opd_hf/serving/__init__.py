"""vLLM's servers over HTTP, for whoever samples or scores on them."""

from prune_opd_hf.serving.client import GENERATE, KEY_VARIABLE, Client, TransientError, longest_sequence, reading, run
from prune_opd_hf.serving.servers import (
    ATTEMPTS,
    Server,
    ServerPool,
    Servers,
    gather_or_cancel,
    pause_before_retry,
    split_urls,
)

__all__ = [
    "ATTEMPTS",
    "GENERATE",
    "KEY_VARIABLE",
    "Client",
    "Server",
    "ServerPool",
    "Servers",
    "TransientError",
    "gather_or_cancel",
    "longest_sequence",
    "pause_before_retry",
    "reading",
    "run",
    "split_urls",
]
