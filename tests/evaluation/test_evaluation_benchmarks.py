"""Benchmarks: real files, the embedded task, the Hub's shape through a stand-in, and what is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from datasets import Dataset
from evaluation_helpers import benchmark_folder

from prune_opd_hf.errors import ConfigError, FileFormatError, HubError, InputError
from prune_opd_hf.evaluation import benchmarks
from prune_opd_hf.evaluation.benchmarks import BOXED_SUFFIX, REGISTRY, Benchmark, load_benchmark


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "Two.json"
    path.write_text(json.dumps([{"prompt": "1+1?", "answer": "2", "id": 7}, {"prompt": "½+½?", "answer": 1}]))
    return path


@pytest.mark.parametrize(
    ("name", "problems"), [("AMC23", 83), ("AIME24", 30), ("AIME25", 30), ("HMMT24", 30), ("HMMT25", 30)]
)
def test_real_files_load_under_their_own_name_and_without_their_folder(name, problems):
    benchmark = load_benchmark(benchmark_folder() / f"{name}.json")
    assert (benchmark.name, len(benchmark), benchmark.source) == (name.lower(), problems, f"{name}.json")
    assert benchmark.revision is None
    assert benchmark.prompts == benchmark.questions


def test_a_file_keeps_its_order_and_numbers_become_text(file):
    benchmark = load_benchmark(file)
    assert (benchmark.questions, benchmark.answers) == (("1+1?", "½+½?"), ("2", "1"))


def test_a_file_is_asked_as_it_stands_and_can_be_given_a_name_and_a_suffix(file):
    benchmark = load_benchmark(f"aime24={file}")
    assert (benchmark.name, benchmark.prompts[0], benchmark.source) == ("aime24", "1+1?", "Two.json")
    assert replace(benchmark, prompt_suffix="Think.").prompts[0] == "1+1?\n\nThink."


def test_the_hash_is_of_the_content_alone(file):
    benchmark = load_benchmark(file)
    same = replace(benchmark, name="other", source="elsewhere", prompt_suffix="Think.")
    assert same.content_hash == benchmark.content_hash
    for changes in (
        {"answers": ("2", "2")},
        {"questions": ("1+1?", "½+½ ?")},
        {"questions": benchmark.questions[::-1], "answers": benchmark.answers[::-1]},
        {"questions": ("1+1?",), "answers": ("2",)},
    ):
        assert replace(benchmark, **changes).content_hash != benchmark.content_hash


def test_the_embedded_task_is_the_evaluation_split():
    from prune_opd_hf.tasks import ChainTask, is_correct

    benchmark = load_benchmark("chain")
    problems = ChainTask().problems(512, 0, split="evaluation")
    assert benchmark.prompts == tuple(problem.prompt for problem in problems)
    assert all(is_correct(problem.trace, gold) for problem, gold in zip(problems, benchmark.answers, strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"bad\.json is no JSON"),
        ("[" * 100_000, r"bad\.json is no JSON"),
        (
            "prompt,answer\na,1\n",
            r"line 1 of bad\.json is no JSON .*: give a JSON list, or JSON lines, of objects with",
        ),
        ("{}", "row 0 of bad.json has no 'prompt'"),
        ("[]", "must be a JSON list"),
        ("[1]", "must be a JSON list"),
        ('[{"prompt": "a"}]', "row 0 of bad.json has no 'answer'"),
        ('[{"prompt": "a", "answer": "1"}, {"question": "a", "answer": "1"}]', "row 1 of bad.json has no 'prompt'"),
        ('[{"prompt": "a", "answer": null}]', "has no 'answer'"),
        ('[{"prompt": "a", "answer": ["1"]}]', "has no 'answer'"),
        ('[{"prompt": "a", "answer": true}]', "has no 'answer'"),
        ('[{"prompt": "a", "answer": NaN}]', "has no 'answer'"),
        ('[{"prompt": "a", "answer": Infinity}]', "has no 'answer'"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, message):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(FileFormatError, match=message):
        load_benchmark(tmp_path / "bad.json")


def test_json_lines_are_the_same_benchmark_as_the_list(file, tmp_path):
    lines = tmp_path / "Two.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in json.loads(file.read_text())) + "\n\n")
    benchmark, same = load_benchmark(lines), load_benchmark(file)
    assert (benchmark.content_hash, benchmark.name) == (same.content_hash, same.name)
    assert benchmark.source == "Two.jsonl"
    for name, content in (
        ("lines.json", lines.read_text()),
        ("list.jsonl", file.read_text()),
        ("LINES.JSONL", "\ufeff" + lines.read_text()),
    ):
        (tmp_path / name).write_text(content)
        assert load_benchmark(tmp_path / name).content_hash == same.content_hash


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "answer": "1"}\n\n{"prompt": "b"', r"line 3 of bad\.jsonl is no JSON"),
        ("", "must be a JSON list, or JSON lines"),
        ("[1]\n", "must be a JSON list, or JSON lines"),
        ('{"prompt": "a", "answer": "1"}\n{"prompt": "b"}\n', r"row 1 of bad\.jsonl has no 'answer'"),
    ],
)
def test_damaged_json_lines_are_named(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(FileFormatError, match=message):
        load_benchmark(tmp_path / "bad.jsonl")


def test_a_whole_text_for_an_answer_is_refused_unless_it_marks_the_final_one():
    for answer in ("A first.\n#### 72", "A first.\n\\boxed{72}", "\\begin{pmatrix}1\\\\\n2\\end{pmatrix}", "72\n"):
        Benchmark("own", ("a",), (answer,), "own.json")
    with pytest.raises(InputError, match=r"problem 1 of benchmark 'own' .* a whole text as its answer: give the final"):
        Benchmark("own", ("a", "b"), ("1", "First this.\nThen that."), "own.json")
    Benchmark("own", ("a",), ("+3\n7",), "own.json", answer_type="chain")


def test_what_is_no_text_and_no_file_is_named(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileFormatError, match=r"bytes\.json cannot be read as .*utf-8"):
        load_benchmark(tmp_path / "bytes.json")
    with pytest.raises(FileFormatError, match="Is a directory"):
        load_benchmark(tmp_path)
    with pytest.raises(FileNotFoundError, match="aime24"):
        load_benchmark(tmp_path / "absent.json")


def test_a_file_in_a_folder_named_like_a_setting_is_no_other_name(file, tmp_path):
    place = tmp_path / "split=test" / "Two.json"
    place.parent.mkdir()
    place.write_text(file.read_text())
    assert load_benchmark(place).name == "two"
    assert load_benchmark(f"mine={place}").name == "mine"


def test_a_file_of_any_name_loads_by_its_path(file, tmp_path, monkeypatch):
    (tmp_path / "problems").write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert load_benchmark("problems").answers == ("2", "1")


@pytest.mark.parametrize(
    ("given", "near"), [("AIME-24", "aime24"), ("aime_25", "aime25"), ("chian", "chain"), ("math-500", "math500")]
)
def test_an_unknown_name_is_answered_with_the_nearest(given, near):
    with pytest.raises(ConfigError, match=rf"unknown benchmark '{given}' \(did you mean {near}\?\)"):
        load_benchmark(given)


def test_an_unknown_name_is_answered_with_all_there_are():
    with pytest.raises(
        ConfigError, match=r"^unknown benchmark 'gpqa': give one of amc23, aime24, .*, math500, chain, or"
    ):
        load_benchmark("gpqa")


@pytest.mark.parametrize("given", ["=Two.json", "/etc/x=Two.json", "a\tb=Two.json", "\udcff=Two.json"])
def test_names_that_may_not_be_published_are_refused(file, monkeypatch, given):
    monkeypatch.chdir(file.parent)
    with pytest.raises(ConfigError, match="benchmark name will be published"):
        load_benchmark(given)


def test_half_a_surrogate_pair_is_refused(tmp_path):
    (tmp_path / "half.json").write_text(r'[{"prompt": "a", "answer": "1"}, {"prompt": "\ud800", "answer": "1"}]')
    with pytest.raises(InputError, match=r"problem 1 .* half a surrogate pair"):
        load_benchmark(tmp_path / "half.json")


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(monkeypatch):
    def load_dataset(path, *, revision, split):
        raise ConnectionError(f"Couldn't reach {path!r}\nand more lines")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(HubError, match=r"aime24 .* cannot be fetched: Couldn't reach .*pass the path of") as refused:
        load_benchmark("aime24")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [{"questions": (), "answers": ()}, {"answers": ("1",)}, {"questions": ("a", " ")}, {"answers": ("1", "")}],
)
def test_incomplete_benchmarks_are_refused(file, changes):
    with pytest.raises(InputError):
        replace(load_benchmark(file), **changes)


def test_unknown_answer_types_are_refused():
    with pytest.raises(ConfigError, match="math, chain"):
        Benchmark("a", ("q",), ("a",), "a.json", answer_type="text")


@pytest.mark.parametrize("name", list(REGISTRY))
def test_a_registered_benchmark_is_read_at_one_commit(monkeypatch, name):
    entry, asked = REGISTRY[name], []
    rows = {entry.question_column: [f"Q{i}" for i in range(entry.problems)], "answer": list(range(entry.problems))}

    def load_dataset(path, *, revision, split):
        asked.append((path, revision, split))
        return Dataset.from_dict(rows)

    info = SimpleNamespace(dataset_info=lambda path, revision: SimpleNamespace(sha=f"commit of {path} at {revision}"))
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: info)
    benchmark = load_benchmark(name)
    commit = "commit of MathArena/hmmt_feb_2024 at main" if name == "hmmt24" else entry.revision
    assert asked == [(entry.dataset_id, commit, entry.split)]
    assert (benchmark.revision, benchmark.source, len(benchmark)) == (commit, entry.dataset_id, entry.problems)
    assert (benchmark.questions[0], benchmark.answers[1]) == ("Q0", "1")
    assert benchmark.prompts[0] == f"Q0\n\n{BOXED_SUFFIX}"

    del rows[entry.question_column][0], rows["answer"][0]
    with pytest.raises(FileFormatError, match=f"should have {entry.problems}"):
        load_benchmark(name)
    rows.clear()
    rows["text"] = ["a"] * entry.problems
    with pytest.raises(FileFormatError, match=r"it has \['text'\]"):
        load_benchmark(name)


def test_the_registry_pins_commits_where_one_is_known():
    branches = [name for name, entry in benchmarks.REGISTRY.items() if len(entry.revision) != 40]
    assert branches == ["hmmt24"]
