"""How models are loaded, from every command line: --revision, --trust_remote_code, --dtype, and the layers of an adapter."""

from functools import wraps
from pkgutil import resolve_name

import pytest

from prune_opd_hf.cli import main
from prune_opd_hf.cli.train import parse_arguments
from prune_opd_hf.errors import ConfigError

WORDS = "--revision v1 --trust_remote_code --dtype bfloat16".split()
LOADED = {"revision": "v1", "trust_remote_code": True, "dtype": "bfloat16"}
NAMES = (
    "--model_name_or_path owner/student --teacher_model_name_or_path owner/teacher --dataset_name embedded --output_dir out"
).split()


@pytest.fixture
def caught(monkeypatch):
    """Catches what a command hands to the function that does its work."""

    def catch(function):
        seen = {}

        @wraps(resolve_name(function))
        def stop(*args, **settings):
            seen.update(settings)
            raise ConfigError("caught")

        monkeypatch.setattr(function, stop)
        return seen

    return catch


def test_loading_words_reach_the_evaluation(caught):
    seen = caught("prune_opd_hf.evaluation.evaluate.evaluate_model")
    assert main(["evaluate", "owner/student", "--benchmarks", "chain", *WORDS]) == 2
    assert {name: seen[name] for name in LOADED} == LOADED
    assert main(["evaluate", "owner/student", "--benchmarks", "chain"]) == 2
    assert {name: seen[name] for name in LOADED} == {"revision": None, "trust_remote_code": False, "dtype": "auto"}


def test_loading_words_reach_the_preflight_and_each_model_has_its_own_revision(caught, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = caught("prune_opd_hf.preflight.run_preflight.preflight")
    more = ["--chat_template_kwargs", '{"enable_thinking": false}', "--allow_renamed_special_tokens"]
    assert main(["preflight", *NAMES, *WORDS, "--teacher_revision", "v2", *more]) == 2
    assert seen["model_init_kwargs"] == LOADED
    assert seen["teacher_model_init_kwargs"] == {**LOADED, "revision": "v2"}
    assert seen["chat_template_kwargs"] == {"enable_thinking": False}
    assert seen["allow_renamed_special_tokens"] is True


def test_loading_words_reach_the_merge(caught):
    seen = caught("prune_opd_hf.models.loading.merge_adapter")
    assert main(["merge", "owner/adapter", "--output_dir", "out", *WORDS]) == 2
    assert seen == LOADED


def test_loading_words_of_a_training_are_those_of_the_preflight_and_its_settings_go_before_them():
    _, config = parse_arguments([*NAMES, *WORDS, "--teacher_revision", "v2", "--use_cpu", "true"])
    assert config.model_init_kwargs == LOADED
    assert config.teacher_model_init_kwargs == {**LOADED, "revision": "v2"}
    own = ["--teacher_model_init_kwargs", '{"dtype": "float32"}']
    _, config = parse_arguments([*NAMES, *WORDS, *own, "--use_cpu", "true"])
    assert config.teacher_model_init_kwargs == {"dtype": "float32", "trust_remote_code": True}
    more = ["--model_init_kwargs", '{"revision": "v3", "attn_implementation": "eager"}']
    _, config = parse_arguments([*NAMES, *WORDS, *more, "--use_cpu", "true"])
    assert config.model_init_kwargs == {**LOADED, "revision": "v3", "attn_implementation": "eager"}
    _, config = parse_arguments([*NAMES, "--use_cpu", "true"])
    assert (config.model_init_kwargs, config.teacher_model_init_kwargs) == ({}, {})


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("lora_target_modules: [q_proj, v_proj]", {"q_proj", "v_proj"}),
        ("lora_target_modules: q_proj, v_proj", {"q_proj", "v_proj"}),
        ("lora_target_modules: all-linear", "all-linear"),
        ("lora_target_modules: [all-linear]", "all-linear"),
        ("", "all-linear"),
    ],
)
def test_the_layers_of_an_adapter_may_be_a_list_or_a_text(tmp_path, text, modules):
    path = tmp_path / "config.yaml"
    path.write_text(f"use_peft: true\nlora_r: 2\nuse_cpu: true\n{text}\n")
    script, _ = parse_arguments(["--config", str(path), *NAMES])
    assert script.peft_config().target_modules == modules
    script, _ = parse_arguments(["--config", str(path), *NAMES, "--lora_target_modules", "o_proj", "k_proj"])
    assert script.peft_config().target_modules == {"o_proj", "k_proj"}
