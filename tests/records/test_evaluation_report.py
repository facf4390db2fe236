"""The evaluation report: what it refuses, what it keeps, and that a file is whole or absent."""

import json
from dataclasses import replace

import pytest

from prune_opd_hf.errors import ConfigError, FileFormatError
from prune_opd_hf.evaluation import BenchmarkResult, Estimate, EvaluationReport, SamplingSettings


@pytest.fixture
def report() -> EvaluationReport:
    result = BenchmarkResult(
        name="aime24",
        source="HuggingFaceH4/aime_2024",
        revision="0123456789abcdef",
        content_hash="sha256:" + "a" * 64,
        problems=3,
        num_generations=4,
        metrics={"avg@4": Estimate(0.5, 0.25, 0.75, "by hand"), "pass@4": Estimate(1.0, 0.5, 1.0, "by hand")},
        problem_scores={"avg@4": (0.25, 0.5, 0.75), "pass@4": (1.0, 1.0, 1.0)},
        truncated_share=0.25,
        no_answer_share=0.125,
        timed_out_share=0.0,
        crashed_share=0.0,
        prompt_tokens=300,
        response_tokens=1200,
        wall_seconds=2.5,
        prompt_suffix="\\boxed{} please | now",
        grader="math-verify",
    )
    return EvaluationReport(
        model_name="org/student",
        model_hash="sha256:" + "b" * 64,
        sampling=SamplingSettings(temperature=1.0, top_p=0.95, max_completion_length=100, seed=7, num_generations=4),
        benchmarks=(result, replace(result, name="amc23", source="AMC23.json", revision=None)),
        versions={"torch": "2.13.0"},
        hardware="CPU, 2 cores",
        engine="row-dropping loop",
        dtype="float32",
        date="2026-11-23",
    )


def test_json_keeps_everything(report, tmp_path):
    path = report.save(tmp_path / "new" / "report.json")
    assert EvaluationReport.load(path) == report
    assert [child.name for child in path.parent.iterdir()] == ["report.json"]


def test_reports_of_before_the_form_of_prompts_was_noted_are_read(report):
    noted = replace(
        report, benchmarks=(replace(report.benchmarks[0], prompt_form='chat template 0123 with {"think": true}'),)
    )
    document = json.loads(noted.to_json())
    assert '- Prompts: aime24: chat template 0123 with {"think": true}, then \'' in noted.to_markdown()
    del document["report"]["benchmarks"][0]["prompt_form"]
    old = EvaluationReport.from_json(json.dumps(document))
    assert old == replace(report, benchmarks=report.benchmarks[:1])
    assert "- Prompts:" not in old.to_markdown()


def test_a_failed_save_leaves_the_old_file_and_nothing_else(report, tmp_path, monkeypatch):
    path = report.save(tmp_path / "report.json")
    before = path.read_bytes()

    def full_disk(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        replace(report, date="2027-01-01").save(path)
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["report.json"]


def test_markdown_has_a_row_for_each_benchmark_and_the_settings(report):
    text = report.to_markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| benchmark | problems | avg@4 | pass@4 | truncated | no answer | timed out | mean tokens |"
    assert rows[2].startswith(
        "| aime24 (HuggingFaceH4/aime_2024 @ 01234567) | 3 | 50.0 [25.0, 75.0] | 100.0 [50.0, 100.0]"
    )
    assert rows[3].startswith("| amc23 (AMC23.json) | 3 |")
    assert all(line.count("|") == rows[0].count("|") for line in rows)
    assert "temperature 1.0, top_p 0.95, top_k off, at most 100 new tokens, seed 7" in text
    assert "torch 2.13.0" in text


def test_a_benchmark_is_found_by_its_name(report):
    assert report["amc23"].source == "AMC23.json"
    with pytest.raises(KeyError, match="no benchmark 'math500'"):
        report["math500"]


@pytest.mark.parametrize("name", ["/home/me/model", "~/model", "../model", "C:\\models\\a", "file:///tmp/a", ""])
def test_a_machine_path_is_refused(report, name):
    with pytest.raises(ConfigError, match="will be published"):
        replace(report, model_name=name)
    with pytest.raises(ConfigError, match="will be published"):
        replace(report.benchmarks[0], source=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"content_hash": "abc"}, "content_hash"),
        ({"problems": 0}, "problems"),
        ({"problems": 2}, "must hold 2 scores"),
        ({"truncated_share": 1.5}, "truncated_share"),
        ({"timed_out_share": float("nan")}, "timed_out_share"),
        ({"wall_seconds": float("inf")}, "wall_seconds"),
        ({"metrics": {}}, "same names"),
        ({"problem_scores": {"avg@4": (0.0, 0.0, 2.0), "pass@4": (1.0, 1.0, 1.0)}}, "must lie in"),
    ],
)
def test_a_result_outside_its_range_is_refused(report, changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(report.benchmarks[0], **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"benchmarks": ()},
        {"model_hash": "sha256:1"},
        {"date": "yesterday"},
        {"versions": {"torch": "2.13\n"}},
        {"hardware": "CPU\x1b[2J"},
    ],
)
def test_a_report_that_cannot_be_right_is_refused(report, changes):
    with pytest.raises(ConfigError):
        replace(report, **changes)


def test_a_benchmark_stands_in_a_report_once(report):
    with pytest.raises(ConfigError, match="each once"):
        replace(report, benchmarks=report.benchmarks[:1] * 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"max_completion_length": 0},
        {"num_generations": 0},
        {"seed": -1},
    ],
)
def test_impossible_sampling_is_refused(report, changes):
    with pytest.raises(ConfigError):
        replace(report.sampling, **changes)


@pytest.mark.parametrize(
    ("low", "value", "high"), [(0.2, 0.1, 0.3), (0.1, 0.3, 0.2), (-0.1, 0.0, 1.0), (0.0, float("nan"), 1.0)]
)
def test_an_interval_must_hold_its_value(low, value, high):
    with pytest.raises(ConfigError):
        Estimate(low=low, value=value, high=high, method="by hand")


def test_a_metrics_name_that_breaks_the_table_is_damage(report):
    with pytest.raises(FileFormatError, match=r"a name in benchmarks\.0\.metrics must hold printable"):
        EvaluationReport.from_json(report.to_json().replace("pass@4", "pass@4\\n|"))
