"""The decoding loop as a Hub repository: the package's own code, whole, and usable where the package is not installed."""

import ast
import os
import re
import subprocess
import sys

import pytest
import torch
from loopback_hub import LoopbackHub, User
from loopback_hub.cards import card_errors
from loopback_hub.client import go_online
from loopback_hub.student_folders import save_student, tiny_qwen3

from prune_opd_hf.algorithm.drift import DriftConfig
from prune_opd_hf.generation import DriftMonitor, pruned_generate
from prune_opd_hf.hub import Patience, Target, generate_repository, publish_student
from prune_opd_hf.hub.generate_repository import build_generate_repository, publish_generate_repository
from prune_opd_hf.hub.hub_generate import generate

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own upload
ALICE = User("alice", "token-of-alice")
QWEN = User("Qwen", "token-of-qwen")
LOADED_WHEN_NEEDED: set[str] = set()
"""Modules that are imported inside of functions only."""
PROMPTS = torch.tensor([[2, 3, 4], [5, 6, 7], [8, 9, 10]])


@pytest.fixture(autouse=True)
def _online(monkeypatch, tmp_path):
    go_online(monkeypatch, tmp_path / "cache")


def test_every_file_stands_alone_and_imports_only_what_is_there():
    files = build_generate_repository("org/loop")
    names = {path.removeprefix("custom_generate/").removesuffix(".py") for path in files if path.endswith(".py")}
    assert "generate" in names
    for path, content in files.items():
        if path.endswith(".py"):
            source = content.decode()
            compile(source, path, "exec")
            assert not re.search(r"^\s*(?:from|import)\s+prune_opd_hf", source, re.MULTILINE)
            assert set(re.findall(r"^\s*from\s+\.(\w+)\s+import", source, re.MULTILINE)) <= names


@pytest.mark.parametrize(
    "line",
    [
        "import prune_opd_hf.algorithm.drift",
        "from prune_opd_hf.generation import x",
        "from .loop import x",
        "from prune_opd_hf import drift",
    ],
)
def test_an_import_that_cannot_be_carried_over_is_refused(line):
    with pytest.raises(NotImplementedError, match="line 2 imports"):
        generate_repository._own_imports(ast.parse(f"import torch\n{line}\n"))


def test_the_files_are_found_by_their_imports_and_hold_every_module_that_decoding_loads():
    """Not by a list: a fresh process that loads the entry point tells which modules of the package it needs."""
    program = (
        "import sys, types, importlib.util, pathlib\n"
        "root = pathlib.Path(importlib.util.find_spec('prune_opd_hf').origin).parent\n"
        "for name in ('prune_opd_hf', 'prune_opd_hf.generation', 'prune_opd_hf.hub'):\n"
        "    package = sys.modules[name] = types.ModuleType(name)\n"  # without what a package's __init__ loads beside it
        "    package.__path__ = [str(root.joinpath(*name.split('.')[1:]))]\n"
        "import prune_opd_hf.hub.hub_generate\n"
        "print(*[name for name, module in sys.modules.items() if name.startswith('prune_opd_hf.') and module.__file__])\n"
    ).replace("and module.__file__", "and getattr(module, '__file__', None)")
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    loaded = {generate_repository._file_name(module) for module in printed.stdout.split()}
    there = {path.removeprefix("custom_generate/") for path in build_generate_repository("org/loop")}
    assert loaded <= there
    assert {path for path in there if path.endswith(".py")} - loaded <= LOADED_WHEN_NEEDED


def test_the_requirements_are_those_of_the_package_and_no_more():
    stated = build_generate_repository("org/loop")["custom_generate/requirements.txt"].decode().split()
    assert {re.split("[<>=]", line)[0] for line in stated} == {"torch", "transformers", "jaxtyping", "safetensors"}
    assert all(">=" in line for line in stated)


def test_the_card_is_valid_and_names_the_repository():
    card = build_generate_repository("org/loop")["README.md"].decode()
    assert card_errors(card) == []
    assert 'custom_generate="org/loop"' in card


def test_the_entry_point_does_what_the_package_does():
    student, teacher = tiny_qwen3(0).eval(), tiny_qwen3(1).eval()
    drift = {"top_k": 4, "threshold": 0.9, "weight_drop": 0.5}
    sequences, rollouts = generate(
        student,
        teacher,
        drift=drift,
        check_every=4,
        return_rollouts=True,
        inputs=PROMPTS,
        max_new_tokens=12,
        do_sample=False,
    )
    monitor = DriftMonitor(teacher, DriftConfig(**drift), check_every=1, eos_token_id=1)
    expected = student.generate(
        PROMPTS, max_new_tokens=12, do_sample=False, custom_generate=pruned_generate, drift_monitor=monitor
    )
    assert torch.equal(sequences, expected)
    assert rollouts.stop_reason == monitor.finish(expected).stop_reason


def test_without_a_teacher_nothing_is_recorded():
    student = tiny_qwen3().eval()
    plain = student.generate(PROMPTS, max_new_tokens=8, do_sample=False)
    assert torch.equal(generate(student, inputs=PROMPTS, max_new_tokens=8, do_sample=False), plain)
    with pytest.raises(ValueError, match="needs a teacher_model"):
        generate(student, return_rollouts=True, inputs=PROMPTS)


READER = """
import sys
sys.modules["prune_opd_hf"] = None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
student, teacher = (AutoModelForCausalLM.from_pretrained(place).eval() for place in sys.argv[1:3])
exec(sys.argv[3])
assert output.shape[1] > inputs["input_ids"].shape[1]
arguments = dict(max_new_tokens=12, do_sample=False, custom_generate="alice/loop", trust_remote_code=True)
prompts = torch.tensor([[2, 3, 4], [5, 6, 7], [8, 9, 10]])
for teacher_model in (teacher, sys.argv[2], None):
    output = student.generate(
        prompts, teacher_model=teacher_model, drift={"top_k": 4, "threshold": 0.9, "weight_drop": 0.5}, check_every=3, **arguments
    )
    print(output.tolist())
"""


def test_plain_transformers_uses_it_from_the_hub_without_this_package(tmp_path):
    for seed, name in ((0, "student"), (1, "teacher")):
        tiny_qwen3(seed, max_position_embeddings=1024).save_pretrained(save_student(tmp_path / name, records=False))
    with LoopbackHub([ALICE, QWEN]) as hub:
        for folder, repo_id in (("student", "Qwen/Qwen3-0.6B"), ("teacher", "Qwen/Qwen3-1.7B")):  # named by the card
            publish_student(tmp_path / folder, Target(repo_id), token=QWEN.token, endpoint=hub.endpoint)
        quick = Patience(first_wait_seconds=0.01)
        sent = publish_generate_repository(
            Target("alice/loop"), token=ALICE.token, endpoint=hub.endpoint, patience=quick
        )
        again = publish_generate_repository(
            Target("alice/loop"), token=ALICE.token, endpoint=hub.endpoint, patience=quick
        )
        assert (again.commit_id, again.found) == (sent.commit_id, True)
        readme = hub.repository("alice/loop").resolve("main").tree["README.md"].content.decode()
        snippet = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
        assert snippet is not None
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        done = subprocess.run(
            [sys.executable, "-c", READER, str(tmp_path / "student"), str(tmp_path / "teacher"), snippet[1]],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    student, teacher = tiny_qwen3(0).eval(), tiny_qwen3(1).eval()
    drift = {"top_k": 4, "threshold": 0.9, "weight_drop": 0.5}
    watched = generate(student, teacher, drift=drift, inputs=PROMPTS, max_new_tokens=12, do_sample=False).tolist()
    plain = student.generate(PROMPTS, max_new_tokens=12, do_sample=False).tolist()
    answer, *printed = done.stdout.splitlines()
    assert answer  # of the card's snippet, prompt and all
    assert [eval(line) for line in printed] == [watched, watched, plain]
    assert watched != plain
