"""`prune-opd evaluate` and `prune-opd report`: what they print, what they refuse, kills, and several processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluation_helpers import comparable, logged
from launching import accelerate_launch, launched

from prune_opd_hf.cli import main
from prune_opd_hf.evaluation import EvaluationReport, evaluate_model
from prune_opd_hf.tasks.pair import WEIGHTS

STUDENT = WEIGHTS / "student"
QUICK = "--benchmarks chain --num-generations 2 --limit 4 --max-completion-length 60".split()
LONGER = {"num_generations": 4, "limit": 40, "max_completion_length": 112, "slots": 8}
OPTIONS = [part for name, value in LONGER.items() for part in (f"--{name.replace('_', '-')}", str(value))]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_the_command_line_evaluates_shows_and_compares(tmp_path, capsys):
    for seed in ("0", "1"):
        assert main(["evaluate", "embedded", *QUICK, "--seed", seed, "--output-dir", str(tmp_path / seed)]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 6
    assert table[2].startswith("| chain (prune_opd_hf.tasks.chain) |        4 |")
    for first in (0, 3):
        assert len({len(line) for line in table[first : first + 3]}) == 1
    assert main(["report", "show", str(tmp_path / "0")]) == 0
    assert "embedded-student" in capsys.readouterr().out
    assert main(["report", "compare", str(tmp_path / "0"), str(tmp_path / "1" / "report.json")]) == 0
    assert "within the noise of 4 problems" in capsys.readouterr().out


def test_template_settings_reach_the_prompts(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "prune_opd_hf.evaluation.evaluate.evaluate_model",
        lambda *args, **settings: seen.update(settings) or sys.exit(0),
    )
    with pytest.raises(SystemExit):
        main(["evaluate", "embedded", *QUICK, "--chat-template-kwargs", '{"enable_thinking": false}'])
    assert seen["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to run in, with one of everything that can be wrong."""
    files = {
        "cut.json": '[{"prompt": "1+1?",',
        "object.json": "{}",
        "unanswered.json": '[{"prompt": "1+1?"}]',
        "blank.json": '[{"prompt": " ", "answer": "2"}]',
        "good.json": '[{"prompt": "1 + 1 = ", "answer": "2"}]',
        "cut.jsonl": '{"prompt": "1", "answer": "2"}\n{"prompt"',
        "empty.jsonl": "",
        "file": "x",
        "no_model/readme.txt": "x",
        "cut_config/config.json": "{",
        "no_weights/config.json": (STUDENT / "config.json").read_text(),
        "t5/config.json": json.dumps({"model_type": "t5", "is_encoder_decoder": True}),
        "run/samples-00000.jsonl": "nonsense\n",
        "other/report.json": "{}",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    for name in ("cut_weights", "no_tokenizer", "no_end"):
        shutil.copytree(STUDENT, tmp_path / name)
    shutil.copy(STUDENT / "tokenizer.json", tmp_path / "t5")
    weights = tmp_path / "cut_weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "no_tokenizer" / name).unlink()
    for path in (tmp_path / "no_end").glob("*.json"):
        settings = json.loads(path.read_text())
        if path.name != "tokenizer.json":
            path.write_text(json.dumps({key: value for key, value in settings.items() if "eos_token" not in key}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


REFUSED = [
    ("evaluate", "arguments are required"),
    ("evaluate embedded", "required: --benchmarks"),
    ("evaluate --benchmarks chain", "required: --model"),
    ("evaluate embedded more --benchmarks chain", "unrecognized arguments: more"),
    ("evaluate embedded --benchmarks aime-24", r"did you mean aime24\?"),
    ("evaluate embedded --benchmarks chain chain", "each once"),
    ("evaluate embedded --benchmarks cut.json", "cut.json is no JSON"),
    ("evaluate embedded --benchmarks object.json", "row 0 of object.json has no 'prompt'"),
    ("evaluate embedded --benchmarks unanswered.json", "row 0 of unanswered.json has no 'answer'"),
    ("evaluate embedded --benchmarks blank.json", "problem 0 .* is empty"),
    ("evaluate embedded --benchmarks cut.jsonl", "line 2 of cut.jsonl is no JSON"),
    ("evaluate embedded --benchmarks empty.jsonl", "empty.jsonl must be"),
    ("evaluate embedded --benchmarks absent.json", "no benchmark file absent.json"),
    ("evaluate embedded --benchmarks =good.json", "benchmark name"),
    ("evaluate embedded --benchmarks /etc/a=good.json", "benchmark name"),
    *[
        (f"evaluate embedded --benchmarks chain {change}", message)
        for change, message in [
            ("--num-generations 0", "num_generations must be"),
            ("--num-generations many", "invalid int value"),
            ("--temperature nan", "temperature must be"),
            ("--top-p 0", "top_p must lie"),
            ("--top-k -1", "top_k must be"),
            ("--max-completion-length 0", "max_completion_length must be"),
            ("--max-completion-length 600", "lower max_completion_length to 485"),
            ("--seed -1", "seed must be"),
            ("--slots 0", "slots must be"),
            ("--limit 0", "limit must be"),
            ("--engine other", "engine must be one of"),
            ("--dtype int8", "not a floating-point dtype"),
            ("--dtype float31", "dtype must be auto, float32, bfloat16 or float16, got 'float31'"),
            ("--revision main", "revision belongs to a Hub id"),
            ("--chat-template-kwargs {", "not a valid chat_template_kwargs: it is not complete JSON"),
            ("--chat-template-kwargs []", "chat_template_kwargs: it must be a JSON object"),
            ("--frobnicate", "unrecognized arguments"),
            ("--max-completion-length 9 --output-dir file", "output_dir file cannot be a folder"),
            ("--max-completion-length 9 --output-dir file/below", "file is a file"),
            ("--max-completion-length 9 --output-dir run", "not a valid sample .line 1 of samples-00000.jsonl"),
        ]
    ],
    *[
        (f"evaluate {model} --benchmarks chain --max-completion-length 9", message)
        for model, message in [
            ("no_model", "cannot load the model 'no_model'"),
            ("cut_config", "not a valid JSON file"),
            ("no_weights", "no file named model.safetensors"),
            ("cut_weights", "cannot load the model 'cut_weights': Error while deserializing header"),
            ("no_tokenizer", "does the tokenizer belong to the model?"),
            ("no_end", "names a token that ends a response"),
            ("t5", "cannot load the model 't5': Unrecognized configuration class"),
            ("file", "cannot load the model 'file'"),
            ("./absent", "cannot load the model './absent'"),
            ("a/b/c", "cannot load the model 'a/b/c'"),
            ("someone/model", "connect to"),
            ("no_weights --revision main", "revision belongs to a Hub id"),
        ]
    ],
    ("report", "required: --action, --report"),
    ("report tell", "invalid value 'tell'|invalid choice: 'tell'"),
    ("report show", "required: --report"),
    ("report show absent", "no such file: absent"),
    ("report show no_model", "no such file: no_model/report.json"),
    ("report show other", "other.report.json is not a valid evaluation report"),
    ("report show cut.json", "cut.json is not a valid evaluation report"),
    ("report show other more", "report show takes one report"),
    ("report compare other other more", "unrecognized arguments: more"),
    ("report compare other", "report compare takes two reports"),
    ("report compare other absent --metric", "expected one argument"),
]


@pytest.mark.parametrize(("command", "message"), REFUSED)
def test_what_cannot_be_done_is_one_line_code_2_and_nothing_written(place, capsys, command, message):
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    try:
        code = main(command.split())
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    # "Loading weights" is the bar of Transformers
    [line] = [line for line in re.split(r"[\r\n]+", said.err) if line.strip() and "Loading weights" not in line]
    assert re.search(message, line)
    assert line.startswith("prune-opd: error: ")
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert not (place / "evaluation").exists()


def test_a_folder_with_a_run_of_other_settings_is_refused_and_left_alone(tmp_path, capsys):
    command = ["evaluate", "embedded", *QUICK, "--output-dir", str(tmp_path)]
    assert main(command) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    for change, named in (
        (["--seed", "3"], "seed"),
        (["--top-p", "0.5", "--temperature", "0.6"], "temperature, top_p"),
        (["--max-completion-length", "61"], "max_completion_length"),
        (["--engine", "continuous_batching"], "engine"),
        (["--dtype", "bfloat16"], "dtype"),
    ):
        assert main([*command, *change]) == 2
        errors = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.startswith("prune-opd")]
        assert errors == [
            f"prune-opd: error: {tmp_path.name}/ holds samples that were drawn otherwise ({named} differ): choose another "
            "folder, or evaluate with the same settings to continue"
        ]
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def command(folder: Path) -> list[str]:
    script = Path(sys.executable).with_name("prune-opd")
    return [str(script), "evaluate", "embedded", "--benchmarks", "chain", *OPTIONS, "--output-dir", str(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[EvaluationReport, dict[tuple[int, int], str]]:
    """The report and the samples of the run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    report = evaluate_model(
        STUDENT, ["chain"], **LONGER, output_dir=folder, model_name="embedded-student", progress=False
    )
    return report, texts(folder)


def kill_after(samples: int, folder: Path) -> None:
    """Start the command and kill it once it has written so many samples."""
    log = folder / "samples-00000.jsonl"
    with subprocess.Popen(
        command(folder), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not (log.exists() and log.read_bytes().count(b'"response"') >= samples):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "report.json").exists()


def texts(folder: Path) -> dict[tuple[int, int], str]:
    samples = logged(folder)
    responses = {(sample["problem"], sample["sample"]): sample["response"] for sample in samples}
    assert (
        len(samples) == len(responses) == LONGER["num_generations"] * LONGER["limit"]
    )  # nothing twice, nothing missing
    return responses


@pytest.mark.parametrize("kills", [[40], pytest.param([1, 2, 30, 31, 100, 150], marks=pytest.mark.slow)])
def test_a_killed_command_continues_to_the_same_report(tmp_path, whole, kills):
    for samples in kills:
        kill_after(samples, tmp_path)
    subprocess.run(command(tmp_path), env=ENVIRONMENT, check=True, capture_output=True)
    report, responses = whole
    assert comparable(EvaluationReport.load(tmp_path / "report.json")) == comparable(report)
    assert texts(tmp_path) == responses


def test_processes_under_accelerate_launch_share_the_work_and_report_the_same(tmp_path, whole):
    """On CPUs `accelerate launch` starts several processes of this machine with --multi_gpu alone: it is torchrun's launcher."""
    with accelerate_launch() as launch:
        printed = launched(*launch, "-m", "prune_opd_hf.cli", *command(tmp_path)[1:])
    assert printed.count("| chain (prune_opd_hf.tasks.chain) |       40 |") == 1
    two, (one, responses) = EvaluationReport.load(tmp_path / "report.json"), whole
    assert comparable(two) == comparable(one)
    assert texts(tmp_path) == responses
    shares = [path.read_bytes().count(b'"response"') for path in sorted(tmp_path.glob("samples-*.jsonl"))]
    assert shares == [80, 80]
    assert two.hardware.endswith(", 2 processes")


def test_processes_that_do_not_know_each_other_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # accelerate was set up for one process by the tests before, or is so here
    monkeypatch.setattr(
        "accelerate.PartialState._shared_state", {"num_processes": 1, "_cpu": True, "distributed_type": "NO"}
    )
    assert main(["evaluate", "embedded", *QUICK]) == 2
    assert "2 processes were started, but accelerate was set up for one" in capsys.readouterr().err
