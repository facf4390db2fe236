"""`prune-opd train`: file under command line, prompts from files, a run that leaves a student."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd_hf.cli import main
from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.tasks import ChainTask
from prune_opd_hf.training.script import ScriptArguments, load_prompts, parse_arguments, read_yaml
from prune_opd_hf.training.summary import TrainingSummary


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("learning_rate: 1e-4\nmax_prompt_length: null\noutput_dir: here\nuse_cpu: true\ntop_p: 0.9\n")
    _, config = parse_arguments(["--config", str(path), "--top_p", "0.8"])
    assert (config.learning_rate, config.max_prompt_length, config.top_p, config.temperature) == (1e-4, None, 0.8, 1.0)


@pytest.mark.parametrize(("text", "said"), [("- a\n- b\n", "fields with values"), ("a: [", "not valid YAML")])
def test_a_file_that_is_no_config_says_so(tmp_path, text, said):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_yaml(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_prompts_come_from_local_files(tmp_path, kind):
    rows = [{"prompt": problem.prompt} for problem in ChainTask().problems(3, seed=0)]
    path = tmp_path / f"prompts.{kind}"
    if kind == "parquet":
        ChainTask().dataset(3, seed=0).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    assert load_prompts(ScriptArguments(dataset_name=str(path)))["prompt"][:] == [row["prompt"] for row in rows]


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "prompts.docx"
    path.write_text("x")
    with pytest.raises(InputError, match=r"is not a \.json"):
        load_prompts(ScriptArguments(dataset_name=str(path)))


def test_a_run_leaves_a_student_that_plain_transformers_loads_and_goes_on_when_told(tmp_path, capsys):
    output = tmp_path / "run"
    arguments = (
        "train --model_name_or_path embedded --teacher_model_name_or_path embedded --dataset_name embedded".split()
    )
    arguments += "--use_cpu true --per_device_train_batch_size 4 --num_generations 2 --max_completion_length 12".split()
    arguments += "--drift_top_k 2 --drift_min_length 0 --save_steps 1 --report_to none --disable_tqdm true".split()
    arguments += ["--output_dir", str(output)]
    assert main([*arguments, "--max_steps", "2"]) == 0
    assert main([*arguments, "--max_steps", "3", "--resume", "true"]) == 0
    capsys.readouterr()
    summary = TrainingSummary.load(output)
    assert (summary.steps, summary.rollouts) == (3, 12)
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size == len(AutoTokenizer.from_pretrained(output))
