"""Files: a write is complete or absent; a record with any field of another type is refused in one line, never otherwise."""

import dataclasses
import json
import os
from dataclasses import dataclass, field, fields

import jaxtyping
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loopback_hub.student_folders import evaluation_report, training_summary
from wrong_values import OTHER, places, replaced, with_another_value

from prune_opd_hf.algorithm.budget import ResponseBudget
from prune_opd_hf.errors import ConfigError, FileFormatError
from prune_opd_hf.records.evaluation_report import EvaluationReport
from prune_opd_hf.records.files import (
    FREE_TEXT,
    atomic_path,
    check_values,
    dump_record,
    first_line,
    load_record,
    printable,
    publishable,
    read_json,
    write_json,
    write_text,
)
from prune_opd_hf.records.training_summary import TrainingSummary

SUMMARY = training_summary(command="prune-opd train", example_prompt="2 + 2 =\n")
REPORT = evaluation_report("sha256:" + "1" * 64)


@pytest.fixture(autouse=True, scope="module")
def _without_type_checker():
    """Users have no type checker: what is refused, the package refuses itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


# ---------------------------------------------------------------------- writing


def test_a_file_that_is_replaced_is_the_old_one_until_the_block_ends(tmp_path):
    path = tmp_path / "new" / "notes.txt"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in path.parent.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("fault", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, fault):
    write_text(tmp_path / "notes.txt", "old")

    def fails():
        with atomic_path(tmp_path / "notes.txt") as temporary:
            temporary.write_text("half")
            raise fault

    with pytest.raises(type(fault)):
        fails()
    assert (tmp_path / "notes.txt").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    write_text(tmp_path / "notes.txt", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "notes.txt", "new")
    assert (tmp_path / "notes.txt").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_has_the_mode_of_any_other_new_file(tmp_path):
    (tmp_path / "other").touch()
    with atomic_path(tmp_path / "mine") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    assert (tmp_path / "mine").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_number_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "values.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_as_json_is_read(tmp_path):
    value = {"text": "Größe 中", "nested": {"list": [1, 2.5, None, True]}}
    write_json(tmp_path / "values.json", value)
    assert read_json(tmp_path / "values.json") == value
    assert (tmp_path / "values.json").read_bytes().endswith(b"}\n")


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1', "not complete JSON"),
        (b"", "not complete JSON"),
        (b"[" * 100_000, "not complete JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not complete JSON"),
        (b'{"a": ' + b"9" * 30 + b"}", "30 digits is too large"),
        (b'{"a": NaN}', "NaN is no finite number"),
        (b'{"a": -Infinity}', "-Infinity is no finite number"),
        (b'{"a": 1e999}', "1e999 is no finite number"),
        (b"\xff\xfe", "can't decode"),
        (b"[1]", r"must be a JSON object, got \[1\]"),
        (b'"' + b"x" * 9999 + b'"', "must be a JSON object"),
    ],
)
def test_what_is_no_json_object_is_refused_in_one_short_line_with_its_name(tmp_path, content, reason):
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=reason) as caught:
        read_json(path, "training summary")
    assert str(caught.value).startswith(f"{path} is not a valid training summary: ")
    assert_one_line(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileFormatError, match=r"no such file: .*summary\.json \(no training summary\)"):
        read_json(tmp_path / "summary.json", "training summary")


def assert_one_line(error):
    assert str(error).isprintable()
    assert len(str(error)) < 500


@pytest.mark.parametrize("record", [SUMMARY, REPORT], ids=lambda record: type(record).__name__)
@settings(max_examples=300)
@given(data=st.data())
def test_whatever_stands_in_a_field_the_reader_answers_with_a_record_or_one_line(record, data):
    document = json.loads(record.to_json())
    try:
        loaded = type(record).from_json(json.dumps(with_another_value(data, document)))
    except FileFormatError as error:
        assert_one_line(error)
    else:
        check_values(loaded)
        assert type(record).from_json(loaded.to_json()) == loaded


WRONG = {str: [5, None, [], {}], int: ["5", 2.5, True, [], {}], float: ["0.5", True, [], {}], dict: [[], "a", 3, None]}


@pytest.mark.parametrize("record", [SUMMARY, REPORT], ids=lambda record: type(record).__name__)
def test_every_typed_field_with_a_value_of_another_type_is_refused_by_name(record):
    document = json.loads(record.to_json())
    key = next(name for name in document if name not in ("kind", "version"))
    free = {"student_base", "teacher", "hardware", "created", "command", "example_prompt", "revision"}  # may be null
    checked = 0
    for item in fields(record):
        for at in places(document[key][item.name]):
            whole = (key, item.name, *at)
            if {"drift", "budget", "hyperparameters", "history"} & set(whole) and at:
                continue  # any plain values
            value = document
            for part in whole:
                value = value[part]
            for wrong in WRONG.get(type(value), []):
                if wrong is None and whole[-1] in free:
                    continue
                with pytest.raises(FileFormatError) as caught:
                    type(record).from_json(json.dumps(replaced(document, whole, wrong)))
                assert str(whole[-1]) in str(caught.value)
                assert_one_line(caught.value)
                checked += 1
    assert checked > 50


@pytest.mark.parametrize("record", [SUMMARY, REPORT], ids=lambda record: type(record).__name__)
def test_a_field_that_is_unknown_or_missing_at_the_top_is_refused(record):
    document = json.loads(record.to_json())
    key = next(name for name in document if name not in ("kind", "version"))
    with pytest.raises(FileFormatError, match="surprise: unknown field"):
        type(record).from_json(json.dumps(replaced(document, (key, "surprise"), 1)))
    first = fields(record)[0].name
    del document[key][first]
    with pytest.raises(FileFormatError, match=f"{first}: field required"):
        type(record).from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "other"}, "'kind' should be 'prune_opd_hf.training_summary', got 'other'"),
        ({"kind": None}, "'kind' should be"),
        ({"version": 2}, "version 2, this package reads version 1: use the package version that wrote it"),
        ({"version": True}, "version True"),
        ({"summary": None}, "its content|input should be an object"),
    ],
)
def test_a_record_of_another_kind_or_version_is_refused(change, reason):
    with pytest.raises(FileFormatError, match=reason):
        TrainingSummary.from_json(json.dumps(json.loads(SUMMARY.to_json()) | change))


@settings(max_examples=200)
@given(
    st.one_of(
        OTHER,
        st.fixed_dictionaries({}, optional={"length": OTHER, "misses": OTHER, "surprise": OTHER}),
        st.dictionaries(st.text(max_size=5), OTHER, max_size=3),
    )
)
@example({"length": 10**5000, "misses": 0})
@example({"length": float("inf"), "misses": 0})
@example([("length", 100)])
def test_whatever_a_budgets_state_is_the_budget_takes_it_whole_or_refuses_it(state):
    budget = ResponseBudget(initial=400, minimum=100, maximum=1000)
    try:
        budget.load_state_dict(state)
    except ConfigError as error:
        assert_one_line(error)
        assert budget.state_dict() == {"length": 400, "misses": 0}
    else:
        assert 100 <= budget.length <= 1000


# ---------------------------------------------------------------------- what a record may hold


@dataclass(frozen=True)
class Note:
    words: str
    prompt: str = field(default="", metadata=FREE_TEXT)
    values: tuple[float, ...] = ()


def test_free_text_is_kept_as_it_is_and_other_text_must_print():
    note = Note("words", prompt="a\nb\t\u200d\x1b")
    assert load_record(Note, dump_record(note, "my_note", 1), "my_note", 1, "note") == note
    with pytest.raises(ConfigError, match=r"words must hold printable characters alone, got 'a\\n'"):
        dump_record(Note("a\n"), "my_note", 1)
    with pytest.raises(ConfigError, match="prompt must be text that UTF-8 can write"):
        dump_record(Note("a", prompt="\ud800"), "my_note", 1)


def test_a_record_that_checks_nothing_itself_is_checked_by_the_reader():
    text = '{"kind": "my_note", "version": 1, "note": {"words": "a\\u001b[2J"}}'
    with pytest.raises(FileFormatError, match="words must hold printable characters alone"):
        load_record(Note, text, "my_note", 1, "note")


@dataclass(frozen=True)
class Careless:
    value: float

    def __post_init__(self):
        if self.value < 0:
            raise [OverflowError, TypeError, AttributeError, KeyError, RecursionError][int(-self.value) - 1]("a\nb")


@pytest.mark.parametrize("value", [-1, -2, -3, -4, -5])
def test_whatever_a_records_own_check_raises_is_one_line(value):
    text = json.dumps({"kind": "careless", "version": 1, "careless": {"value": value}})
    with pytest.raises(FileFormatError, match="not a valid note") as caught:
        load_record(Careless, text, "careless", 1, "note")
    assert_one_line(caught.value)


def test_what_the_reader_would_refuse_is_not_dumped():
    with pytest.raises(ConfigError, match=r"values\.1 must be a finite number"):
        dump_record(Note("a", values=(1.0, float("inf"))), "my_note", 1)
    with pytest.raises(ConfigError, match="words: input should be a valid string, got 3"):
        dump_record(Note(3), "my_note", 1)
    with pytest.raises(ConfigError, match="not JSON serializable"):
        dump_record(Note("a", values=object()), "my_note", 1)


@settings(max_examples=300)
@given(st.text())
@example("\x1b]0;title\x07")
@example("\u202egpj.exe")
def test_text_for_a_terminal_holds_printable_characters_alone_and_stays_as_it_is_where_it_does(text):
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    assert (shown == text) == text.isprintable()
    assert printable(text, lines=True).replace("\n", "").replace("\t", "").isprintable()


def test_the_first_line_of_an_error_prints():
    assert first_line(OSError("\n  a\x1b[2J\nb")) == "a\\x1b[2J"
    assert first_line(ValueError("  ")) == "ValueError"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=200)
@given(PLAIN)
@example({"x": np.float32("nan"), "/home/me/x": {"api_key": "b"}})
def test_what_is_publishable_is_valid_json_that_prints_and_stays_the_same_when_asked_again(value):
    once = publishable(value)
    check_values(once)
    assert publishable(once) == once
    assert json.loads(json.dumps(once, allow_nan=False)) == once


def test_a_number_that_is_not_finite_is_refused_where_the_record_is_made():
    with pytest.raises(ConfigError, match=r"versions\.torch must be a finite number, got nan"):
        dataclasses.replace(REPORT, versions={"torch": float("nan")})
    with pytest.raises(ConfigError, match=r"phase_seconds\.update must be a finite number"):
        dataclasses.replace(SUMMARY, phase_seconds={"update": float("nan")})


def test_a_report_without_its_date_is_refused():
    document = json.loads(REPORT.to_json())
    del document["report"]["date"]
    with pytest.raises(FileFormatError, match="date: field required"):
        EvaluationReport.from_json(json.dumps(document))
