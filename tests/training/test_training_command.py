"""`prune-opd train`: file under command line, prompts from files, a run that leaves a student."""

import json
import resource
import shlex
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd_hf.cli import main
from prune_opd_hf.cli.train import ScriptArguments, parse_arguments, repeatable_command
from prune_opd_hf.errors import ConfigError, InputError
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.tasks import ChainTask
from prune_opd_hf.training import prompt_sources
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.prompt_sources import PromptArguments, load_evaluation_prompts, load_prompts
from prune_opd_hf.training.run_output import hyperparameters
from prune_opd_hf.training.trainer import PruneOPDTrainer

NAMES = "model_name_or_path: embedded\nteacher_model_name_or_path: embedded\ndataset_name: embedded\n"


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "learning_rate: 1e-4\nmax_prompt_length: null\noutput_dir: here\nuse_cpu: true\ntop_p: 0.9\n" + NAMES
    )
    _, config = parse_arguments(["--config", str(path), "--top_p", "0.8"])
    assert (config.learning_rate, config.max_prompt_length, config.top_p, config.temperature) == (1e-4, None, 0.8, 1.0)
    over = tmp_path / "over.yaml"
    over.write_text("learning_rate: 2e-4\ntop_p: 0.7\n")
    files = ["--config", str(path), f"--config={over}"]
    _, config = parse_arguments([*files, "--top_p", "0.8"])
    assert (config.learning_rate, config.max_prompt_length, config.top_p) == (2e-4, None, 0.8)
    words = shlex.split(repeatable_command([*files, "--top_p", "0.8"]))
    assert [words[words.index(name) + 1] for name in ("--learning_rate", "--top_p")] == ["0.0002", "0.7"]
    assert words[-2:] == ["--top_p", "0.8"]
    _, repeated = parse_arguments(words[2:])
    assert (repeated.learning_rate, repeated.max_prompt_length, repeated.top_p) == (2e-4, None, 0.8)
    assert "max_prompt_length" in hyperparameters(repeated)  # None is not its default


@pytest.mark.parametrize(("text", "said"), [("- a\n- b\n", "fields with values"), ("a: [", "not valid YAML")])
def test_a_file_that_is_no_config_says_so(tmp_path, text, said):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        parse_arguments(["--config", str(path)])


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_prompts_come_from_local_files(tmp_path, monkeypatch, kind):
    rows = [{"prompt": problem.prompt} for problem in ChainTask().problems(3, seed=0)]
    folder = tmp_path / "lr=[1] *"  # no pattern
    folder.mkdir()
    path = folder / f"prompts.{kind}"
    if kind == "parquet":
        ChainTask().dataset(3, seed=0).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(folder)
    for name in (str(path), path.name):
        assert load_prompts(PromptArguments(dataset_name=name))["prompt"][:] == [row["prompt"] for row in rows]


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "prompts.docx"
    path.write_text("x")
    with pytest.raises(InputError, match=r"is not a \.json"):
        load_prompts(PromptArguments(dataset_name=str(path)))


RUN = (
    "train --model_name_or_path embedded --teacher_model_name_or_path embedded --use_cpu true --report_to none "
    "--disable_tqdm true --max_completion_length 12 --per_device_train_batch_size 4"
).split()


@pytest.mark.parametrize(
    ("name", "content", "more", "said"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', "", "line 2 is not JSON"),
        ("a.jsonl", '{"prompt": "x"}\n[1]\n', "", "line 2 is not a JSON object"),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"prompt": \n',
            "--dataset_streaming true --max_steps 1",
            "prompts cannot be read",
        ),
        ("a.jsonl", "\n", "", "is empty"),
        ("a.json", '[{"prompt": "x"', "", "cannot be read as json"),
        ("a.parquet", "PAR1", "", "cannot be read as parquet"),
        ("a.jsonl", '{"question": "x"}', "", "needs a column 'prompt'; it has question"),
        ("a.jsonl", '{"question": "x"}', "--dataset_streaming true --max_steps 1", "needs a column 'prompt'"),
        ("a.jsonl", '{"prompt": "x"}', "--prompt_column task", "needs a column 'task'; it has prompt"),
        ("a.jsonl", '{"prompt": 3}', "", "a prompt must be text or a list of messages"),
        ("a.jsonl", '{"prompt": null}', "", "a prompt must be text or a list of messages"),
        ("a.jsonl", '{"prompt": [{"role": "user", "content": "+3"}]}', "", "has no chat template"),
        ("a.csv", "prompt\n, +1 = 3\n", "--max_prompt_length 2", "no prompt is left"),
        ("a.csv", "prompt\n, +1 = 3\n", "--dataset_streaming true", "dataset_streaming needs max_steps"),
        ("a.txt", "x", "", "is not a .json"),
        ("a.jsonl", '{"prompt": "x"}', "--use_peft --lora_r 0", "lora_r must be at least 1"),
        ("a.jsonl", '{"prompt": "x"}', "--lora_alpha 8", "lora_alpha has no effect without use_peft"),
        ("a.jsonl", '{"prompt": "x"}', "--eval_dataset_name b.jsonl", "eval_dataset_name has no effect without"),
        ("a.jsonl", '{"prompt": "x"}', "--eval_dataset_config b", "eval_dataset_config has no effect without"),
        ("a.jsonl", '{"prompt": "x"}', "--beta 0.5", "beta=0.5 has no effect with loss_type='topk_policy_gradient'"),
        (
            "a.jsonl",
            '{"prompt": ", +1 = 3"}',
            "--use_peft --lora_r 2 --lora_target_modules wings",
            "does not fit the student",
        ),
        ("a.jsonl", '{"prompt": "x"}', '--model_init_kwargs {"dtype":"float31"}', "dtype must be"),
        ("a.jsonl", '{"prompt": "x"}', "--pruning half", "pruning"),
        ("a.jsonl", '{"prompt": "x"}', "--loss_type mse", "topk_kl"),
    ],
)
def test_bad_data_and_bad_settings_are_one_line_and_exit_code_2(
    tmp_path, capsys, monkeypatch, name, content, more, said
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / name
    path.write_text(content)
    arguments = [*RUN, "--dataset_name", str(path), "--output_dir", str(tmp_path / "run"), *more.split()]
    try:
        code = main(arguments)
    except SystemExit as stop:  # the argument parser's way
        code = stop.code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prune-opd: error:")]
    assert code == 2
    assert len(errors) == 1
    assert said in errors[0]


def test_a_stream_without_an_end_is_refused_before_its_prompts_are_opened():
    with pytest.raises(ConfigError, match="dataset_streaming needs max_steps"):
        parse_arguments(
            [*RUN[1:], "--output_dir", "unused", "--dataset_name", "none.csv", "--dataset_streaming", "true"]
        )


def test_prompts_are_shaped_by_column_suffix_and_chat(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"task": "1 + 1?", "prompt": "no"}\n')
    arguments = {"dataset_name": str(path), "prompt_column": "task", "prompt_suffix": " Think.", "prompt_as_chat": True}
    for streaming in (False, True):
        dataset = load_prompts(PromptArguments(**arguments, dataset_streaming=streaming))
        assert next(iter(dataset))["prompt"] == [{"role": "user", "content": "1 + 1? Think."}]


CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))
    if "seeds" not in yaml.safe_load(path.read_text())  # a study's
]


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)  # its name before Transformers 6
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_training_config_is_accepted_and_a_published_one_has_the_published_numbers(path):
    extra = ["--use_cpu", "true", "--bf16", "false", "--gradient_accumulation_steps", "64"]
    script, config = parse_arguments(["--config", str(path), *(extra if "from" in path.stem else [])])
    if "from" in path.stem:
        drift, budget = config.drift_config(), config.make_budget()
        assert (drift.top_k, drift.threshold, drift.weight_drop, drift.weight_base) == (16, 0.7, 0.01, 0.5)
        assert (budget.minimum, budget.maximum, budget.length) == (1024, 12288, 1024 if "qwen3" in path.stem else 2048)
        assert (config.max_steps, config.learning_rate, config.num_generations) == (203, 1e-6, 4)
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 256
        assert script.model_name_or_path != config.teacher_model_name_or_path


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for item in (*fields(ScriptArguments), *fields(PruneOPDConfig)):
        if item.init and item.name in {**ScriptArguments.__annotations__, **PruneOPDConfig.__annotations__}:
            assert f"--{item.name}" in shown
            assert item.metadata.get("help"), item.name


def small_run(output, *more):
    arguments = [*RUN, "--dataset_name", "embedded", "--num_generations", "2", "--drift_top_k", "2"]
    arguments += ["--drift_min_length", "0", "--output_dir", str(output), *more]
    return main(arguments)


def test_a_run_leaves_a_student_that_plain_transformers_loads(tmp_path, capsys):
    output = tmp_path / "run"
    assert small_run(output, "--max_steps", "2") == 0
    assert TrainingSummary.load(output).steps == 2
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size == len(AutoTokenizer.from_pretrained(output))


@pytest.mark.parametrize("where", ["true", "checkpoint-1"])
def test_a_run_goes_on_from_the_last_checkpoint_or_the_one_that_is_named(tmp_path, capsys, where):
    output = tmp_path / "run"
    assert small_run(output, "--max_steps", "2", "--save_steps", "1") == 0
    told = where if where == "true" else str(output / where)
    assert small_run(output, "--max_steps", "3", "--resume_from_checkpoint", told) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(" ")[1] for line in lines[2:]] == (["3/3"] if where == "true" else ["2/3", "3/3"])
    summary = TrainingSummary.load(output)
    assert (summary.steps, summary.rollouts) == (3, 12)


def test_the_same_command_begins_a_run_that_has_no_checkpoint_yet_and_ends_one_that_has(tmp_path, capsys):
    (file := tmp_path / "resuming.yaml").write_text("resume_from_checkpoint: true\n")
    for resuming in (["--resume_from_checkpoint", "true"], ["--config", str(file)]):
        assert small_run(tmp_path / "run", "--max_steps", "1", *resuming) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [([], "is not empty"), (["--resume_from_checkpoint", "elsewhere"], "elsewhere is no complete checkpoint")],
)
def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path, capsys, more, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    assert small_run(tmp_path / "run", "--max_steps", "1", *more) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes"]


EVALUATED = ("--max_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1")


def test_evaluations_during_training_have_a_set_of_their_own(tmp_path, capsys):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(json.dumps({"prompt": p.prompt}) for p in ChainTask().problems(3, seed=5)))
    assert small_run(tmp_path / "run", *EVALUATED, "--eval_dataset_name", str(problems)) == 0
    (evaluation,) = [entry for entry in TrainingSummary.load(tmp_path / "run").history if "eval_runtime" in entry]
    assert 0 < evaluation["eval_mean_tokens"] <= 12
    assert {"eval_loss", "eval_kl", "eval_overlap"} <= set(evaluation)
    assert load_evaluation_prompts(PromptArguments(dataset_name="embedded")).column_names[0] == "prompt"
    assert set(load_evaluation_prompts(PromptArguments(dataset_name="embedded"))["prompt"]).isdisjoint(
        load_prompts(PromptArguments(dataset_name="embedded"))["prompt"][:]
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("org/train", "all", "test")),
        ({"eval_dataset_config": "hard"}, ("org/train", "hard", "test")),
        ({"eval_dataset_name": "org/eval"}, ("org/eval", None, "test")),
        ({"eval_dataset_name": "org/eval", "eval_dataset_config": "main"}, ("org/eval", "main", "test")),
    ],
)
def test_the_configuration_of_the_training_set_is_that_of_no_other(monkeypatch, given, expected):
    read = []

    def load_dataset(name, config, split, streaming):
        read.append((name, config, split))
        return Dataset.from_list([{"prompt": "3 , +1"}])

    monkeypatch.setattr(prompt_sources, "load_dataset", load_dataset)
    load_evaluation_prompts(PromptArguments(dataset_name="org/train", dataset_config="all", **given))
    assert read == [expected]


def test_a_file_of_prompts_has_no_second_split_to_evaluate_on(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "3 , +1"}\n')
    arguments = [*RUN, "--dataset_name", str(prompts), "--output_dir", str(tmp_path / "run"), *EVALUATED]
    assert main(arguments) == 2
    assert "eval_strategy needs eval_dataset_name" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["q_proj,v_proj", ["q_proj", "v_proj"], ["q_proj,v_proj"]])
def test_target_modules_are_a_list_or_names_with_commas(tmp_path, written):
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps({"use_peft": True, "lora_r": 2, "lora_target_modules": written}))
    more = "--model_name_or_path a --teacher_model_name_or_path b --dataset_name c --config".split()
    script, _ = parse_arguments([*more, str(path)])
    assert script.peft_config().target_modules == {"q_proj", "v_proj"}
    script, _ = parse_arguments(
        [*more[:-1], "--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    )
    assert script.peft_config().target_modules == {"q_proj", "v_proj"}
    script, _ = parse_arguments([*more[:-1], "--use_peft", "--lora_r", "2"])
    assert script.peft_config().target_modules == "all-linear"


@contextmanager
def files_of_at_most(size):
    """As on a disk that is full behind so many bytes of each file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_that_is_interrupted_names_its_last_checkpoint_and_how_to_go_on(tmp_path, capsys, monkeypatch, saved):
    def interrupt(trainer, *_):
        if trainer.state.global_step == 1:
            raise KeyboardInterrupt
        return generate(trainer, *_)

    generate = PruneOPDTrainer.generate_rollouts
    monkeypatch.setattr(PruneOPDTrainer, "generate_rollouts", interrupt)
    run = tmp_path / "run"
    saving = ["--save_strategy", "steps", "--save_steps", "1"] if saved else ["--save_strategy", "no"]
    arguments = [*RUN, "--max_steps", "2", "--dataset_name", "embedded", "--output_dir", str(run), *saving]
    assert main(arguments) == 130
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prune-opd: interrupted")]
    checkpoint = (
        f"the last checkpoint is {run / 'checkpoint-1'}" if saved else "no checkpoint was saved yet (save_steps)"
    )
    assert line.startswith(f"prune-opd: interrupted: {checkpoint}: with resume_from_checkpoint true")
    monkeypatch.undo()
    assert main([*arguments, "--resume_from_checkpoint", "true"]) == 0


def test_a_published_command_holds_what_stood_in_its_config_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "learning_rate: 2e-4\nuse_cpu: true\nlora_target_modules: [q_proj, v_proj]\nhub_token: secret\nmax_prompt_length: null\n"
        f"dataset_name: {tmp_path}/prompts.jsonl\nchat_template_kwargs: {{think: true}}\n"
    )
    for given in (["--config", str(path)], [f"--config={path}"]):
        words = shlex.split(repeatable_command(["--learning_rate", "1e-5", *given, "--seed", "3"]))
        assert words[:2] == ["prune-opd", "train"]
        assert words[2:] == [
            *("--learning_rate", "0.0002", "--use_cpu", "true", "--lora_target_modules", "q_proj", "v_proj"),
            *("--max_prompt_length", "null"),  # which is not its default
            *("--dataset_name", "prompts.jsonl (local)", "--chat_template_kwargs", '{"think": true}'),
            *("--learning_rate", "1e-5", "--seed", "3"),  # the last one counts, as the command line does above the file
        ]


def test_a_published_command_holds_neither_secrets_nor_servers_wherever_they_stand(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "vllm_server_base_url: http://10.0.0.5:8000\nmodel_init_kwargs: {token: abc, dtype: float32}\nmy_api_key: abc\n"
        'teacher_model_init_kwargs: \'{"cache_dir": "/home/me/cache", "token": "abc"}\'\n'
    )
    arguments = ["--config", str(path), '--generation_kwargs={"api_key": "abc", "min_p": 0.1}']
    words = shlex.split(repeatable_command(arguments))
    assert words[2:] == [
        *("--vllm_server_base_url", "URL", "--model_init_kwargs", '{"dtype": "float32"}'),
        *("--teacher_model_init_kwargs", '{"cache_dir": "cache (local)"}', '--generation_kwargs={"min_p": 0.1}'),
    ]


def test_a_config_file_that_is_gone_when_training_ends_is_in_the_record_all_the_same(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text("max_steps: 1\nsave_strategy: 'no'\ndataset_name: embedded\n")
    train = PruneOPDTrainer.train

    def train_and_lose_the_file(trainer, *arguments, **settings):
        train(trainer, *arguments, **settings)
        path.unlink()

    monkeypatch.setattr(PruneOPDTrainer, "train", train_and_lose_the_file)
    assert main([*RUN, "--config", str(path), "--output_dir", str(tmp_path / "run")]) == 0
    command = TrainingSummary.load(tmp_path / "run").command
    assert command.startswith("prune-opd train --max_steps 1 --save_strategy no --dataset_name embedded ")
    assert "--config" not in command


@pytest.mark.parametrize(
    ("size", "more", "place"),
    [
        (200_000, "--save_strategy no", "run"),  # the student has 348,064 bytes
        (
            400_000,
            "--save_strategy steps --save_steps 1",
            "run",
        ),  # and the optimizer's state twice that
        (2_000, "--save_strategy no --save_rollouts_steps 1", "run/rollouts/step-000001.safetensors"),
    ],
    ids=["student", "optimizer", "rollouts"],
)
def test_a_full_disk_is_one_line_with_its_place(tmp_path, capsys, monkeypatch, size, more, place):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f", +{digit} = 3"}) for digit in range(8)))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = [*RUN, "--max_steps", "1", "--dataset_name", str(path), "--output_dir", str(tmp_path / "run")]
    with files_of_at_most(size):
        code = main([*arguments, *more.split()])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prune-opd: error:")]
    assert code == 2
    assert [line.partition(";")[0] for line in errors] == [
        f"prune-opd: error: {tmp_path / place} could not be written: No space left on device"
    ]
