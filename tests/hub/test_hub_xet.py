"""With hf_xet installed the client takes Xet storage for every upload and download: the same promises hold on that way."""

from pathlib import Path

import pytest
from loopback_hub import ALICE, Fault, LoopbackHub
from loopback_hub.client import go_online
from loopback_hub.student_folders import save_student
from safetensors.torch import load_file

from prune_opd_hf.errors import HubError
from prune_opd_hf.hub import Retries, Target, download_student, publish_student

pytest.importorskip("hf_xet")
QUICK = Retries(attempts=3, first_wait_seconds=0.01)


@pytest.fixture(autouse=True)
def _online(monkeypatch, tmp_path):
    go_online(monkeypatch, tmp_path / "cache", xet=True)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return save_student(tmp_path_factory.mktemp("students") / "student", max_shard_size="8KB", history=False)


def publish(student, hub):
    return publish_student(student, Target("alice/student"), token=ALICE.token, endpoint=hub.endpoint, retries=QUICK)


def commits(hub) -> int:
    repository = hub.state.repositories.get("alice/student")
    return 0 if repository is None else len(repository.commits) - 1


def test_what_comes_back_is_what_was_sent(student, tmp_path):
    with LoopbackHub([ALICE]) as hub:
        published = publish(student, hub)
        assert not any("/_store/" in request for request in hub.requests)
        back = download_student(
            "alice/student", folder=tmp_path / "back", token=ALICE.token, endpoint=hub.endpoint, retries=QUICK
        )
        assert any("/v1/reconstructions/" in request for request in hub.requests)
    shards = sorted(path.name for path in student.glob("*.safetensors"))
    assert shards == sorted(path.name for path in back.folder.glob("*.safetensors"))
    assert len(shards) > 1
    for name in shards:
        sent, received = load_file(student / name), load_file(back.folder / name)
        assert sent.keys() == received.keys()
        assert all(sent[key].equal(received[key]) for key in sent)
    assert back.commit_id == published.commit_id


@pytest.mark.parametrize("request_", [r"xet-write-token", r"POST /v1/xorbs", r"POST /v1/shards", r"POST .*/commit/"])
@pytest.mark.parametrize("kind", ["status", "drop_after"])
def test_a_fault_that_passes_is_lived_through(student, request_, kind):
    with LoopbackHub([ALICE]) as hub:
        hub.faults.append(Fault(request_, kind))
        publish(student, hub)
        assert hub.faults[0].times == 0
        assert commits(hub) == 1


def test_storage_that_stays_away_leaves_nothing_and_names_the_way_round(student):
    with LoopbackHub([ALICE]) as hub:
        hub.faults.append(Fault("POST /v1/shards", "status", times=10**6))
        with pytest.raises(HubError, match="HF_HUB_DISABLE_XET=1"):
            publish(student, hub)
        assert commits(hub) == 0
        hub.faults.clear()
        publish(student, hub)
        assert commits(hub) == 1
