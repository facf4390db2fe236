"""The commands on a card are run as they stand, by somebody who has the package and the card: same numbers, same weights."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from loopback_hub import ALICE, LoopbackHub
from loopback_hub.student_folders import evaluation_report

from prune_opd_hf.evaluation.evaluate import evaluate_model
from prune_opd_hf.hub import Retries, StudentRecords, Target, publish_student
from prune_opd_hf.hub.results import repeat_commands, unrepeatable
from prune_opd_hf.records.evaluation_report import EvaluationReport
from prune_opd_hf.records.weights import weights_hash
from prune_opd_hf.tasks.pair import WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own upload
QUICK = Retries(attempts=2, first_wait_seconds=0.01)
HASH = "sha256:" + "a" * 64
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."


def as_a_person(commands: str, folder: Path, hub: LoopbackHub) -> None:
    """Run lines of a shell in an empty folder, with the package's own `prune-opd` and this Hub."""
    folder.mkdir()
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-e"],
        input=commands,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def card_commands(hub: LoopbackHub, repo_id: str) -> list[str]:
    """The blocks of shell commands in the card that stands on the Hub."""
    readme = hub.repository(repo_id).resolve("main").tree["README.md"].content.decode()
    return re.findall(r"^```bash\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)


def evaluated(folder: Path, **settings) -> EvaluationReport:
    return evaluate_model(
        folder, ["chain"], limit=4, num_generations=2, top_p=0.9, max_completion_length=112, progress=False, **settings
    )


def publish(folder, repo_id, hub, **options):
    return publish_student(folder, Target(repo_id), token=ALICE.token, endpoint=hub.endpoint, retries=QUICK, **options)


def scores(report: EvaluationReport) -> tuple:
    chain = report["chain"]
    return report.model_hash, report.sampling, chain.content_hash, chain.metrics, chain.problem_scores


def test_the_evaluations_of_a_card_give_its_numbers_again(hub, tmp_path):
    student = Path(shutil.copytree(WEIGHTS / "student", tmp_path / "student"))
    own = evaluated(student, seed=3)
    publish(student, "alice/student", hub, records=StudentRecords(None, (own,)))
    (commands,) = card_commands(hub, "alice/student")
    as_a_person(commands, tmp_path / "person", hub)
    assert scores(EvaluationReport.load(tmp_path / "person" / "repeated" / "1" / "report.json")) == scores(own)


TRAINING = (
    "prune-opd train --model_name_or_path embedded --teacher_model_name_or_path embedded --dataset_name embedded "
    "--output_dir run --max_steps 2 --per_device_train_batch_size 4 --num_generations 1 --max_completion_length 16 "
    "--drift_top_k 2 --learning_rate 1e-3 --report_to none --save_strategy no --use_cpu true --seed 5"
)


@pytest.mark.slow
def test_all_commands_of_a_card_give_the_same_weights_and_numbers_again(hub, tmp_path):
    as_a_person(TRAINING, tmp_path / "author", hub)
    student = tmp_path / "author" / "run"
    assert weights_hash(student) != weights_hash(WEIGHTS / "student")
    own, teacher = evaluated(student), evaluated(WEIGHTS / "teacher", temperature=0.5, model_name="alice/teacher")
    publish(WEIGHTS / "teacher", "alice/teacher", hub)
    records = replace(StudentRecords.load(student), reports=(own,), comparisons={"teacher": (teacher,)})
    publish(student, "alice/student", hub, records=records)
    training, evaluation = card_commands(hub, "alice/student")
    as_a_person(f"{training}\n{evaluation}", tmp_path / "person", hub)
    assert weights_hash(tmp_path / "person" / "run") == own.model_hash
    again = [EvaluationReport.load(tmp_path / "person" / "repeated" / n / "report.json") for n in ("1", "2")]
    assert [scores(report) for report in again] == [scores(own), scores(teacher)]
    assert scores(own) != scores(teacher)


def report_by(engine: str, **changes) -> EvaluationReport:
    return replace(evaluation_report(HASH, **changes), engine=engine)


def lines(*reports: EvaluationReport, **comparisons: list[EvaluationReport]) -> list[str]:
    block = repeat_commands(reports, "org/student", comparisons)
    return [] if block is None else str(block).splitlines()[1:-1]


def test_a_limited_benchmark_is_limited_again_and_each_command_has_its_own_folder():
    first = report_by("loop", problems=2)
    whole = report_by("continuous_batching", problems=512, problem_scores={"avg@2": (0.75,) * 512})
    assert lines(first, whole) == [
        "prune-opd evaluate org/student --benchmarks chain --num-generations 2 --temperature 1.0 --top-p 0.95 --top-k 0 "
        "--max-completion-length 32 --seed 0 --limit 2 --engine loop --dtype float32 --output-dir repeated/1",
        "prune-opd evaluate org/student --benchmarks chain --num-generations 2 --temperature 1.0 --top-p 0.95 --top-k 0 "
        "--max-completion-length 32 --seed 0 --engine continuous_batching --dtype float32 --output-dir repeated/2",
    ]


def test_a_file_is_named_with_its_content():
    sums = {"name": "my sums", "source": "sums.json", "content_hash": "sha256:" + "c" * 64}
    (note, command) = lines(report_by("loop", **sums))
    assert note == "# sums.json is the file with content cccccccccccc"
    assert "--benchmarks 'my sums=sums.json' " in command
    assert "--prompt-suffix" not in command


@pytest.mark.parametrize(("suffix", "word"), [(BOXED, "boxed"), ("Think; then answer.", "'Think; then answer.'")])
def test_a_suffix_that_is_not_the_benchmarks_own_is_given_again(suffix, word):
    command = lines(report_by("loop", name="sums", source="sums.json", prompt_suffix=suffix))[-1]
    assert f"--prompt-suffix {word} " in command


def test_settings_of_the_chat_template_and_vllm_are_given_again():
    form = 'chat template 0123 with {"enable_thinking": false}'
    report = report_by("vllm", name="sums", source="sums.json", prompt_form=form)
    command = lines(report)[-1]
    assert " --chat-template-kwargs '{\"enable_thinking\": false}' --engine vllm " in command
    assert unrepeatable([report], {}) == {}


def test_models_that_are_not_on_the_hub_have_no_command():
    known, unknown = (report_by("loop", model_name=name) for name in ("org/teacher", "a folder"))
    assert [line.split()[2] for line in lines(teacher=[known], base=[unknown])] == ["org/teacher"]


@pytest.mark.parametrize(
    ("engine", "changes"),
    [
        ("my own script", {}),
        ("loop", {"name": "my benchmark"}),
        ("loop", {"prompt_suffix": "Think."}),
        ("loop", {"name": "sums", "source": "sums.json", "prompt_suffix": "Think.\nThen answer."}),
        ("loop", {"name": "aime24", "source": "somebody/else", "prompt_suffix": BOXED}),
    ],
)
def test_what_no_command_can_repeat_is_said_to_be_so(engine, changes):
    report = report_by(engine, **changes)
    assert lines(report) == []
    assert unrepeatable([report], {}) == {report.benchmarks[0].name: engine}
