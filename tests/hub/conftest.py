"""A Hub on this machine, the client that speaks with it, and a student to be sent there."""

from pathlib import Path

import pytest
from loopback_hub import ALICE, LoopbackHub
from loopback_hub.client import go_online
from loopback_hub.student_folders import save_student


@pytest.fixture
def online(monkeypatch, tmp_path):
    go_online(monkeypatch, tmp_path / "cache")


@pytest.fixture
def hub(online):
    with LoopbackHub([ALICE]) as hub:
        yield hub


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return save_student(tmp_path_factory.mktemp("students") / "student", history=False)
