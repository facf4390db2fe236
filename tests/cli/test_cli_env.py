"""`prune-opd env`: what a bug report needs, whatever is broken or missing."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from prune_opd_hf import __version__
from prune_opd_hf.cli import env, main

ROOT = Path(__file__).parents[2]
NEEDED = [
    "torch>=2.6",
    "packaging>=9999",
    "no-such-package>=1",
    "only-on-mars; sys_platform == 'mars'",
    "matplotlib>=3.8; extra == 'figures'",
    "no-such-adapters>=1; extra == 'peft'",
    "no-such-linter; extra == 'test'",
]


def lines_of(capsys):
    assert main(["env"]) == 0
    return {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines() if line}


def test_each_package_stands_there_with_its_version_or_what_brings_it(capsys, monkeypatch):
    monkeypatch.setattr(env, "requires", lambda package: NEEDED)
    lines = lines_of(capsys)
    assert lines["prune-opd-hf"] == [__version__]
    assert lines["torch"] == [version("torch")]
    assert lines["packaging"] == [version("packaging"), "needed: >=9999"]
    assert lines["no-such-package"] == ["missing"]
    assert lines["matplotlib"] == [version("matplotlib"), env.EXTRAS["figures"]]
    assert lines["no-such-adapters"] == ["missing", "LoRA adapters; pip install 'prune-opd-hf[peft]'"]
    assert not {"only-on-mars", "no-such-linter"} & lines.keys()  # of another system, and of the project's own tools
    assert set(env.BESIDE) <= lines.keys()


def test_it_works_where_transformers_and_torch_are_broken():
    broken = dict.fromkeys(("transformers", "torch", "datasets"))
    code = f"import sys; sys.modules.update({broken}); from prune_opd_hf.cli import main; sys.exit(main(['env']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("prune-opd-hf")


def test_a_torch_that_cannot_be_imported_is_reported(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch cannot be imported: ModuleNotFoundError: " in " ".join(lines_of(capsys)["devices"])


def test_a_device_that_torch_does_not_find_is_said(capsys, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert "no accelerator that torch finds" in " ".join(lines_of(capsys)["devices"])


def test_a_package_that_runs_from_a_folder_says_so(capsys, monkeypatch):
    def missing(package):
        raise env.PackageNotFoundError(package)

    monkeypatch.setattr(env, "requires", missing)
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("prune-opd-hf is not installed: it runs from a folder\n")
    assert f"torch               {version('torch')}" in out


def test_every_extra_of_the_project_is_one_for_users_that_is_explained_or_one_of_its_own():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.search(r"\[project\.optional-dependencies\]\n(.*?)\n\[", project, flags=re.DOTALL)[1]
    assert re.findall(r"^(\w+) = ", extras, flags=re.MULTILINE) == [*env.EXTRAS, "docs", "real", "test"]
    for page in ("README.md", "docs/index.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [extra for extra in env.EXTRAS if not re.search(rf"\b{extra}\b", text)] == []


@pytest.mark.parametrize("template", ["bug_report", "question_or_idea"])
def test_issue_templates_ask_for_it(template):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{template}.yml").read_text(encoding="utf-8"))
    labels = {part["attributes"]["label"]: part.get("validations", {}) for part in form["body"]}
    assert labels["Output of `prune-opd env`"] == ({"required": True} if template == "bug_report" else {})
