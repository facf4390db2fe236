"""The decoding loop as a Hub repository: a folder whose few lines call the installed package, used by plain Transformers."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from loopback_hub import ALICE, LoopbackHub, User
from loopback_hub.cards import card_errors
from loopback_hub.student_folders import save_student, tiny_qwen3

import prune_opd_hf
from prune_opd_hf.algorithm.drift import DriftConfig
from prune_opd_hf.generation import DriftMonitor, pruned_generate
from prune_opd_hf.hub import publish_student

pytestmark = [
    pytest.mark.usefixtures("online"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own upload
]
QWEN = User("Qwen", "token-of-qwen")
FOLDER = Path(__file__).parents[2] / "examples" / "generate_repository"
PROMPTS = torch.tensor([[2, 3, 4], [5, 6, 7], [8, 9, 10]])


def entry_point():
    specification = importlib.util.spec_from_file_location("generate", FOLDER / "custom_generate" / "generate.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.generate


generate = entry_point()


def test_the_card_is_valid_and_the_requirement_is_this_package():
    assert card_errors((FOLDER / "README.md").read_text()) == []
    requirement = (FOLDER / "custom_generate" / "requirements.txt").read_text().strip()
    assert requirement == f"prune-opd-hf>={prune_opd_hf.__version__}"
    assert version("prune-opd-hf") == prune_opd_hf.__version__


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


def test_plain_transformers_uses_it_from_the_hub(tmp_path):
    for seed, name in ((0, "student"), (1, "teacher")):
        tiny_qwen3(seed, max_position_embeddings=1024).save_pretrained(save_student(tmp_path / name, records=False))
    with LoopbackHub([ALICE, QWEN]) as hub:
        for folder, repo_id in (("student", "Qwen/Qwen3-0.6B"), ("teacher", "Qwen/Qwen3-1.7B")):  # named by the card
            publish_student(tmp_path / folder, repo_id, token=QWEN.token, endpoint=hub.endpoint)
        api = HfApi(endpoint=hub.endpoint, token=ALICE.token)
        api.create_repo("alice/loop")
        api.upload_folder(repo_id="alice/loop", folder_path=FOLDER)
        readme = hub.repository("alice/loop").resolve("main").tree["README.md"].content.decode()
        readme = readme.replace("OWNER/NAME", "alice/loop")
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
