"""Secrets and words of this machine are found by form and by value, named by place and kind, and never shown."""

import base64
import json
from urllib.parse import quote

import pytest

from prune_opd_hf.hub.leaks import Machine, find_leaks
from prune_opd_hf.hub.markdown import text

QUIET = Machine(secrets={}, paths=[], names=[])
FAKE = {
    "Hugging Face": "hf_" + "aB3dE6" * 6,
    "GitHub": "ghp_" + "a1B2" * 9,
    "API key": "sk-" + "proj-" + "a1B2" * 8,
    "AWS": "AKIA" + "ABCDEFGHIJKLMNOP",
    "Google": "AIza" + "a1B2_" * 7,
    "Slack": "xoxb-" + "123456789012",
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "signed": "eyJ" + "a1B2" * 4 + "." + "a1B2" * 4 + "." + "a1B2" * 4,
    "password": "https://me:" + "hunter22@example.org/x",
    "base64": base64.b64encode(b"hf_" + b"aB3dE6" * 6).decode(),
    "header": "extraheader = AUTHORIZATION: basic " + "eDp5OnpfMTIz",
}


@pytest.mark.parametrize("kind", FAKE)
@pytest.mark.parametrize("vocabulary", [False, True])
def test_a_secret_is_found_by_its_form_and_not_shown(kind, vocabulary):
    leaks = list(find_leaks("a.json", f'one\n  "x": "{FAKE[kind]}"', QUIET, vocabulary=vocabulary))
    assert any(kind in leak.what and leak.line == 2 for leak in leaks)
    assert FAKE[kind] not in " ".join(map(str, leaks))


@pytest.mark.parametrize(
    "line", ['"api_key": "abcdefgh"', "password = correcthorse", "WANDB_API_KEY=0123456789", '"hub_token": "12345678"']
)
def test_a_setting_that_is_named_like_a_secret_is_found(line):
    assert [leak.what for leak in find_leaks("a", line, QUIET)] == [
        "a setting that is named like a secret and has a value"
    ]


@pytest.mark.parametrize(
    "line",
    [
        '"hub_token": null',
        '"hub_token": "<HUB_TOKEN>"',
        '"max_tokens": 31744000',
        '"pad_token_id": 123456789',
        "https://huggingface.co/home/page",
        "/no_think and /think",
        "a rate of 3/4 in x/home/y",
        "Qwen/Qwen3-1.7B",
        "the password is checked",
        "sha256:" + "ab" * 32,
    ],
)
def test_ordinary_text_is_not_suspected(line):
    assert list(find_leaks("a", line, QUIET)) == []


@pytest.mark.parametrize(
    "path", ["/home/me/x", "/Users/me/x", "/root/x", "/tmp/abc", "C:\\\\Users\\\\me", "file:///x", "/opt/env/lib"]
)
def test_a_path_of_a_machine_is_found(path):
    machine = Machine(secrets={}, paths=["/opt/env"], names=[])
    assert [leak.what for leak in find_leaks("a", f"from {path} on", machine)] == ["a path of this machine"]
    assert list(find_leaks("a", f"from {path} on", machine, vocabulary=True)) == []


def test_names_are_found_as_words_unless_they_are_namespaces():
    machine = Machine(secrets={}, paths=[], names=["grace", "box-7"])
    assert [leak.what for leak in find_leaks("a", "by grace on box-7", machine)] == [
        "the name of this machine or its user"
    ] * 2
    assert list(find_leaks("a", "disgrace, grace-notes, box-71", machine)) == []
    assert list(find_leaks("a", "grace/student", machine, allowed_names=["grace"])) == []


@pytest.mark.parametrize(
    "secret", ['pa"ss\\word*_x', "naïve-pass😀word", "two words | <and> more", "line\nbreak-secret"]
)
def test_a_secret_is_found_however_a_file_writes_it(secret):
    machine = Machine(secrets={"X_TOKEN": secret}, paths=[], names=[])
    written = [
        secret,
        json.dumps([secret]),
        json.dumps({"a": secret}, ensure_ascii=False),
        repr(secret),
        str(text(secret)),
        quote(secret, safe=""),
        base64.b64encode(secret.encode()).decode(),
        base64.urlsafe_b64encode(secret.encode()).decode(),
    ]
    for form in written:
        assert [leak.what for leak in find_leaks("a", f"x {form} y", machine)] == ["the value of X_TOKEN"]
        assert list(find_leaks("a", form[::-1], machine)) == []


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "PGPASSWORD",
        "OPENAI_KEY",
        "MY_PASS",
        "BASIC_AUTH",
        "SLACK_WEBHOOK",
    ],
)
def test_variables_that_hold_secrets_are_known_by_their_names(name, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "some-value-of-it\n")
    assert Machine.here(tmp_path).secrets[f"the environment variable {name}"] == "some-value-of-it"


@pytest.mark.parametrize(
    "name",
    ["TOKENIZERS_PARALLELISM", "TOKENIZER", "TOKENIZATION_MODEL", "GIT_AUTHOR_NAME", "KEYBOARD_LAYOUT", "PATH_TO_X"],
)
def test_other_variables_are_not(name, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "some-value-of-it")
    assert "some-value-of-it" not in Machine.here(tmp_path).secrets.values()


def test_this_process_tells_its_secrets_and_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "a value of mine")
    monkeypatch.setenv("MY_SECRET", "short")
    monkeypatch.setenv("HOME", str(tmp_path / "person"))
    machine = Machine.here(tmp_path / "student", token="the token in use")
    assert machine.secrets["the environment variable SOME_API_KEY"] == "a value of mine"
    assert "the environment variable MY_SECRET" not in machine.secrets
    assert "the token in use" in machine.secrets.values()
    assert {str(tmp_path / "person"), str(tmp_path / "student")} <= set(machine.paths)
