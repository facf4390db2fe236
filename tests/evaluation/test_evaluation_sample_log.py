"""The log of samples: what a kill leaves behind, runs that may not be mixed, and two runs at a time."""

import json
from dataclasses import asdict, replace

import pytest

from prune_opd_hf.errors import ConfigError, FileFormatError
from prune_opd_hf.evaluation.sample_log import Sample, SampleLog, read_samples

SAMPLE = Sample("sums", "ab", 0, 0, "2 \ufffd \u2028 \u202e \x00 \U0001f600", 5, 1, True, 0, 0.1)


def test_every_text_a_model_can_write_comes_back(tmp_path):
    with SampleLog(tmp_path, {"seed": 0}) as log:
        log.append(SAMPLE)
    with SampleLog(tmp_path, {"seed": 0}) as log:
        assert list(log.samples.values()) == [SAMPLE]


@pytest.mark.parametrize("lost_bytes", range(1, 40))
def test_a_line_cut_anywhere_costs_that_sample_alone(tmp_path, lost_bytes):
    with SampleLog(tmp_path, {"seed": 0}) as log:
        for number in range(3):
            log.append(replace(SAMPLE, sample=number))
    path = tmp_path / "samples-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    with SampleLog(tmp_path, {"seed": 0}) as log:
        assert [sample.sample for sample in log.samples.values()] == [0, 1]
        log.append(replace(SAMPLE, sample=2))
    assert all(map(json.loads, path.read_text().splitlines()))
    with SampleLog(tmp_path, {"seed": 0}) as log:
        assert len(log.samples) == 3


def test_the_first_sample_of_a_folder_shows_that_there_are_any(tmp_path):
    assert next(read_samples(tmp_path), None) is None
    with SampleLog(tmp_path, {"seed": 0}) as log:
        assert next(read_samples(tmp_path), None) is None  # the settings alone
        log.append(SAMPLE)
        assert next(read_samples(tmp_path)) == SAMPLE
    with (tmp_path / "samples-00000.jsonl").open("a") as file:
        file.write("not read\n")
    assert next(read_samples(tmp_path)) == SAMPLE


def test_each_process_reads_all_files_and_writes_its_own(tmp_path):
    for process in (0, 1):
        with SampleLog(tmp_path, {"seed": 0}, process) as log:
            log.append(replace(SAMPLE, sample=process))
            assert len(log.samples) == process + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples-00000.jsonl", "samples-00001.jsonl"]


def test_two_runs_do_not_write_to_one_file(tmp_path):
    with SampleLog(tmp_path, {"seed": 0}) as first:
        first.append(SAMPLE)
        before = (tmp_path / "samples-00000.jsonl").read_bytes()
        with pytest.raises(ConfigError, match="another evaluation is writing to"):
            SampleLog(tmp_path, {"seed": 0})
        assert (tmp_path / "samples-00000.jsonl").read_bytes() == before
        SampleLog(tmp_path, {"seed": 0}, process=1).close()  # another process of the same run
    SampleLog(tmp_path, {"seed": 0}).close()


def test_a_run_that_ended_before_its_first_sample_binds_no_other(tmp_path):
    SampleLog(tmp_path, {"seed": 0, "engine": "vllm"}).close()  # whose engine could not be made
    for _ in range(2):
        with SampleLog(tmp_path, {"seed": 0, "engine": "loop"}) as log:
            log.append(SAMPLE)
    with pytest.raises(ConfigError, match=r"drawn otherwise \(engine differ\)"):
        SampleLog(tmp_path, {"seed": 0, "engine": "vllm"})


def test_refused_logs_are_left_as_they_are(tmp_path):
    with SampleLog(tmp_path, {"seed": 0, "top_p": 1.0}) as log:
        log.append(SAMPLE)
    before = (tmp_path / "samples-00000.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"drawn otherwise \(seed, top_k, top_p differ\)"):
        SampleLog(tmp_path, {"seed": 1, "top_k": 0})
    assert (tmp_path / "samples-00000.jsonl").read_bytes() == before
    (tmp_path / "samples-00001.jsonl").write_text('{"sampling": {}, "more": 1}\n')
    with pytest.raises(FileFormatError, match=r"not a valid sample \(line 1 of samples-00001\.jsonl"):
        SampleLog(tmp_path, {"seed": 0, "top_p": 1.0})


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[" * 100_000,
        *[
            json.dumps(asdict(SAMPLE) | change).encode()
            for change in (
                {"response": None},
                {"response_tokens": "1"},
                {"problem": [0]},
                {"process": -1},
                {"ended": 1},
                {"seconds": float("nan")},
            )
        ],
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    SampleLog(tmp_path, {"seed": 0}).close()
    path = tmp_path / "samples-00000.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(FileFormatError, match=r"not a valid sample \(line 2 of samples-00000\.jsonl"):
        SampleLog(tmp_path, {"seed": 0})


def test_samples_of_unknown_settings_are_refused(tmp_path):
    (tmp_path / "samples-00000.jsonl").write_text(json.dumps(asdict(SAMPLE)) + "\n")
    with pytest.raises(FileFormatError, match="begins with a sample of unknown settings"):
        SampleLog(tmp_path, {"seed": 0})
