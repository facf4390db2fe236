"""Push and pull through the real client against a Hub on this machine: private and public, branch, tag, pull request,
second revision, shards, adapters, and what a reader with plain Transformers gets."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loopback_hub import Fault, LoopbackHub, User
from loopback_hub.student_folders import (
    evaluation_report,
    same_weights,
    save_student,
    tiny_qwen3,
    tiny_tokenizer,
    training_summary,
)

from prune_opd_hf.errors import HubAccessError, HubError, LeakError
from prune_opd_hf.hub import (
    CardOptions,
    License,
    Retries,
    StudentRecords,
    Target,
    download_student,
    publish_student,
)
from prune_opd_hf.records.weights import weight_files, weights_hash

pytestmark = [
    pytest.mark.usefixtures("online"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own upload
]
ALICE = User("alice", "token-of-alice", organisations={"lab": "write", "readers": "read"})
BOB = User("bob", "token-of-bob")
READER = User("alice", "token-that-reads", role="read", organisations={"lab": "write"})
FINE = User("alice", "token-with-scopes", role="fineGrained", scopes={"alice/student": ["repo.write"]})
QUICK = Retries(attempts=3, first_wait_seconds=0.01)


@pytest.fixture
def hub():
    with LoopbackHub([ALICE, BOB, READER, FINE]) as hub:
        yield hub


def publish(folder, hub, target, user=ALICE, **options):
    return publish_student(folder, target, token=user.token, endpoint=hub.endpoint, retries=QUICK, **options)


def download(repo_id, hub, user=ALICE, **options):
    return download_student(
        repo_id, token=user.token if user else None, endpoint=hub.endpoint, retries=QUICK, **options
    )


@pytest.mark.parametrize("private", [False, True])
def test_what_comes_back_is_what_was_sent(hub, student, tmp_path, private):
    published = publish(student, hub, Target("alice/student", private=private))
    assert published.url == f"{hub.endpoint}/alice/student"
    assert hub.repository("alice/student").private is private
    back = download("alice/student", hub, folder=tmp_path / "back")
    assert same_weights(student, back.folder)
    assert back.commit_id == published.commit_id
    assert back.records == StudentRecords.load(student)
    assert (back.model_hash, back.doubts) == (weights_hash(student), ())


def test_a_private_student_is_invisible_to_others(hub, student):
    publish(student, hub, Target("alice/student", private=True))
    for user in (BOB, None):
        with pytest.raises(HubAccessError, match="does not exist, or this token may not see it"):
            download("alice/student", hub, user)


def test_everything_arrives_in_one_commit(hub, student):
    publish(student, hub, Target("alice/student", commit_message="First student"))
    commit, initial = hub.repository("alice/student").history("main")
    assert (commit.title, initial.title) == ("First student", "initial commit")
    assert {"README.md", "model.safetensors", "tokenizer.json", "evaluation/00-chain.json"} <= set(commit.tree)
    assert not any(path.endswith((".bin", ".pt", ".py")) for path in commit.tree)


def test_the_second_revision_replaces_the_first_and_leaves_the_readers_files(hub, student, tmp_path):
    first = publish(student, hub, Target("alice/student"))
    repository = hub.repository("alice/student")
    tree = {**repository.resolve("main").tree, "notes.md": repository.resolve("main").tree["README.md"]}
    repository.branches["main"] = repository.add_commit(first.commit_id, "notes", "", "alice", tree).id
    sharded = save_student(tmp_path / "second", seed=1, max_shard_size="8KB", history=False)
    publish(sharded, hub, Target("alice/student"))
    tree = repository.resolve("main").tree
    assert "model.safetensors" not in tree  # Transformers would load it in place of the shards
    assert "notes.md" in tree
    assert same_weights(sharded, download("alice/student", hub, folder=tmp_path / "new").folder)
    assert same_weights(
        student, download("alice/student", hub, revision=first.commit_id, folder=tmp_path / "old").folder
    )


def test_publishing_the_same_again_sends_nothing(hub, tmp_path):
    student = save_student(tmp_path / "student")  # with figures, which must come out the same again
    first = publish(student, hub, Target("alice/student"))
    hub.requests.clear()
    second = publish(student, hub, Target("alice/student"))
    assert (second.commit_id, second.found, first.found) == (first.commit_id, True, False)
    assert not any("commit/" in request or "PUT" in request for request in hub.requests)


def test_what_an_earlier_revision_loses_is_said_before_it_happens(hub, student, tmp_path):
    publish(student, hub, Target("alice/student"))
    sharded = save_student(tmp_path / "second", seed=1, max_shard_size="8KB", history=False)
    said: list[str] = []
    publish(sharded, hub, Target("alice/student"), show=said.append)
    assert said[-1] == "removed with this commit, as parts of an earlier revision: model.safetensors"
    said.clear()
    publish(sharded, hub, Target("alice/student"), show=said.append)
    assert "removed" not in " ".join(said)


def test_a_pull_request_can_be_brought_up_to_date(hub, student, tmp_path):
    publish(student, hub, Target("alice/student"))
    for seed in (1, 2):
        other = save_student(tmp_path / f"other{seed}", seed=seed, history=False)
        publish(
            other, hub, Target("alice/student", **({"create_pr": True} if seed == 1 else {"revision": "refs/pr/1"}))
        )
    assert list(hub.repository("alice/student").pull_requests) == [1]
    assert same_weights(other, download("alice/student", hub, revision="refs/pr/1", folder=tmp_path / "pr").folder)
    with pytest.raises(HubError, match="no such revision"):
        publish(student, hub, Target("alice/student", revision="refs/pr/7"))


def test_a_branch_is_created_and_main_stays_as_it_is(hub, student, tmp_path):
    publish(student, hub, Target("alice/student", revision="try/1"))
    assert list(hub.repository("alice/student").resolve("main").tree) == [".gitattributes"]
    assert same_weights(student, download("alice/student", hub, revision="try/1", folder=tmp_path / "back").folder)


def test_a_tag_names_the_commit_and_does_not_move(hub, student, tmp_path):
    first = publish(student, hub, Target("alice/student", tag="v1"))
    assert publish(student, hub, Target("alice/student", tag="v1")).found
    other = save_student(tmp_path / "other", seed=1, history=False)
    with pytest.raises(HubError, match="tags do not move"):
        publish(other, hub, Target("alice/student", tag="v1"))
    publish(other, hub, Target("alice/student"))
    with pytest.raises(HubError, match="tags do not move"):
        publish(student, hub, Target("alice/student", tag="v1"))
    with pytest.raises(HubError, match="is a tag"):
        publish(student, hub, Target("alice/student", revision="v1"))
    back = download("alice/student", hub, revision="v1", folder=tmp_path / "back")
    assert back.commit_id == first.commit_id
    assert same_weights(student, back.folder)


def test_anybody_can_propose_a_student_as_a_pull_request(hub, student, tmp_path):
    publish(student, hub, Target("alice/student"))
    other = save_student(tmp_path / "other", seed=1, history=False)
    proposed = publish(other, hub, Target("alice/student", create_pr=True), BOB)
    assert proposed.url == f"{hub.endpoint}/alice/student/discussions/1"
    assert same_weights(student, download("alice/student", hub, folder=tmp_path / "main").folder)
    assert same_weights(other, download("alice/student", hub, BOB, revision="refs/pr/1", folder=tmp_path / "pr").folder)
    again = publish(other, hub, Target("alice/student", create_pr=True), BOB)
    assert (again.url, again.found) == (proposed.url, True)
    assert len(hub.repository("alice/student").pull_requests) == 1


def test_a_pull_request_needs_a_repository(hub, student):
    with pytest.raises(HubError, match="does not exist, or this token may not see it"):
        publish(student, hub, Target("alice/none", create_pr=True), BOB)


def test_shards_and_uploads_in_parts_arrive_bit_by_bit(student, tmp_path):
    sharded = save_student(tmp_path / "sharded", max_shard_size="8KB", history=False)
    with LoopbackHub([ALICE], part_bytes=1000) as hub:
        publish(sharded, hub, Target("alice/student"))
        assert any(request.endswith("/complete") for request in hub.requests)
        back = download("alice/student", hub, folder=tmp_path / "back")
    assert len(weight_files(back.folder)) > 1
    assert same_weights(sharded, back.folder)
    assert back.model_hash == weights_hash(student)


def test_the_licence_of_the_base_model_is_taken_over(hub, student):
    base = Target("lab/base")
    publish(
        student,
        hub,
        base,
        options=CardOptions(license=License("other", name="x-research", link="https://example.org/L")),
    )
    records = replace(StudentRecords.load(student), training=training_summary(history=(), student_base="lab/base"))
    published = publish(student, hub, Target("alice/student"), records=records)
    assert published.bundle.card.data.license == "other"
    assert published.bundle.card.data.license_name == "x-research"


def test_a_licence_in_a_file_of_the_base_model_is_linked_there(hub, student):
    license = License("other", name="x-research", link="LICENSE.md")
    publish(student, hub, Target("lab/base"), options=CardOptions(license=license))
    records = replace(StudentRecords.load(student), training=training_summary(history=(), student_base="lab/base"))
    published = publish(student, hub, Target("alice/student"), records=records)
    assert published.bundle.card.data.license_link == "https://huggingface.co/lab/base/blob/main/LICENSE.md"


def test_two_at_the_same_time_end_in_one_commit_of_the_same_or_a_refusal(hub, student):
    """Equal students find each other's commit; of different ones the second is told that somebody came first."""
    publish(student, hub, Target("alice/student"))
    repository = hub.repository("alice/student")

    def attempt(word: str) -> str:
        try:
            publish(student, hub, Target("alice/student"), options=CardOptions(limitations=(word,)))
        except HubError as error:
            return str(error)
        return ""

    for words in (("Same.", "Same."), ("One.", "Another.")):
        before = len(repository.history("main"))
        with ThreadPoolExecutor(2) as pool:
            errors = [error for error in pool.map(attempt, words) if error]
        assert all("somebody else changed" in error for error in errors)
        assert len(repository.history("main")) == before + len(set(words)) - len(errors)
        assert all("README.md" in commit.tree for commit in repository.history("main")[:-1])


def test_a_licence_that_cannot_be_asked_for_does_not_make_another_card(hub, student):
    """The lookup that fails for a while must not end in one commit without the licence and a second one with it."""
    publish(student, hub, Target("lab/base"), options=CardOptions(license=License("mit")))
    records = replace(StudentRecords.load(student), training=training_summary(history=(), student_base="lab/base"))
    hub.faults.append(Fault("GET /api/models/lab/base", "status", times=10**6))
    with pytest.raises(HubError, match=r"looking up the licence of lab/base \(--license states it\) failed"):
        publish(student, hub, Target("alice/student"), records=records)
    assert "alice/student" not in hub.state.repositories
    hub.faults[0].times = 2
    assert publish(student, hub, Target("alice/student"), records=records).bundle.card.data.license == "mit"


def test_a_secret_never_goes_over_the_wire(hub, student, tmp_path, monkeypatch):
    """Planted in the environment, beside the student and in its folder: none of it is in anything that the Hub received."""
    secret = "correct-horse-battery"
    folder = Path(shutil.copytree(student, tmp_path / "student"))
    monkeypatch.setenv("MY_SERVICE_TOKEN", secret)
    (folder / ".env").write_text(f"KEY={secret}")
    (folder / "trainer_state.json").write_text(json.dumps({"note": secret}))
    torch.save({"hub_token": secret}, folder / "training_args.bin")
    (folder / "checkpoint-10" / "secret.json").write_text(secret)
    publish(folder, hub, Target("alice/student"))
    commit = hub.repository("alice/student").resolve("main")
    received = [blob.content for blob in commit.tree.values()]
    received += [*hub.state.large_files.values(), repr(commit).encode(), "".join(hub.requests).encode()]
    assert not any(word in content for content in received for word in (secret.encode(), ALICE.token.encode()))
    for place, field in (("commit message", "commit_message"), ("tag", "tag"), ("revision", "revision")):
        hub.requests.clear()
        with pytest.raises(LeakError, match=f"the {place}, line 1: the value of the environment variable") as caught:
            publish(folder, hub, Target("alice/student", **{field: f"x-{secret}"}))
        assert secret not in str(caught.value)
        assert hub.requests == []


def save_adapter(folder: Path, base: str) -> Path:
    from peft import LoraConfig, get_peft_model

    model = tiny_qwen3()
    model.name_or_path = base
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    training_summary(history=(), student_base=base).save(folder)
    evaluation_report(weights_hash(folder)).save(folder / "evaluation" / "chain.json")
    return folder


READ_WITH_TRANSFORMERS = """
import sys
sys.modules["prune_opd_hf"] = None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for name in ("lab/base", "alice/adapter"):
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    print(name, model(torch.tensor([[2, 3, 4]])).logits.double().sum().item())
"""


@pytest.mark.filterwarnings("ignore")
def test_readers_with_plain_transformers_get_whole_models_adapters_and_a_snippet_that_runs(hub, student, tmp_path):
    from peft import PeftModel

    publish(student, hub, Target("lab/base"), options=CardOptions(example_prompt="1+2"))
    adapter = save_adapter(tmp_path / "adapter", "lab/base")
    card = publish(adapter, hub, Target("alice/adapter")).bundle.card
    assert (card.data.library_name, card.data.base_model, card.data.base_model_relation) == (
        "peft",
        "lab/base",
        "adapter",
    )
    assert same_weights(adapter, download("alice/adapter", hub, folder=tmp_path / "back").folder)

    readme = hub.repository("lab/base").resolve("main").tree["README.md"].content.decode()
    snippet = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert snippet is not None
    program = READ_WITH_TRANSFORMERS + snippet[1]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    environment.pop("HF_TOKEN", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    inputs = torch.tensor([[2, 3, 4]])
    base = tiny_qwen3().eval()
    expected = [base(inputs).logits.double().sum().item()]
    expected.append(PeftModel.from_pretrained(base, adapter).eval()(inputs).logits.double().sum().item())
    printed = [float(line.split()[1]) for line in done.stdout.splitlines()[:2]]
    assert printed == pytest.approx(expected, abs=1e-6)
    assert expected[0] != pytest.approx(expected[1], abs=1e-6)


@pytest.mark.parametrize(
    ("user", "target", "message"),
    [
        (None, Target("alice/student"), "hf auth login"),
        (User("nobody", "not-a-token"), Target("alice/student"), "does not know this token"),
        (READER, Target("alice/student"), "may not do that"),
        (READER, Target("lab/student"), "may not do that"),
        (ALICE, Target("bob/student"), "rights to create a model under the namespace bob"),
        (ALICE, Target("readers/student"), "namespace readers"),
        (FINE, Target("alice/other"), "may not do that"),
    ],
)
def test_who_may_not_write_is_refused_before_a_file_is_sent(hub, student, user, target, message):
    with pytest.raises(HubAccessError, match=message) as caught:
        publish_student(student, target, token=user.token if user else None, endpoint=hub.endpoint, retries=QUICK)
    assert "\n" not in str(caught.value)
    assert "token-" not in str(caught.value)
    assert not hub.state.repositories
    assert not any("PUT" in request or "preupload" in request for request in hub.requests)


@pytest.mark.parametrize("user", [READER, BOB])
def test_who_may_read_a_repository_alone_is_refused_before_a_file_is_sent(hub, student, tmp_path, user):
    publish(student, hub, Target("alice/student"))
    hub.requests.clear()
    with pytest.raises(HubAccessError, match="may not do that"):
        publish(save_student(tmp_path / "other", seed=1, history=False), hub, Target("alice/student"), user)
    assert not any("PUT" in request or "/commit/" in request for request in hub.requests)


@pytest.mark.parametrize("name", ["a b", "v1..2", "0a" * 20])
def test_a_branch_or_tag_that_git_cannot_have_is_refused_by_the_hub(hub, student, name):
    with pytest.raises(HubError, match="Invalid reference name"):
        publish(student, hub, Target("alice/student", revision=name))
    assert len(hub.repository("alice/student").commits) == 1  # the one that comes with a repository
    with pytest.raises(HubError, match=r"published as commit [0-9a-f]{8}; tagging it .* Invalid reference name"):
        publish(student, hub, Target("alice/student", tag=name))
    assert publish(student, hub, Target("alice/student", tag="v1")).found


@pytest.mark.parametrize(("user", "repo_id"), [(ALICE, "lab/student"), (FINE, "alice/student")])
def test_who_may_write_can(hub, student, user, repo_id):
    assert publish(student, hub, Target(repo_id), user).commit_id


def test_a_private_student_is_not_put_into_a_public_repository(hub, student, tmp_path):
    publish(student, hub, Target("alice/student"))
    with pytest.raises(HubError, match="exists and is public"):
        publish(save_student(tmp_path / "other", seed=1, history=False), hub, Target("alice/student", private=True))
    assert len(hub.repository("alice/student").history("main")) == 2


def test_offline_mode_is_named_as_the_reason(hub, student, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        publish(student, hub, Target("alice/student"))


def test_a_card_that_the_hub_refuses_is_not_published(hub, student):
    options = CardOptions(license=License("no-such-licence"))
    with pytest.raises(HubError, match="license 'no-such-licence' is not known") as caught:
        publish(student, hub, Target("alice/student"), options=options)
    assert "\n" not in str(caught.value)
    assert len(hub.repository("alice/student").commits) == 1  # the one that comes with a repository
    assert not any("PUT" in request for request in hub.requests)


def test_somebody_elses_change_meanwhile_is_not_overwritten(hub, student):
    publish(student, hub, Target("alice/student"))
    repository = hub.repository("alice/student")

    def meanwhile():
        repository.branches["main"] = repository.add_commit(
            repository.branches["main"], "theirs", "", "bob", repository.resolve("main").tree
        ).id

    hub.faults.append(Fault("preupload", "meanwhile", effect=meanwhile))
    options = CardOptions(limitations=("One more.",))
    with pytest.raises(HubError, match="somebody else changed"):
        publish(student, hub, Target("alice/student"), options=options)
    assert repository.history("main")[0].title == "theirs"
    publish(student, hub, Target("alice/student"), options=options)
    assert [commit.title for commit in repository.history("main")] == [
        "Publish student", "theirs", "Publish student", "initial commit",
    ]  # fmt: skip
