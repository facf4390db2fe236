"""Downloads through the real client: complete, checked against the hashes that the Hub states, nothing executed."""

import json
import pickle
from dataclasses import replace

import pytest
from loopback_hub import ALICE, Fault
from loopback_hub.student_folders import evaluation_report, same_weights, save_student

from prune_opd_hf.errors import ConfigError, FileFormatError, HubError
from prune_opd_hf.hub import Retries, Target, download_student, publish_student
from prune_opd_hf.records.weights import weights_hash

pytestmark = [
    pytest.mark.usefixtures("online"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own upload
]
QUICK = Retries(attempts=3, first_wait_seconds=0.01)


def publish(folder, hub, target):
    return publish_student(folder, target, token=ALICE.token, endpoint=hub.endpoint, retries=QUICK)


def download(repo_id, hub, **options):
    return download_student(repo_id, token=ALICE.token, endpoint=hub.endpoint, retries=QUICK, **options)


WEIGHTS, TOKENIZER = r"GET /[0-9a-f]{64}", r"GET .*/resolve/.*/tokenizer\.json"


@pytest.mark.parametrize("in_cache", [True, False])
@pytest.mark.parametrize("request_", [WEIGHTS, TOKENIZER])
def test_a_bit_that_flips_in_transit_is_found_and_the_file_fetched_again(hub, student, tmp_path, request_, in_cache):
    publish(student, hub, Target("alice/student"))
    hub.faults.append(Fault(request_, "flip"))
    back = download("alice/student", hub, folder=None if in_cache else tmp_path / "back")
    assert hub.faults[0].times == 0
    assert back.model_hash == weights_hash(student)
    assert (back.folder / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("in_cache", [True, False])
@pytest.mark.parametrize(("request_", "name"), [(WEIGHTS, "model.safetensors"), (TOKENIZER, "tokenizer.json")])
def test_a_file_that_never_has_its_hash_is_removed_and_not_called_downloaded(
    hub, student, tmp_path, request_, name, in_cache
):
    publish(student, hub, Target("alice/student"))
    hub.faults.append(Fault(request_, "flip", times=10**6))
    folder = None if in_cache else tmp_path / "back"
    with pytest.raises(HubError, match=f"{name} came twice with another content") as caught:
        download("alice/student", hub, folder=folder)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob(name) if path.exists()]
    hub.faults.clear()
    assert download("alice/student", hub, folder=folder).model_hash == weights_hash(student)


def test_a_file_that_was_altered_on_disk_at_the_same_size_is_fetched_again(hub, student, tmp_path):
    publish(student, hub, Target("alice/student"))
    path = download("alice/student", hub, folder=tmp_path / "back").folder / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"what", b"wath"))
    download("alice/student", hub, folder=tmp_path / "back")
    assert path.read_bytes() == (student / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("revision", ["", " "])
def test_an_empty_revision_is_refused(hub, student, revision):
    publish(student, hub, Target("alice/student"))
    with pytest.raises(ConfigError, match="a revision"):
        download("alice/student", hub, revision=revision)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"),
        *("training_summary.json", "evaluation/00-chain.json"),
    ],
)
@pytest.mark.parametrize("content", [b"[1]", b'"text"', b"null", b"{", b"\xff"])
def test_a_config_that_is_no_json_object_is_refused_in_one_line(hub, student, tmp_path, name, content):
    publish(student, hub, Target("alice/student"))
    tree = hub.repository("alice/student").resolve("main").tree
    tree[name] = replace(tree[name], content=content)
    with pytest.raises(FileFormatError, match="not a student to be used") as caught:
        download("alice/student", hub, folder=tmp_path / "back")
    assert "\n" not in str(caught.value)


def test_a_download_that_is_cut_short_is_taken_up_again(hub, student, tmp_path):
    publish(student, hub, Target("alice/student"))
    hub.faults += [
        Fault(r"GET /[0-9a-f]{64}", "truncate"),
        Fault("GET .*resolve", "status", times=2),
        Fault("GET .*tree", "drop_after"),
    ]
    assert same_weights(student, download("alice/student", hub, folder=tmp_path / "back").folder)
    assert not any(fault.times for fault in hub.faults)


def test_a_hub_that_stays_away_is_named_and_a_later_download_succeeds(hub, student, tmp_path):
    publish(student, hub, Target("alice/student"))
    hub.faults.append(Fault("GET .*tree", "status", times=10**6))
    with pytest.raises(HubError, match="Run the same command again later"):
        download("alice/student", hub, folder=tmp_path / "back")
    hub.faults.clear()
    assert same_weights(student, download("alice/student", hub, folder=tmp_path / "back").folder)


def test_a_download_does_not_mix_with_or_overwrite_what_is_there(hub, student, tmp_path):
    publish(student, hub, Target("alice/student"))
    back = download("alice/student", hub, folder=tmp_path / "back")
    assert (
        download("alice/student", hub, folder=tmp_path / "back").model_hash == back.model_hash
    )  # the same again is fine
    sharded = save_student(tmp_path / "sharded", seed=1, max_shard_size="8KB", history=False)
    publish(sharded, hub, Target("alice/sharded"))
    with pytest.raises(ConfigError, match=r"holds model\.safetensors, which did not come from this revision"):
        download("alice/sharded", hub, folder=tmp_path / "back")  # Transformers would load the old file
    mine = save_student(tmp_path / "mine", seed=2, records=False)
    with pytest.raises(ConfigError, match="Nothing was downloaded"):
        download("alice/student", hub, folder=mine)
    assert same_weights(mine, save_student(tmp_path / "again", seed=2, records=False))
    (tmp_path / "a file").write_text("x")
    for folder in (tmp_path / "a file", tmp_path / "a file" / "below"):
        with pytest.raises(ConfigError, match="is a file"):
            download("alice/student", hub, folder=folder)


@pytest.mark.parametrize("request_", ["GET .*resolve", "GET .*tree", "GET /api/models", r"GET /[0-9a-f]{64}"])
def test_a_download_from_a_hub_that_hangs_is_given_up(hub, student, tmp_path, request_, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    publish(student, hub, Target("alice/student"))
    hub.faults.append(Fault(request_, "delay", times=10**6, seconds=60.0))
    hasty = Retries(attempts=1, timeout_seconds=0.2)
    with pytest.raises(HubError, match="timed out"):
        download_student("alice/student", endpoint=hub.endpoint, retries=hasty, folder=tmp_path / "back")


def test_a_revision_that_is_not_there_is_named(hub, student):
    publish(student, hub, Target("alice/student"))
    with pytest.raises(HubError, match="no such revision"):
        download("alice/student", hub, revision="v9")


def test_a_download_takes_neither_pickles_nor_code(hub, student, tmp_path):
    publish(student, hub, Target("alice/student"))
    repository = hub.repository("alice/student")
    tree = dict(repository.resolve("main").tree)
    for path in ("pytorch_model.bin", "modeling.py", "custom_generate/generate.py", "x.pkl"):
        tree[path] = tree["README.md"]
    repository.branches["main"] = repository.add_commit(repository.branches["main"], "more", "", "alice", tree).id
    back = download("alice/student", hub, folder=tmp_path / "back")
    names = {path.name for path in back.folder.rglob("*") if ".cache" not in path.parts}
    assert not names & {"pytorch_model.bin", "modeling.py", "generate.py", "x.pkl"}


def test_a_pickle_under_another_name_is_refused_on_the_way_back(hub, student, tmp_path):
    publish(student, hub, Target("alice/student"))
    tree = hub.repository("alice/student").resolve("main").tree
    tree["spiece.model"] = replace(tree["config.json"], content=pickle.dumps({"a": 1}))
    with pytest.raises(FileFormatError, match=r"spiece\.model is a pickle"):
        download("alice/student", hub, folder=tmp_path / "back")


def test_a_repository_without_safetensors_is_refused_before_anything_is_fetched(hub, student, tmp_path):
    publish(student, hub, Target("alice/student"))
    repository = hub.repository("alice/student")
    tree = dict(repository.resolve("main").tree)
    tree["pytorch_model.bin"] = tree.pop("model.safetensors")
    repository.branches["main"] = repository.add_commit(repository.branches["main"], "old", "", "alice", tree).id
    with pytest.raises(FileFormatError, match="loading a pickle runs its code"):
        download("alice/student", hub, folder=tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_repository_that_wants_its_own_code_is_refused(hub, student, tmp_path):
    publish(student, hub, Target("alice/student"))
    repository = hub.repository("alice/student")
    tree = dict(repository.resolve("main").tree)
    config = json.loads(tree["config.json"].content)
    tree["config.json"] = replace(
        tree["config.json"], content=json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling.M"}}).encode()
    )
    repository.branches["main"] = repository.add_commit(repository.branches["main"], "code", "", "alice", tree).id
    with pytest.raises(FileFormatError, match="trust_remote_code"):
        download("alice/student", hub, folder=tmp_path / "back")


def test_a_report_of_other_weights_is_doubted_on_the_way_back(hub, student, tmp_path):
    publish(student, hub, Target("alice/student"))
    repository = hub.repository("alice/student")
    tree = dict(repository.resolve("main").tree)
    report = evaluation_report("sha256:" + "b" * 64).to_json().encode()
    tree["evaluation/00-chain.json"] = replace(tree["evaluation/00-chain.json"], content=report)
    repository.branches["main"] = repository.add_commit(repository.branches["main"], "swap", "", "alice", tree).id
    assert download("alice/student", hub, folder=tmp_path / "back").doubts == (
        "the report on chain was made with other weights",
    )
