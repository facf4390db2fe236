"""What goes wrong on the way: chosen by the request, counted down, and then over."""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

KINDS = ("status", "status_after", "drop_before", "drop_after", "truncate", "flip", "delay", "meanwhile")


@dataclass
class Fault:
    """One thing that goes wrong.

    Attributes:
        request: pattern of "METHOD /path".
        kind: "status" answers with an error and does nothing; "status_after" does the work and then answers with an error;
            "drop_before" closes the connection and does nothing; "drop_after" does the work and closes it; "truncate" does
            the work and sends half of the answer; "flip" does the work and sends the answer with one bit of it flipped;
            "delay" does the work and lets the client wait; "meanwhile" does something else first and then goes on as usual.
        times: how often.
        status: the error.
        retry_after: seconds, sent with the error.
        seconds: of the delay.
        effect: what happens meanwhile.
        html: whether the error's body is a page for people, as a proxy's is.
    """

    request: str
    kind: str
    times: int = 1
    status: int = 503
    retry_after: int | None = None
    seconds: float = 0.0
    effect: Callable[[], None] | None = None
    html: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    def strikes(self, request: str) -> bool:
        """Whether it hits this request; if so, once less from now on."""
        with self._lock:
            if self.times < 1 or not re.search(self.request, request):
                return False
            self.times -= 1
            return True
