"""A trainer's student goes to the Hub by the same way as a folder's."""

import re
from dataclasses import replace

import pytest
from datasets import Dataset
from loopback_hub import ALICE
from loopback_hub.client import make_default
from loopback_hub.student_folders import evaluation_report, tiny_qwen3, tiny_tokenizer

from prune_opd_hf.cli.train import main
from prune_opd_hf.errors import ConfigError, HubAccessError, PublishError
from prune_opd_hf.hub import CardOptions, License, Retries, StudentRecords, download_student
from prune_opd_hf.training import PruneOPDConfig, PruneOPDTrainer

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own upload
QUICK = Retries(attempts=2, first_wait_seconds=0.01)


def trainer_in(folder, **changes) -> PruneOPDTrainer:
    settings = {
        "report_to": [],
        "use_cpu": True,
        "max_completion_length": 8,
        "max_prompt_length": 8,
        "hub_token": ALICE.token,
    }
    return PruneOPDTrainer(
        model=tiny_qwen3(0),
        teacher_model=tiny_qwen3(1),
        args=PruneOPDConfig(output_dir=str(folder), **{**settings, **changes}),
        train_dataset=Dataset.from_dict({"prompt": ["1+2", "3*4"]}),
        processing_class=tiny_tokenizer(),
    )


def push(trainer, hub, **options):
    return trainer.push_to_hub(endpoint=hub.endpoint, retries=QUICK, known={"dataset": "embedded chains"}, **options)


def test_model_tokenizer_and_summary_arrive_in_one_commit(hub, tmp_path):
    trainer = trainer_in(tmp_path / "my-student", hub_private_repo=True)
    published = push(trainer, hub, tag="v1")
    assert published is not None
    repository = hub.repository("alice/my-student")
    assert repository.private
    assert len(repository.commits) == 2
    assert repository.tags == {"v1": published.commit_id}
    back = download_student("alice/my-student", folder=tmp_path / "back", token=ALICE.token, endpoint=hub.endpoint)
    assert back.records.training == trainer.summary(dataset="embedded chains")
    assert ALICE.token not in (tmp_path / "back" / "training_summary.json").read_text()


def test_the_settings_of_the_trainer_say_where_to(hub, tmp_path):
    push(trainer_in(tmp_path / "run", hub_model_id="alice/other", hub_revision="try"), hub)
    assert set(hub.repository("alice/other").branches) == {"main", "try"}


def test_only_the_first_process_publishes(hub, tmp_path, monkeypatch):
    trainer = trainer_in(tmp_path / "run")
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    assert push(trainer, hub) is None
    assert hub.requests == []


def test_a_report_of_an_earlier_state_is_not_passed_off_as_one_of_this(hub, tmp_path):
    trainer = trainer_in(tmp_path / "run", hub_model_id="alice/run")
    evaluation_report("sha256:" + "b" * 64).save(tmp_path / "run" / "evaluation" / "chain.json")
    with pytest.raises(PublishError, match="made with other weights"):
        push(trainer, hub)
    assert not hub.state.repositories


def test_somebody_elses_namespace_is_refused(hub, tmp_path):
    with pytest.raises(HubAccessError, match="may not do that"):
        push(trainer_in(tmp_path / "run", hub_model_id="bob/run"), hub)


def test_a_trainer_that_pushes_what_it_saves_sends_one_commit_and_no_checkpoints(hub, tmp_path, monkeypatch):
    make_default(monkeypatch, hub.endpoint)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: pytest.fail("the Trainer's own way to the Hub"))
    trainer = trainer_in(
        tmp_path / "run", push_to_hub=True, hub_model_id="alice/run", save_steps=1, max_steps=2,
        num_generations=1, per_device_train_batch_size=1, drift_top_k=2, disable_tqdm=True,
    )  # fmt: skip
    trainer.train()
    assert not any(request.startswith(("POST", "PUT")) for request in hub.requests)
    trainer.save_model()
    (commit, initial) = hub.repository("alice/run").history("main")
    assert (commit.title, initial.title) == ("Model save", "initial commit")
    assert {"README.md", "model.safetensors", "training_summary.json"} <= set(commit.tree)
    assert not any("checkpoint" in path or path.endswith(".bin") for path in commit.tree)


def test_the_training_script_publishes_the_student_with_its_summary_in_one_commit(hub, tmp_path, monkeypatch):
    make_default(monkeypatch, hub.endpoint)
    settings = {
        "model_name_or_path": "embedded", "teacher_model_name_or_path": "embedded", "dataset_name": "embedded",
        "output_dir": str(tmp_path / "run"), "max_steps": "2", "save_steps": "1", "per_device_train_batch_size": "2",
        "num_generations": "1", "max_completion_length": "8", "drift_top_k": "2", "report_to": "none", "use_cpu": "true",
        "disable_tqdm": "true", "hub_model_id": "alice/run", "hub-token": ALICE.token, "push_to_hub": "true",
    }  # fmt: skip
    assert main([word for name, value in settings.items() for word in (f"--{name}", value)]) == 0
    (commit, initial) = hub.repository("alice/run").history("main")
    assert (commit.title, initial.title) == ("Model save", "initial commit")
    assert {"README.md", "model.safetensors", "training_summary.json", "figures/reward.png"} <= set(commit.tree)
    card = commit.tree["README.md"].content.decode()
    (command,) = re.findall(r"^prune-opd train .*$", card, re.MULTILINE)
    assert "--model_name_or_path embedded" in command
    assert not any(word in command for word in ("hub", "alice", ALICE.token))  # others repeat it, too
    training = StudentRecords.load(tmp_path / "run").training
    assert training is not None
    assert (training.steps, training.dataset, training.student_base) == (2, "embedded", "embedded")
    assert commit.tree["training_summary.json"].content.decode() == training.to_json()


def test_names_that_a_saved_summary_knows_better_are_kept(hub, tmp_path):
    trainer = trainer_in(tmp_path / "run", hub_model_id="alice/run")
    known = replace(trainer.summary(dataset="org/prompts"), teacher="org/teacher", command="prune-opd train --x")
    known.save(tmp_path / "run")
    published = trainer.push_to_hub(endpoint=hub.endpoint, retries=QUICK)
    assert published is not None
    assert published.bundle.card.data.datasets == ["org/prompts"]
    assert "org/teacher" in published.bundle.card.text
    assert "prune-opd train --x" in published.bundle.card.text


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [({"blocking": False}, ConfigError, "blocking"), ({"tags": ["x"]}, TypeError, "tags")],
)
def test_what_this_way_does_not_have_is_refused(hub, tmp_path, setting, error, message):
    with pytest.raises(error, match=message):
        push(trainer_in(tmp_path / "run", hub_model_id="alice/run"), hub, **setting)
    assert hub.requests == []


def test_the_card_of_the_output_folder_is_made_from_its_records(hub, tmp_path):
    trainer = trainer_in(tmp_path / "run")
    trainer.save_model()
    trainer.summary(dataset="org/prompts", teacher="org/teacher").save(tmp_path / "run")
    trainer.create_model_card(options=CardOptions(License("mit")))
    card = (tmp_path / "run" / "README.md").read_text()
    assert "license: mit" in card
    assert "org/teacher" in card
    assert hub.requests == []
