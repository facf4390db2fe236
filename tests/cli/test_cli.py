"""The command line: one line and exit code 2 for whatever is wrong, and nothing overwritten."""

import pytest

from prune_opd_hf.cli import COMMANDS, main

EMBEDDED = (
    "--model_name_or_path embedded --teacher_model_name_or_path embedded --dataset_name embedded --use_cpu true".split()
)


def run(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_its_arguments(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"prune-opd {command}" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "there is no command 'nope'"),
        (["demo", "--seconds", "0"], "seconds must be above 0"),
        (["demo", "--seconds", "many"], "invalid float value: 'many'"),
        (["demo", "--device", "abacus"], "device must be cpu or cuda"),
        (["demo", "--unknown", "1"], "unrecognized arguments: --unknown 1"),
        (["train", "--config", "missing.yaml"], "no such file: missing.yaml"),
        (["train", *EMBEDDED, "--drift_top_k", "0", "--output_dir", "x"], "top_k must be a whole number of at least 1"),
        (
            ["train", *EMBEDDED, "--drift_threshold", "1.5", "--output_dir", "x"],
            "threshold must lie in (0, 1], got 1.5",
        ),
        (["train", *EMBEDDED, "--drift_threshold", "0", "--output_dir", "x"], "threshold must lie in (0, 1], got 0.0"),
        (["train", *EMBEDDED, "--pruning", "half", "--output_dir", "x"], "invalid choice: 'half'"),
        (["train", "--use_cpu", "true", "--output_dir", "x"], "model_name_or_path is needed"),
        (
            ["train", *EMBEDDED, "--dataset_name", "missing.jsonl", "--output_dir", "x"],
            "no prompts file at missing.jsonl",
        ),
        (
            ["train", *EMBEDDED, "--model_name_or_path", "./missing", "--output_dir", "x"],
            "cannot load the student './missing'",
        ),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert err.startswith("prune-opd: error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_top_k_above_the_vocabulary_is_refused(capsys, tmp_path):
    code, _, err = run(
        capsys, "train", *EMBEDDED, "--drift_top_k", "65", "--max_completion_length", "20", "--output_dir", tmp_path
    )
    assert code == 2
    assert err.splitlines()[-1] == "prune-opd: error: top_k must lie in 1 to 64, the teacher's vocabulary; got 65"


def test_an_unknown_field_in_the_config_is_named_with_the_nearest_ones(capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("drift_treshold: 0.5\n")
    code, _, err = run(capsys, "train", "--config", path)
    assert code == 2
    assert "unknown field 'drift_treshold'; did you mean drift_threshold" in err


@pytest.mark.parametrize("command", [["demo", "--output_dir"], ["train", *EMBEDDED, "--output_dir"]])
def test_an_output_folder_that_exists_is_left_alone(capsys, tmp_path, command):
    (tmp_path / "precious").write_text("data")
    code, _, err = run(capsys, *command, tmp_path)
    assert code == 2
    assert "exists" in err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert (tmp_path / "precious").read_text() == "data"
