"""A trainer's student goes to the Hub by the same way as a folder's."""

import pytest
from datasets import Dataset
from loopback_hub import LoopbackHub, User
from loopback_hub.client import go_online
from loopback_hub.student_folders import evaluation_report, tiny_qwen3, tiny_tokenizer

from prune_opd_hf.errors import HubAccessError, PublishError
from prune_opd_hf.publishing import Patience, download_student
from prune_opd_hf.publishing.trainer_push import push_trainer
from prune_opd_hf.training import PruneOPDConfig, PruneOPDTrainer

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own upload
ALICE = User("alice", "token-of-alice")
QUICK = Patience(attempts=2, first_wait_seconds=0.01)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    go_online(monkeypatch, tmp_path / "cache")
    with LoopbackHub([ALICE]) as hub:
        yield hub


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
    summary = trainer.summary(dataset="embedded chains")
    return push_trainer(trainer, summary, endpoint=hub.endpoint, patience=QUICK, **options)


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
    with pytest.raises(HubAccessError, match="neither you"):
        push(trainer_in(tmp_path / "run", hub_model_id="bob/run"), hub)
