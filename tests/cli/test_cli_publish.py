"""`prune-opd publish` and `prune-opd download` as the command line calls them: options, lines printed, one-line errors."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub, User
from loopback_hub.client import go_online, make_default
from loopback_hub.student_folders import evaluation_report, save_student
from transformers import AutoModelForCausalLM, HfArgumentParser

from prune_opd_hf.cli.publish import DownloadArguments, PublishArguments, download, publish
from prune_opd_hf.errors import ConfigError, FileFormatError, HubAccessError, PruneOPDError
from prune_opd_hf.hub import Retries, StudentRecords
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.records.weights import weights_hash

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own upload
ALICE = User("alice", "token-of-alice")
QUICK = Retries(attempts=2, first_wait_seconds=0.01)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    go_online(monkeypatch, tmp_path / "cache")
    with LoopbackHub([ALICE]) as hub:
        make_default(monkeypatch, hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", ALICE.token)
        yield hub


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return save_student(tmp_path_factory.mktemp("students") / "student", history=False)


def parsed(record, line: str):
    return record(**vars(HfArgumentParser(record).parse_args(line.split())))


def test_the_command_line_becomes_the_record():
    arguments = parsed(
        PublishArguments,
        "--folder runs/student --repo-id me/student --private --revision v2 --tag v2.0 --reports a.json b.json "
        "--compare teacher=t.json --license other --license-name x --license-link https://x --dry-run",
    )
    assert (arguments.folder, arguments.repo_id, arguments.private, arguments.revision) == (
        "runs/student",
        "me/student",
        True,
        "v2",
    )
    assert (arguments.reports, arguments.compare, arguments.dry_run) == (["a.json", "b.json"], ["teacher=t.json"], True)
    assert parsed(DownloadArguments, "--repo-id me/student --revision v1").revision == "v1"


def test_every_option_is_explained():
    for record in (PublishArguments, DownloadArguments):
        assert all(item.metadata["help"].endswith(".") for item in record.__dataclass_fields__.values())


def test_published_and_downloaded_with_what_was_done_in_words(hub, student, tmp_path, capsys):
    publish(PublishArguments(folder=str(student), repo_id="alice/student", license="mit"), QUICK)
    printed = capsys.readouterr().out
    assert printed.startswith("to alice/student, branch main:\n")
    assert "model.safetensors" in printed
    assert "left out: checkpoint-10/, training_args.bin" in printed
    assert f"alice/student is published: {hub.endpoint}/alice/student (commit " in printed
    publish(PublishArguments(folder=str(student), repo_id="alice/student", license="mit"), QUICK)
    assert "was there already" in capsys.readouterr().out
    download(DownloadArguments(repo_id="alice/student", output_dir=str(tmp_path / "back")), QUICK)
    printed = capsys.readouterr().out
    assert "Qwen3ForCausalLM, 5,808 parameters, float32" in printed
    assert "trained: 3 steps, pruning drift, teacher org/teacher" in printed
    assert "75.0 [55.0, 85.0]" in printed
    assert str(tmp_path / "back") in printed


def test_a_quiet_one_says_where_it_is_and_no_more(hub, student, capsys):
    publish(PublishArguments(folder=str(student), repo_id="alice/student", license="mit", quiet=True), QUICK)
    assert capsys.readouterr().out.startswith(f"alice/student is published: {hub.endpoint}/alice/student (commit ")


def test_a_dry_run_writes_the_folder_and_sends_nothing(hub, student, tmp_path, capsys):
    arguments = PublishArguments(
        folder=str(student), repo_id="alice/student", dry_run=True, output_dir=str(tmp_path / "dry")
    )
    publish(arguments, QUICK)
    assert "nothing was uploaded" in capsys.readouterr().out
    assert not any(request.startswith(("POST", "PUT")) for request in hub.requests)
    place = tmp_path / "dry" / "student"
    assert (place / "README.md").is_file()
    assert AutoModelForCausalLM.from_pretrained(place).num_parameters() > 0
    with pytest.raises(ConfigError, match="is not empty: remove it, or choose another --output_dir"):
        publish(replace(arguments, folder="not looked at"), QUICK)


def test_what_a_stranger_wrote_does_not_steer_the_terminal(hub, student, tmp_path, capsys):
    publish(PublishArguments(folder=str(student), repo_id="alice/student"), QUICK)
    tree = hub.repository("alice/student").resolve("main").tree
    name = "training_summary.json"
    hostile = tree[name].content.replace(b"org/teacher", rb"\u001b]0;owned\u0007\u009b2J")
    tree[name] = replace(tree[name], content=hostile)
    download(DownloadArguments(repo_id="alice/student", output_dir=str(tmp_path / "back")), QUICK)
    printed = capsys.readouterr().out
    assert "]0;owned" in printed
    assert not set("\x1b\x07\x9b") & set(printed)


def test_a_dry_run_needs_no_network(student, tmp_path):
    arguments = PublishArguments(folder=str(student), repo_id="alice/student", dry_run=True, output_dir=str(tmp_path))
    assert publish(arguments, QUICK) == 0  # the test process is offline


def test_reports_of_this_and_other_models_come_from_where_they_are_named(hub, student, tmp_path):
    bare = Path(shutil.copytree(student, tmp_path / "student"))
    shutil.rmtree(bare / "evaluation")
    own = evaluation_report(weights_hash(bare)).save(tmp_path / "own.json")
    teacher = evaluation_report("sha256:" + "b" * 64, model_name="org/teacher").save(
        tmp_path / "reports" / "teacher.json"
    )
    arguments = PublishArguments(
        folder=str(bare), repo_id="alice/student", reports=[str(own)], compare=[f"teacher={teacher.parent}"]
    )
    publish(arguments, QUICK)
    download(DownloadArguments(repo_id="alice/student", output_dir=str(tmp_path / "back")), QUICK)
    records = StudentRecords.load(tmp_path / "back")
    assert [report.model_name for report in records.reports] == ["org/student"]
    assert list(records.comparisons) == ["teacher"]


def test_a_base_and_a_teacher_that_lay_in_folders_can_be_named(student, tmp_path):
    local = Path(shutil.copytree(student, tmp_path / "runs"))
    replace(TrainingSummary.load(local), student_base="qwen-base", teacher="/home/me/qwen-teacher").save(local)
    arguments = PublishArguments(
        folder=str(local),
        repo_id="alice/student",
        base_model="org/base",
        teacher_model="org/teacher",
        dry_run=True,
        output_dir=str(tmp_path),
    )
    publish(arguments, QUICK)
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert card.data.base_model == "org/base"
    assert "[`org/teacher`](https://huggingface.co/org/teacher)" in card.text
    training = TrainingSummary.load(tmp_path / "student")
    assert (training.student_base, training.teacher) == ("org/base", "org/teacher")


def test_a_name_that_the_record_knows_is_not_changed(student, tmp_path):
    arguments = PublishArguments(folder=str(student), repo_id="alice/student", base_model="org/other")
    with pytest.raises(ConfigError, match="student base: the training summary says 'org/base'"):
        publish(arguments, QUICK)
    with pytest.raises(ConfigError, match=r"teacher: .*OWNER/NAME .*, got '\./teacher'"):
        publish(replace(arguments, base_model=None, teacher_model="./teacher"), QUICK)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"repo_id": "student"}, ConfigError, "owner/name"),
        ({"folder": "no/such"}, PruneOPDError, "is not a folder"),
        ({"license": "other"}, ConfigError, "needs a name and a link"),
        ({"compare": ["teacher"]}, ConfigError, "NAME=FILE"),
        ({"compare": ["teacher=no.json"]}, FileFormatError, "no.json does not exist"),
        ({"reports": ["no.json"]}, FileFormatError, "no.json does not exist"),
        ({"reports": [str(Path(__file__).parent)]}, FileFormatError, "cli does not exist or holds no report"),
        ({"compare": [f"teacher={Path(__file__).parent}"]}, FileFormatError, "holds no report"),
        ({"create_pr": True, "tag": "v1"}, ConfigError, "cannot be tagged"),
        ({"revision": " "}, ConfigError, "must not be empty"),
        ({"tag": "main"}, ConfigError, "different names"),
        ({"repo_id": "bob/student"}, HubAccessError, "may not do that"),
    ],
)
def test_what_cannot_be_worked_with_is_one_line_and_sends_nothing(hub, student, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        publish(PublishArguments(**{"folder": str(student), "repo_id": "alice/student", **changes}), QUICK)
    assert "\n" not in str(caught.value)
    assert not hub.state.repositories


def test_a_licence_name_without_a_licence_is_refused():
    with pytest.raises(ConfigError, match="--license other"):
        PublishArguments(folder="x", repo_id="a/b", license_name="x")
