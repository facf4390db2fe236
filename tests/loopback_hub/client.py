"""The real client, pointed at a loopback Hub from inside the test process."""

import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants


def go_online(monkeypatch: pytest.MonkeyPatch, cache: Path, *, xet: bool = False) -> None:
    """Lift the test process's offline mode, hide its token and cache, and shorten the client's waits."""
    really_sleep = time.sleep
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_XET_XORB_COMPRESSION_POLICY", "none")  # the loopback Hub's Xet storage does not decompress
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: really_sleep(min(seconds, 0.01)))
    huggingface_hub.utils.disable_progress_bars()


def make_default(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let calls that name no Hub go to this one, as HF_ENDPOINT does for a new process."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
