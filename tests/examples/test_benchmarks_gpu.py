"""The GPU benchmark as far as a CPU goes: its arithmetic by hand, what it measures at toy size, what it skips and how it fails.

No figure of a GPU is shown here.
"""

import doctest
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import shared  # noqa: E402
from gpu_parts import bench as bench_module  # noqa: E402
from gpu_parts import decoding, engines, models, watching  # noqa: E402
from gpu_parts.bench import greedy  # noqa: E402

from prune_opd_hf import Teacher, pruned_generate  # noqa: E402

CPU = torch.device("cpu")
SMALL = models.Shape(hidden=4, intermediate=6, layers=2, heads=2, kv_heads=1, head_dim=2, vocabulary=10)
NEW = 12


@pytest.fixture(scope="module")
def pair():
    """Two toy models."""
    return [models.build(models.TOY_SHAPES[name], torch.float32, CPU, 0) for name in ("Qwen3-0.6B", "Qwen3-1.7B")]


def run(folder: Path, *arguments: str) -> tuple[int, dict]:
    code = gpu.main(["--toy", "--output", str(folder), *arguments])
    return code, json.loads((folder / "gpu.json").read_text())


def test_the_floor_of_a_step_is_what_a_hand_counts():
    # q and o: 4 x 4 each; k and v: 4 x 2 each; norms of q and k: 2 each; MLP: 3 x 4 x 6; two norms of 4
    layer = 2 * 16 + 2 * 8 + 2 * 2 + 72 + 8
    weights = 10 * 4 + 2 * layer + 4  # tied embeddings, two layers, the last norm: 308 numbers
    assert models.parameter_count(SMALL) == weights == 308
    cache = 2 * 2 * 1 * 2 * 2  # keys and values, layers, heads, head dim, 2 bytes
    assert models.kv_bytes_per_token(SMALL, 2) == cache == 16
    # 3 rows of 5 tokens: 616 + 240 bytes, at 1000 bytes a second
    assert models.floor_milliseconds(SMALL, 3, 5, 2, 1000.0) == pytest.approx(856.0)


@pytest.mark.parametrize("name", list(models.SHAPES))
def test_the_weights_of_the_floor_are_those_of_the_model(name):
    with torch.device("meta"):
        model = models.AutoModelForCausalLM.from_config(models.SHAPES[name].config(), dtype=torch.bfloat16)
    assert models.parameter_count(models.SHAPES[name]) == sum(values.numel() for values in model.parameters())
    assert round(models.parameter_count(models.SHAPES[name]) / 1e9, 1) == float(name.removeprefix("Qwen3-")[:-1])


def test_the_cache_of_the_floor_is_the_one_that_a_model_fills():
    model, cache = models.build(SMALL, torch.bfloat16, CPU, 0), DynamicCache()
    model(torch.ones(3, 5, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(
        tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in (layer.keys, layer.values)
    )
    assert held == 3 * 5 * models.kv_bytes_per_token(SMALL, 2)


def test_examples_in_the_docstrings_hold():
    for module in (shared, models, decoding):
        failed, tried = doctest.testmod(module)
        assert (failed, tried > 0) == (0, True)


@pytest.mark.parametrize("kwargs", [{}, {"custom_generate": pruned_generate}])
def test_every_decoding_step_but_the_prompts_is_timed(pair, kwargs):
    greedy(pair[0], torch.ones(2, 3, dtype=torch.long), 2, **kwargs)  # the first call tries the model
    with decoding.StepMarks(pair[0], CPU) as marks:
        greedy(pair[0], torch.ones(2, 3, dtype=torch.long), NEW, **kwargs)
    assert len(marks.marks) == NEW  # the prompts, and all tokens but the last, are read
    intervals = marks.milliseconds()
    assert len(intervals) == NEW - 2
    assert min(intervals) > 0
    greedy(pair[0], torch.ones(2, 3, dtype=torch.long), 2, **kwargs)
    assert len(marks.marks) == NEW  # and not any more


@pytest.mark.parametrize("every", [1, 5, 32])
@pytest.mark.parametrize("in_generate", [False, True])
def test_rows_drift_at_the_tokens_drawn_beforehand(pair, every, in_generate):
    lengths = torch.tensor([12, 1, 5, 6, 10])
    prompts = torch.ones(5, 3, dtype=torch.long)
    student, teacher = pair[0], Teacher(pair[1])
    find = watching.watch_module.find_drift_events
    rollouts = watching.monitored(student, teacher, prompts, NEW, lengths=lengths, every=every, in_generate=in_generate)
    assert rollouts.response_mask.sum(dim=1).tolist() == lengths.tolist()
    assert watching.watch_module.find_drift_events is find
    whole = watching.monitored(student, teacher, prompts, NEW, every=every, in_generate=in_generate)
    assert whole.response_mask.sum(dim=1).tolist() == [NEW] * 5


def test_ways_take_turns_and_one_without_memory_is_left_out():
    order = []

    def too_large():
        order.append("b")
        raise torch.OutOfMemoryError("tried to allocate too much\nand more")

    ways = {"a": lambda: order.append("a"), "b": too_large, "c": lambda: order.append("c")}
    noted = []
    timings = shared.interleaved_within(ways, CPU, 2, 60.0, lambda name, seconds: noted.append(name))
    assert order == ["a", "b", "c", "a", "c"]
    assert noted == ["a", "c", "a", "c"]
    assert timings["b"].error == "tried to allocate too much"
    assert [len(timing.seconds) for timing in timings.values()] == [2, 0, 2]
    order.clear()
    shared.interleaved_within({"a": lambda: order.append("a")}, CPU, 5, seconds=0.0)
    assert order == ["a"]  # one round, however little time there is


def test_a_report_is_on_disk_after_every_line(tmp_path):
    report = shared.Report(tmp_path, "gpu", "Speed", {"device": "a | b"}, first="verdicts", last="runs")
    for table, row in (("runs", {"seconds": 1.5}), ("times", {"ms": 1234.5}), ("verdicts", {"held": True, "by": None})):
        report.add(table, row)
        assert json.loads((tmp_path / "gpu.json").read_text())["tables"][table] == [row]
    text = (tmp_path / "gpu.md").read_text()
    assert "This run has not ended" in text
    assert text.index("## verdicts") < text.index("## times") < text.index("## runs")
    assert "| device | a / b |" in text
    assert "| 1,234 |" in text
    assert "| yes | - |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """The whole benchmark, once."""
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):  # compiling takes half a minute
        return run(tmp_path_factory.mktemp("toy"), "--minutes", "60")  # however busy the machine is


def test_the_whole_runs_at_toy_size_and_judges_every_criterion(toy_run):
    code, figures = toy_run
    assert code == 0
    assert figures["complete"] is True
    assert figures["notes"] == []
    assert {row["criterion"] for row in figures["tables"][bench_module.CRITERIA]} >= set(gpu.ALL_CRITERIA)
    assert "not measured" not in {row["verdict"] for row in figures["tables"][bench_module.CRITERIA]}
    assert figures["transformers"] == shared.transformers.__version__
    assert len(figures["tables"]) == 10


def test_toy_figures_follow_from_each_other(toy_run):
    tables = toy_run[1]["tables"]
    (steps,) = (rows for name, rows in tables.items() if name.startswith("Decoding step"))
    bandwidth = 1e9 * toy_run[1]["copy bandwidth GB/s"]
    for row in steps:
        shape = models.TOY_SHAPES[row["student"]]
        middle = row["tokens"] - gpu.TOY.timed_steps // 2
        floor = models.floor_milliseconds(shape, row["rows"], middle, 2, bandwidth)
        assert row["floor ms"] == pytest.approx(floor, rel=0.01)
        assert row["times the floor"] == pytest.approx(row["ms per step"] / row["floor ms"])
    kept = {row["way"]: row["kept share"] for row in tables["Monitored against unmonitored generation"]}
    assert kept["plain generate"] == kept["monitored, 0% drifted"] == 1
    assert kept["monitored, 75% drifted"] == pytest.approx(0.25, abs=0.02)
    same = tables["Greedy tokens of pruned_generate and plain generate"]
    assert [(row["dtype"], row["equal rows"]) for row in same if row["dtype"] == "float32"] == [("float32", 4)]
    (engine,) = (rows for name, rows in tables.items() if name.startswith("Continuous batching"))
    assert [row["tokens"] for row in engine] == [4 * 48, pytest.approx(48, abs=2), 8 * 48, pytest.approx(96, abs=2)]
    (training,) = (rows for name, rows in tables.items() if name.startswith("Training"))
    assert [row["of steps"] for row in training] == ["second of 2"] * 2
    assert training[0]["kept share"] == 1 > training[1]["kept share"]
    for row in training:
        assert row["generate s"] + row["teacher s"] + row["update s"] <= row["whole step s"]


def test_what_does_not_fit_is_skipped_with_a_line_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_module, "free_bytes", lambda device: 1000.0)
    code, figures = run(tmp_path, "--only", "steps", "watch", "engine", "train")
    assert code == 0
    assert all("skipped, does not fit" in note and "are free" in note for note in figures["notes"])
    assert len(figures["notes"]) >= 5
    assert set(figures["tables"]) == {bench_module.CRITERIA}
    assert {row["verdict"] for row in figures["tables"][bench_module.CRITERIA]} == {"not measured"}


def test_what_would_not_end_in_time_is_skipped_with_a_line_that_says_so(tmp_path):
    code, figures = run(tmp_path, "--minutes", "0.0001")
    assert code == 0
    assert all("time" in note for note in figures["notes"])
    assert set(figures["tables"]) == {bench_module.CRITERIA}


def test_a_section_that_fails_leaves_a_line_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "continuous_batching", lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel")))
    code, figures = run(tmp_path, "--minutes", "60", "--only", "engine", "same")
    assert code == 1
    assert figures["notes"] == ["failed: engine: RuntimeError: no kernel"]
    assert "Greedy tokens of pruned_generate and plain generate" in figures["tables"]
    assert "no kernel" in capsys.readouterr().err


def test_without_a_device_it_says_what_to_do(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert gpu.main([]) == 2
    assert "--toy" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main(["--toy", "--minutes", "0"])
    assert "above 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--toy", "--output", __file__])
    assert "cannot be a folder: File exists" in capsys.readouterr().err


def test_the_default_plan_fits_an_80_gb_device_where_the_issue_asks_for_it():
    """78 GiB of them usable; 256 rows of 4k tokens cannot fit: their cache alone is 112 KiB x 2^20 tokens = 112 GiB."""
    shapes, device = models.SHAPES, 78 * 2**30

    def weights(*names):
        return sum(2 * models.parameter_count(shapes[name]) for name in names)

    for cell in gpu.REAL.steps:
        free = bench_module.MEMORY_SHARE * (device - weights(gpu.SMALL, gpu.MIDDLE))
        needed = models.generation_bytes(shapes[cell.student], cell.rows, cell.context, cell.context, 2)
        assert (needed <= free) == ((cell.rows, cell.context) != (256, 4096))
    pair = gpu.REAL.watched
    sizes = (pair.rows, pair.prompt, pair.prompt + pair.new, 2)
    needed = sum(models.generation_bytes(shapes[name], *sizes) for name in (pair.student, pair.teacher))
    assert needed <= bench_module.MEMORY_SHARE * (device - weights(pair.student, pair.teacher))


def test_where_rows_differ_the_logits_tell_rounding_from_another_result(pair):
    plain = greedy(pair[0], torch.arange(1, 9).reshape(2, 4), 6)
    other = plain.clone()
    other[1, 5] = (plain[1, 5] + 1) % 256
    with torch.no_grad():
        logits = pair[0](plain[1:, :5]).logits[0, -1]
    expected = float(logits[plain[1, 5]] - logits[other[1, 5]])
    assert engines.largest_gap(pair[0], plain, other) == pytest.approx(abs(expected), rel=1e-4)
