"""What would be published: everything that a reader needs, nothing of this machine, and refused while anything is wrong."""

import errno
import getpass
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from loopback_hub.student_folders import evaluation_report, save_student, tiny_qwen3, training_summary
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd_hf.errors import LeakError, PublishError
from prune_opd_hf.hub import CardOptions, License, StudentRecords, build_bundle
from prune_opd_hf.records.weights import weights_hash

SECRET = "correct-horse-battery"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """One student's folder; tests work on copies."""
    return save_student(tmp_path_factory.mktemp("students") / "student")


@pytest.fixture
def student(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "student"))


def quick_bundle(folder: Path, **options):
    return build_bundle(folder, figures=False, **options)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def published_text(bundle) -> str:
    contents = [content if isinstance(content, bytes) else content.read_bytes() for content in bundle.files.values()]
    return "\n".join([*bundle.files, *(content.decode("utf-8", errors="replace") for content in contents)])


def test_a_bundle_holds_what_a_reader_needs_and_nothing_else(student):
    bundle = quick_bundle(student, options=CardOptions(license=License("mit")))
    assert sorted(bundle.files) == [
        "README.md",
        "config.json",
        "evaluation/00-chain.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_summary.json",
    ]
    assert bundle.left_out == ("checkpoint-10/", "training_args.bin")
    assert bundle.warnings == ()
    assert bundle.model_hash == weights_hash(student)


def test_what_a_card_will_lack_is_said(student):
    (student / "training_summary.json").unlink()
    shutil.rmtree(student / "evaluation")
    warnings = " ".join(quick_bundle(student).warnings)
    assert "no training summary" in warnings
    assert "no evaluation report" in warnings
    assert "no licence" in warnings


def test_the_description_names_every_file_with_its_size(student):
    bundle = quick_bundle(student)
    lines = bundle.describe().splitlines()
    for path in bundle.files:
        assert any(line.endswith(f"B  {path}") for line in lines)
    assert any(f"in {len(bundle.files)} files" in line for line in lines)
    assert any(line.startswith("left out: checkpoint-10/") for line in lines)


def test_the_saved_folder_is_what_would_be_uploaded_and_loads(student, tmp_path):
    place = quick_bundle(student).save(tmp_path / "out")
    assert weights_hash(place) == weights_hash(student)
    model = AutoModelForCausalLM.from_pretrained(place)
    assert torch.equal(model.lm_head.weight, AutoModelForCausalLM.from_pretrained(student).lm_head.weight)
    assert len(AutoTokenizer.from_pretrained(place)) > 0
    assert StudentRecords.load(place) == StudentRecords.load(student)
    with pytest.raises(PublishError, match="not empty"):
        quick_bundle(student).save(place)


def test_records_survive_the_way_there_and_back(student, tmp_path):
    own = evaluation_report(weights_hash(student))
    other = evaluation_report("sha256:" + "b" * 64, model_name="org/teacher")
    records = StudentRecords(training_summary(), (own, own), {"teacher/../x": (other,), "base student": (other,)})
    place = quick_bundle(student, records=records).save(tmp_path / "out")
    for folder in (place / "evaluation", place / "evaluation" / "comparisons" / "00-teacher x"):
        (folder / "._report.json").write_bytes(b"\x00\x05\x16\x07")  # a Mac's, on a disk of another system
    loaded = StudentRecords.load(place)
    assert (loaded.training, loaded.reports) == (records.training, records.reports)
    assert list(loaded.comparisons.items()) == [("teacher x", (other,)), ("base student", (other,))]


BROKEN = {
    "no folder": (lambda folder: shutil.rmtree(folder), "is not a folder"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "pickled weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "loading a pickle runs its code",
    ),
    "weights cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8]),
        "cut short",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    "a config that is nested without end": (
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        r"config\.json is missing or damaged",
    ),
    "damaged config": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is missing or damaged"),
    "weights of another shape": (
        lambda folder: edit_json(folder / "config.json", hidden_size=64),
        "does not load",
    ),
    "weights of another depth": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2),
        "missing keys",
    ),
    "foreign code": (
        lambda folder: edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "model.Model"}),
        "trust_remote_code",
    ),
    "foreign code of the tokenizer": (
        lambda folder: edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}),
        "trust_remote_code",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer_config.json").unlink(), r"tokenizer_config\.json is missing"),
    "damaged tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "cannot load the student's tokenizer",
    ),
    "no generation config": (lambda folder: (folder / "generation_config.json").unlink(), "generation_config"),
    "a report of other weights": (
        lambda folder: evaluation_report("sha256:" + "b" * 64).save(folder / "evaluation" / "other.json"),
        "made with other weights",
    ),
    "a damaged report": (
        lambda folder: (folder / "evaluation" / "chain.json").write_text("{"),
        "not a valid evaluation report",
    ),
    "a pickle called a vocabulary": (
        lambda folder: (folder / "spiece.model").write_bytes(pickle.dumps({"a": 1})),
        r"spiece\.model is a pickle",
    ),
    "an archive called a licence": (
        lambda folder: torch.save({"a": torch.ones(1)}, folder / "LICENSE"),
        "LICENSE is a pickle, an archive",
    ),
    "a link out of the folder": (
        lambda folder: (folder / "NOTICE").symlink_to(Path(__file__).resolve()),
        "NOTICE is a link out of the folder",
    ),
    "a kernel from the Hub": (
        lambda folder: edit_json(folder / "config.json", attn_implementation="somebody/kernel"),
        "kernel from the Hub",
    ),
    "words behind the weights": (
        lambda folder: (folder / "model.safetensors").open("ab").write(b"any words at all"),
        "not fully covered",
    ),
    "a damaged summary": (lambda folder: (folder / "training_summary.json").write_text("{"), "not complete JSON"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_with_something_wrong_is_refused_with_one_line(student, what):
    break_it, message = BROKEN[what]
    break_it(student)
    with pytest.raises(PublishError, match=message) as caught:
        quick_bundle(student)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_a_larger_model_is_refused(student):
    tiny_qwen3(vocab_size=8).save_pretrained(student)
    shutil.rmtree(student / "evaluation")
    with pytest.raises(PublishError, match="the model embeds 8"):
        quick_bundle(student)


def test_weights_that_are_not_numbers_are_refused(student):
    model = tiny_qwen3()
    model.lm_head.weight.data[0, 0] = float("nan")
    model.save_pretrained(student)
    with pytest.raises(PublishError, match="NaN"):
        quick_bundle(student)


def test_all_problems_are_told_at_once(student):
    (student / "training_summary.json").write_text("{")
    (student / "generation_config.json").unlink()
    with pytest.raises(PublishError, match="2 reasons") as caught:
        quick_bundle(student)
    assert "generation_config" in str(caught.value)
    assert "complete JSON" in str(caught.value)


def plant_in_environment(folder, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", SECRET)


def plant_in_config(folder, monkeypatch):
    edit_json(folder / "config.json", my_note=SECRET, hub_token=SECRET)


def plant_in_run_folder(folder, monkeypatch):
    (folder / ".env").write_text(f"HF_TOKEN={SECRET}\n")
    (folder / "trainer_state.json").write_text(json.dumps({"token": SECRET}))
    (folder / "wandb").mkdir()
    (folder / "wandb" / "run.log").write_text(SECRET)
    torch.save({"hub_token": SECRET}, folder / "training_args.bin")
    (folder / "model.py").write_text(f"KEY = '{SECRET}'")


def plant_in_summary(folder, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", SECRET)
    training_summary(hyperparameters={"note": f"run with {SECRET}"}).save(folder)


def plant_in_chat_template(folder, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", SECRET)
    (folder / "chat_template.jinja").write_text(f"{{# {SECRET} #}}")


def plant_in_tokenizer(folder, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", SECRET)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"what"', f'"{SECRET}"'))


def plant_in_weights_header(folder, monkeypatch):
    from safetensors.torch import load_file, save_file

    monkeypatch.setenv("MY_SERVICE_TOKEN", SECRET)
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "note": SECRET})


def plant_in_command(folder, monkeypatch):
    training_summary(command=f"HF_TOKEN=hf_{'a1' * 17} prune-opd train").save(folder)


@pytest.mark.parametrize("plant", [plant_in_environment, plant_in_run_folder])
def test_a_secret_beside_the_student_stays_here(student, monkeypatch, plant):
    plant(student, monkeypatch)
    assert SECRET not in published_text(quick_bundle(student))


@pytest.mark.parametrize(
    "plant",
    [
        plant_in_config,
        plant_in_summary,
        plant_in_chat_template,
        plant_in_tokenizer,
        plant_in_weights_header,
        plant_in_command,
    ],
)
def test_a_secret_in_what_would_be_published_is_refused_and_not_repeated(student, monkeypatch, plant):
    plant(student, monkeypatch)
    with pytest.raises(LeakError, match="not for the public") as caught:
        quick_bundle(student)
    assert SECRET not in str(caught.value)
    assert "a1a1" not in str(caught.value)


def test_the_token_in_use_is_a_secret_too(student):
    training_summary(hardware="a host with my-very-own-token").save(student)
    with pytest.raises(LeakError, match="the Hub token in use"):
        quick_bundle(student, token="my-very-own-token")


@pytest.mark.parametrize("where", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_where_a_model_came_from_is_taken_out_of_its_configs(student, where):
    edit_json(student / where, _name_or_path=str(student / "checkpoint-10"), name_or_path="/data/models/base")
    text = published_text(quick_bundle(student))
    assert str(student) not in text
    assert "/data/models" not in text


def test_a_hub_id_as_origin_stays_and_the_file_with_it_byte_for_byte(student):
    edit_json(student / "config.json", _name_or_path="Qwen/Qwen3-0.6B")
    assert quick_bundle(student).files["config.json"] == (student / "config.json").read_bytes()


def test_a_path_of_this_machine_in_a_record_is_refused_with_file_and_line(student):
    training_summary(hardware=f"2 cores, data in {student}").save(student)
    with pytest.raises(LeakError, match=r"training_summary\.json, line \d+: a path of this machine"):
        quick_bundle(student)


def test_nothing_of_this_machine_stands_in_what_is_published(student):
    training_summary(
        dataset=str(student / "prompts.jsonl"), student_base=str(student), hyperparameters={"output_dir": student}
    ).save(student)
    text = published_text(quick_bundle(student))
    for word in (str(student), str(Path.home()), str(Path.cwd())):
        assert word not in text
    assert "prompts.jsonl (local)" in text


def test_an_adapter_without_a_base_on_the_hub_is_refused(student):
    (student / "model.safetensors").rename(student / "adapter_model.safetensors")
    (student / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/data/base"})
    )
    shutil.rmtree(student / "evaluation")
    with pytest.raises(PublishError, match="names no base model on the Hub"):
        quick_bundle(student)


def test_an_adapter_whose_records_name_another_base_is_refused(student):
    (student / "model.safetensors").rename(student / "adapter_model.safetensors")
    (student / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/other"})
    )
    with pytest.raises(PublishError, match="names org/base as base"):
        quick_bundle(student)


def test_a_snapshot_of_the_hubs_cache_can_be_published(student, tmp_path):
    """Its files are links to the store beside it."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for number, path in enumerate(sorted(student.glob("*.json*"))):
        path.rename(tmp_path / "models--a--b" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    shutil.copy(student / "model.safetensors", snapshot)
    assert quick_bundle(snapshot).model_hash == weights_hash(snapshot)


def test_a_disk_that_is_full_leaves_no_half_written_folder(student, tmp_path, monkeypatch):
    bundle = quick_bundle(student)

    def full(source, place):
        Path(place).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        with pytest.raises(PublishError, match=r"No space left on device.*make room"):
            bundle.save(tmp_path / "saved")
    assert not any((tmp_path / "saved").iterdir())
    assert {path.name for path in bundle.save(tmp_path / "saved").iterdir()} == {
        path.split("/")[0] for path in bundle.files
    }


def test_a_relative_path_is_not_taken_for_a_repository(student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"student_base": "runs/base", "teacher": "runs/teacher", "dataset": "data/prompts.jsonl"}
    training_summary(**names).save(student)
    assert quick_bundle(student).card.data.base_model == "runs/base"  # nothing here is called so
    for path in names.values():
        Path(path).mkdir(parents=True)
    bundle = quick_bundle(student)
    assert not {"base_model", "base_model_relation", "datasets"} & set(bundle.card.data.to_dict())
    assert "`base (local)`, not a repository on the Hub" in bundle.card.text
    assert not any(path in published_text(bundle) for path in names.values())


def test_a_card_written_by_hand_is_not_replaced_in_silence(student):
    assert not any("README.md" in warning for warning in quick_bundle(student).warnings)
    (student / "README.md").write_text("my own words")
    bundle = quick_bundle(student)
    assert any("README.md stays here" in warning for warning in bundle.warnings)
    (student / "README.md").write_text(str(bundle.card))
    assert not any("README.md" in warning for warning in quick_bundle(student).warnings)


@pytest.mark.parametrize("user", ["student", "teacher", "model"])
def test_a_user_who_is_called_as_every_card_speaks_can_publish(student, monkeypatch, user):
    monkeypatch.setattr(getpass, "getuser", lambda: user)
    assert quick_bundle(student).files


def test_a_chat_template_may_speak_of_paths_but_not_of_this_machines(student):
    template = student / "chat_template.jinja"
    template.write_text("{# The drive at '/mnt/data' keeps the files of the tool. #}")
    assert quick_bundle(student).files
    template.write_text(f"{{# {student} #}}")
    with pytest.raises(LeakError, match="a path of this machine"):
        quick_bundle(student)
