"""Retries: transient errors are tried again with growing waits that the Hub may lengthen, others are raised at once."""

import importlib
import json
import re

import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from prune_opd_hf.errors import ConfigError, HubAccessError, HubError
from prune_opd_hf.hub.client import Retries, with_retries

httpx = importlib.import_module(
    type(get_session()).__module__.partition(".")[0]
)  # httpx or httpx2, as the client has it
QUICK = Retries(attempts=3, first_wait_seconds=1.0, max_wait_seconds=100.0, timeout_seconds=7.0)


def answered(status: int, **headers: str) -> HfHubHTTPError:
    request = httpx.Request("POST", "https://hub.example/api")
    return HfHubHTTPError("said the Hub", response=httpx.Response(status, headers=headers, request=request))


def cut_short() -> json.JSONDecodeError:
    return json.JSONDecodeError("Expecting value", "", 0)


def wrapped(cause: Exception) -> RuntimeError:
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = cause
    return error


def in_a_circle() -> RuntimeError:
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    return first


@pytest.fixture
def waits(monkeypatch):
    """The waits that were asked for, none of which is waited."""
    noted: list[float] = []
    monkeypatch.setattr("time.sleep", noted.append)
    return noted


class Failing:
    """Raises the errors in turn, then returns "done"."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


@pytest.mark.parametrize(
    "error",
    [
        *[answered(status) for status in (408, 425, 429, 500, 502, 503, 504)],
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("late"),
        httpx.RemoteProtocolError("peer closed"),
        cut_short(),
        ConnectionError("what Xet storage raises"),
        ConnectionError("Network error: HTTP status client error (429 Too Many Requests)"),
        wrapped(answered(503)),
        wrapped(httpx.ReadError("gone")),
    ],
)
def test_a_transient_error_is_tried_again(waits, error):
    call = Failing(error)
    assert with_retries(call, QUICK, doing="asking") == "done"
    assert (call.calls, len(waits)) == (2, 1)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (answered(401), HubAccessError, "does not know this token"),
        (answered(403), HubAccessError, "write permission"),
        (answered(400), HubError, "said the Hub"),
        (answered(413), HubError, "said the Hub"),
        (OfflineModeIsEnabled("offline"), HubError, "HF_HUB_OFFLINE"),
        (ValueError("odd"), HubError, "odd"),
        (ConnectionError("Network error: HTTP status client error (400 Bad Request)"), HubError, "400 Bad Request"),
        (wrapped(ValueError("the root of it")), HubError, "the root of it"),
        (in_a_circle(), HubError, "first; second"),
    ],
)
def test_any_other_error_is_raised_at_once_in_one_line(waits, error, kind, message):
    call = Failing(error)
    with pytest.raises(kind, match=message) as caught:
        with_retries(call, QUICK, doing="asking")
    assert (call.calls, waits) == (1, [])
    assert "\n" not in str(caught.value)


def test_waits_double_and_stay_within_their_bound(waits):
    retries = Retries(attempts=8, first_wait_seconds=1.0, max_wait_seconds=10.0)
    with pytest.raises(HubError, match="failed 8 times"):
        with_retries(Failing(*[answered(500)] * 8), retries, doing="asking")
    for attempt, wait in enumerate(waits):
        assert min(0.75 * 2**attempt, 10) <= wait <= min(1.25 * 2**attempt, 10)


def test_the_hub_may_ask_for_a_longer_wait_within_the_bound(waits):
    with_retries(
        Failing(answered(429, **{"Retry-After": "50"}), answered(503, **{"Retry-After": "5000"})), QUICK, doing="asking"
    )
    assert waits == [50.0, 100.0]


def test_an_effect_that_is_found_ends_the_trying(waits):
    call = Failing(*[answered(504)] * 3)
    found = iter([None, "the lost one"])
    assert with_retries(call, QUICK, doing="asking", find_effect=lambda: next(found)) == "the lost one"
    assert call.calls == 2


def test_the_last_attempt_is_looked_for_too(waits):
    call = Failing(answered(504))
    once = Retries(attempts=1, first_wait_seconds=0.0)
    assert with_retries(call, once, doing="asking", find_effect=lambda: "there") == "there"


def test_no_new_attempt_is_begun_after_max_seconds(waits):
    retries = Retries(attempts=100, first_wait_seconds=10.0, max_wait_seconds=10.0, max_seconds=5.0)
    call = Failing(*[answered(500)] * 100)
    with pytest.raises(HubError, match="failed 1 time, last"):
        with_retries(call, retries, doing="asking")
    assert call.calls == 1


def test_each_new_attempt_is_logged(waits, caplog):
    with_retries(Failing(answered(503)), QUICK, doing="asking")
    assert re.fullmatch(r"asking failed \(said the Hub.*\); trying again in 1 s", caplog.messages[0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"first_wait_seconds": -1.0},
        {"max_wait_seconds": -1.0},
        {"max_seconds": -1.0},
        {"timeout_seconds": 0.0},
    ],
)
def test_a_patience_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Retries(**wrong)
