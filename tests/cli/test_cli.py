"""The command line: one line and exit code 2 for whatever is wrong, and nothing overwritten."""

import os
import re
from dataclasses import dataclass, field

import pytest

from prune_opd_hf.cli import COMMANDS, main
from prune_opd_hf.cli.parser import parse
from prune_opd_hf.errors import ConfigError

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
    ("command", "usage"),
    [
        ("evaluate", "usage: prune-opd evaluate MODEL [OPTIONS]\n"),
        ("report", "usage: prune-opd report ACTION REPORT [OTHER] [OPTIONS]\n"),
        ("train", "usage: prune-opd train [OPTIONS]\n"),
    ],
)
def test_help_shows_what_may_stand_without_a_name(capsys, command, usage):
    _, out, _ = run(capsys, command, "--help")
    assert out.startswith(usage)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "there is no command 'nope'"),
        (["demo", "--seconds", "0"], "the budget of seconds must be a finite number above 0, got 0.0"),
        (["demo", "--seconds", "many"], "invalid float value: 'many'"),
        (["demo", "--device", "abacus"], "invalid choice: 'abacus'"),
        (["demo", "--output_dir", ""], "output_dir is empty: name a folder"),
        (["demo", "--output_dir", __file__ + "/demo"], "test_cli.py is a file: choose another"),
        (["demo", "--unknown", "1"], "unrecognized arguments: --unknown 1"),
        (["train", "--config", "missing.yaml"], "no such file: missing.yaml"),
        (["train", *EMBEDDED, "--drift_top_k", "0", "--output_dir", "x"], "drift_top_k must be at least 1, got 0"),
        (
            ["train", *EMBEDDED, "--drift_threshold", "1.5", "--output_dir", "x"],
            "threshold must lie in (0, 1], got 1.5",
        ),
        (["train", *EMBEDDED, "--drift_threshold", "0", "--output_dir", "x"], "threshold must lie in (0, 1], got 0.0"),
        (["train", *EMBEDDED, "--pruning", "half", "--output_dir", "x"], "invalid choice: 'half'"),
        (["train", "--use_cpu", "true", "--output_dir", "x"], "arguments are required: --dataset_name"),
        (
            ["train", *EMBEDDED, "--dataset_name", "missing.jsonl", "--output_dir", "x"],
            "no prompts file at missing.jsonl",
        ),
        (
            ["train", *EMBEDDED, "--model_name_or_path", "./missing", "--output_dir", "x"],
            "'./missing'",
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


@pytest.mark.parametrize(
    "command", [["demo"], ["train", *EMBEDDED], ["preflight", *EMBEDDED[:-2]], ["merge", "an-adapter"]]
)
def test_an_output_folder_that_exists_is_left_alone(capsys, tmp_path, command):
    (tmp_path / "precious").write_text("data")
    code, _, err = run(capsys, *command, "--output_dir", tmp_path)
    assert code == 2
    assert "exists" in err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert (tmp_path / "precious").read_text() == "data"


@dataclass(frozen=True)
class First:
    model: str
    max_prompt_length: int = 8
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Second:
    learning_rate: float = 1e-3
    warmup: float | None = 0.5


def parsed(*arguments, **options):
    return parse([First, Second], [str(argument) for argument in arguments], "mine", **options)


@pytest.mark.parametrize("spelling", ["--max_prompt_length", "--max-prompt-length"])
def test_hyphens_and_underscores_are_the_same(spelling):
    assert parsed("--model", "m", spelling, 9)[0].max_prompt_length == 9
    assert parsed("--model", "m", f"{spelling}=9")[0].max_prompt_length == 9


def test_leading_words_stand_for_the_positional_fields_in_order():
    assert parsed("m", "--tags", "a", "b", positional=["model"])[0] == First("m", tags=["a", "b"])
    assert parsed("m", 9, positional=["model", "max_prompt_length"])[0] == First("m", 9)
    with pytest.raises(SystemExit):
        parsed("m", "more", positional=["model"])


def test_the_command_line_stands_above_the_file_and_the_file_above_the_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: from-file\nlearning_rate: 2e-4\nwarmup: null\n")
    assert parsed("--config", path, config=True) == (First("from-file"), Second(2e-4, None))
    assert parsed(f"--config={path}", "--model", "m", "--warmup", 0.1, config=True) == (First("m"), Second(2e-4, 0.1))
    assert parsed("--model", "m", config=True) == (First("m"), Second())


@pytest.mark.parametrize("value", ["1e1", "2.5", "true", "null", "[2]", "{a: 2}", "two"])
def test_a_whole_number_of_a_file_is_one(tmp_path, value):
    path = tmp_path / "config.yaml"
    path.write_text(f"model: '5'\nmax_prompt_length: {value}\n")
    with pytest.raises(ConfigError, match="max_prompt_length must be a whole number, got"):
        parsed("--config", path, config=True)


def test_text_that_is_a_number_is_one_and_a_single_value_a_list_of_one(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: m\nmax_prompt_length: '9'\ntags: a\nlearning_rate: '2e-4'\nwarmup: 1\n")
    assert parsed("--config", path, config=True) == (First("m", 9, ["a"]), Second(2e-4, 1))


@pytest.mark.parametrize(("written", "read"), [("007", "7"), ("1e400", "inf"), ("5", "5"), ("no", "False")])
def test_a_number_is_no_text_before_it_is_put_in_quotes(tmp_path, written, read):
    path = tmp_path / "config.yaml"
    path.write_text(f"model: {written}\n")
    with pytest.raises(ConfigError, match=f"model is text, got {read}: put it in quotes"):
        parsed("--config", path, config=True)
    path.write_text(f"model: '{written}'\n")
    assert parsed("--config", path, config=True)[0] == First(written)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modl: m\n", "unknown field 'modl'; did you mean model?"),
        ("[1]\n", "must hold fields with values"),
        ("a: [\n", "is not valid YAML"),
        ("model: m\ntags: [{a: 1, a: 2}]\n", "line 2: 'a' is there twice"),
        (None, "no such file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_name(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parsed("--config", path, config=True)
    assert "config.yaml" in str(caught.value)


@pytest.mark.parametrize("said", ["", "the last checkpoint is x"])
@pytest.mark.parametrize(("command", "further"), [("study", "; the same command goes on from there"), ("view", "")])
def test_what_is_interrupted_says_what_goes_on_from_there(capsys, monkeypatch, command, further, said):
    def interrupted(*_):
        raise KeyboardInterrupt(said)

    monkeypatch.setattr("prune_opd_hf.cli._run", interrupted)
    code, _, err = run(capsys, command)
    assert code == 130
    assert err.startswith("prune-opd: interrupted")
    assert err.endswith(f"{said or further}\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["view", "--help"], ["--version"]])
def test_output_that_nobody_reads_any_more_ends_the_command_without_a_word(monkeypatch, capsys, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        assert main(arguments) == 141
    assert capsys.readouterr().err == ""


OLD_SPELLINGS = {
    "max_new_tokens": "max_completion_length",
    "samples": "num_generations",
    "rollouts_per_prompt": "num_generations",
    "prompts": "num_prompts or dataset_name",
    "student": "model_name_or_path",
    "teacher": "teacher_model_name_or_path",
    "dataset": "dataset_name",
    "rows_at_once": "generation_batch_size",
    "message": "commit_message",
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_speaks_one_vocabulary(capsys, command):
    _, out, _ = run(capsys, command, "--help")
    options = {option.replace("-", "_") for option in re.findall(r"--([a-z][\w-]*)", out)}
    assert not {option: OLD_SPELLINGS[option] for option in options & OLD_SPELLINGS.keys()}
    assert "output" not in options or command == "view"  # a file; folders are output_dir
