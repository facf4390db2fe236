"""The command that rebuilds the weights: a complete folder, or none and one clear line."""

import dataclasses
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd_hf.tasks import STUDENT_RECIPE, TEACHER_RECIPE, ChainTask
from prune_opd_hf.tasks import build as build_module
from prune_opd_hf.tasks.build import build, main

TINY = {
    "problems": 8,
    "task": ChainTask(operations=2, filler_min=1, filler_max=3),
    "teacher_recipe": dataclasses.replace(TEACHER_RECIPE, clean_steps=2, batch_size=4),
    "student_recipe": dataclasses.replace(STUDENT_RECIPE, clean_steps=1, mixed_steps=1, batch_size=4),
}


def test_the_folder_holds_both_models_their_tokenizers_and_how_they_were_made(tmp_path):
    build(tmp_path / "deep" / "weights", seed=5, **TINY)
    folder = tmp_path / "deep" / "weights"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "student", "teacher"]
    for name, layers in (("teacher", 3), ("student", 2)):
        assert AutoModelForCausalLM.from_pretrained(folder / name).config.num_hidden_layers == layers
        assert len(AutoTokenizer.from_pretrained(folder / name)) == 64
    files = [folder / name / "tokenizer.json" for name in ("teacher", "student")]
    assert files[0].read_bytes() == files[1].read_bytes()
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "python -m prune_opd_hf.tasks.build --output weights --seed 5" in readme
    assert readme.count(" of 8 (") == 4
    assert str(tmp_path) not in readme


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "cold_start_student", fail)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "weights", **TINY)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_with_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "keep").write_text("mine")
    command = [sys.executable, "-m", "prune_opd_hf.tasks.build", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"error: the output folder exists already: {tmp_path}; name a new one or remove it\n"
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "got 'abacus'"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--problems", "0"], "problems must be at least 1, got 0"),
    ],
)
def test_an_argument_that_cannot_work_is_refused_with_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    assert main(["--output", str(tmp_path / "weights"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--output", str(tmp_path / "file" / "weights")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_builds_with_what_it_was_told(tmp_path, capsys, monkeypatch):
    received = {}
    monkeypatch.setattr(build_module, "build", lambda output, **settings: received.update(settings, output=output))
    assert main(["--output", str(tmp_path / "weights"), "--seed", "4", "--problems", "16"]) == 0
    assert received == {"output": tmp_path / "weights", "seed": 4, "device": "cpu", "problems": 16}
    assert capsys.readouterr().out == f"wrote {tmp_path / 'weights'}\n"
