"""The record of a generation: what it refuses, what it derives, and that it survives selection, joining and disk."""

import dataclasses
import json

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import prune_opd_hf.records.rollouts as module
from prune_opd_hf.algorithm.drift import DriftConfig
from prune_opd_hf.errors import FileFormatError, InputError
from prune_opd_hf.records.rollouts import Rollouts

EXAMPLES = settings(max_examples=30)
CONFIG = DriftConfig("overlap", top_k=2, threshold=0.6, weight_drop=0.5, weight_base=0.25, min_length=1)
PAD = 9


def rollouts_of(prompts, responses, *, watched=True, seed=0, prompt_width=None, width=None, **changes):
    """A record with these prompt and response lengths; every value on a token is random, every other one is padding."""
    generator = torch.Generator().manual_seed(seed)
    rows, k = len(prompts), 3
    prompt_width, width = prompt_width or max(prompts), max(responses) if width is None else width
    prompt_mask = torch.arange(prompt_width) >= prompt_width - torch.tensor(prompts).unsqueeze(-1)
    mask = torch.arange(width) < torch.tensor(responses).unsqueeze(-1)

    read_mask = torch.arange(prompt_width + 1) >= prompt_width - torch.tensor(prompts).unsqueeze(-1)

    def ids(where, *more):
        return torch.randint(0, 9, (*where.shape, *more), generator=generator)

    def values(*more):
        drawn = -torch.rand(rows, width, *more, generator=generator)
        return drawn * mask.reshape(rows, width, *(1 for _ in more))

    columns = {
        "token_log_probs": values(),
        "student_topk_ids": ids(mask, k) * mask.unsqueeze(-1),
        "student_topk_log_probs": values(k),
        "teacher_log_probs": values(k),
        "overlap": -values(),
    }
    fields = {
        "prompt_ids": ids(prompt_mask).masked_fill(~prompt_mask, PAD),
        "prompt_mask": prompt_mask,
        "response_ids": ids(mask).masked_fill(~mask, PAD),
        "response_mask": mask,
        "teacher_token_log_probs": values(),
        "teacher_topk_ids": ids(mask, k) * mask.unsqueeze(-1),
        "teacher_topk_log_probs": values(k),
        "drift_events": (ids(mask) < 3) & mask,
        "reliability": -values(),
        "stop_reason": tuple(module.STOP_REASONS[row % 3] for row in range(rows)),
        "config": CONFIG,
        "pad_token_id": PAD,
        "teachers": tuple(("math", "code")[row % 2] for row in range(rows)),
        "teacher_prompt_ids": ids(read_mask).masked_fill(~read_mask, PAD),
        "teacher_prompt_mask": read_mask,
        "engine": "vllm server",
        "weights": f"step {seed}",
    }
    return Rollouts(**{**fields, **(columns if watched else {}), **changes})


def assert_same(received, expected):
    """Equal bit for bit, column by column, with equal dtypes and settings."""
    assert received.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert received.tensors()[name].dtype == tensor.dtype, name
        assert torch.equal(received.tensors()[name], tensor), name
    for name in ("stop_reason", "config", "pad_token_id", "teachers", "engine", "weights"):
        assert getattr(received, name) == getattr(expected, name)


LENGTHS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=4)


# ---------------------------------------------------------------------- disk


@pytest.mark.parametrize("watched", [True, False])
@EXAMPLES
@given(lengths=LENGTHS)
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path_factory, watched, lengths):
    path = tmp_path_factory.mktemp("rollouts") / "step.safetensors"
    record = rollouts_of(*zip(*lengths, strict=True), watched=watched)
    record.save(path)
    loaded = Rollouts.load(path)
    assert_same(loaded, record)
    assert watched or loaded.overlap is None


def test_extreme_values_and_shared_memory_survive_the_disk(tmp_path):
    odd = torch.tensor([[float("nan"), -0.0, float("-inf"), 1e-45]])
    sequence = torch.tensor([[4, 5, 6, 7, 8, 8]])
    prompt_ids, response_ids = sequence.split([2, 4], dim=1)  # views of one memory
    record = rollouts_of([2], [4])
    record = dataclasses.replace(
        record, prompt_ids=prompt_ids, response_ids=response_ids, reliability=odd, overlap=odd, token_log_probs=odd
    )
    record.save(tmp_path / "odd")
    loaded = Rollouts.load(tmp_path / "odd")
    assert torch.equal(loaded.sequences, sequence)
    for name in ("reliability", "overlap", "token_log_probs"):
        assert torch.equal(getattr(loaded, name).view(torch.int32), odd.view(torch.int32)), name


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    rollouts_of([3, 1], [4, 2]).save(whole)
    content = whole.read_bytes()
    for size in {0, 1, 7, 8, 9, 100, *range(10, len(content), 37), len(content) - 1}:
        cut.write_bytes(content[:size])
        with pytest.raises(FileFormatError, match="cut short"):
            Rollouts.load(cut)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 64, b"\xff" * 64, b"PK\x03\x04 a zip file", b'{"a": 1}\n'])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(FileFormatError):
        Rollouts.load(path)


def rewritten(path, *, without=(), tensors=None, **metadata):
    """The file at `path` with other metadata or tensors; a value of None takes the key away."""
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys() if name not in without}  # noqa: SIM118
        known = {**file.metadata(), **metadata}
    save_file(
        {**held, **(tensors or {})}, path, metadata={name: text for name, text in known.items() if text is not None}
    )


CONFIG_TEXT = json.dumps(dataclasses.asdict(CONFIG))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "somebody.else"}, "holds no rollouts"),
        ({"kind": None}, "holds no rollouts"),
        ({"version": "1"}, "format 1, this package reads 3"),
        ({"version": None}, "format None"),
        ({"stop_reason": None}, "damaged"),
        ({"stop_reason": "["}, "damaged"),
        ({"stop_reason": "7"}, "damaged"),
        ({"stop_reason": '["eos"]'}, "damaged"),
        ({"stop_reason": '["eos", "boredom"]'}, "damaged"),
        ({"stop_reason": '["eos", ["drift"]]'}, "damaged"),
        ({"config": "{}x"}, "damaged"),
        ({"config": "[]"}, "damaged"),
        ({"config": CONFIG_TEXT.replace("0.6", "6.0")}, "damaged"),
        ({"config": CONFIG_TEXT.replace("threshold", "treshold")}, "damaged"),
        ({"engine": None}, "damaged"),
        ({"weights": "7"}, "damaged"),
        ({"pad_token_id": "nine"}, "damaged"),
        ({"pad_token_id": None}, "damaged"),
        ({"without": ["reliability"]}, "damaged"),
        ({"tensors": {"colour": torch.zeros(2, 4)}}, "damaged"),
        ({"tensors": {"overlap": torch.zeros(2, 5)}}, "damaged"),
        ({"tensors": {"response_ids": torch.zeros(4, dtype=torch.long)}}, "damaged"),
        ({"tensors": {"response_ids": torch.zeros(2, 4)}}, "damaged: response_ids holds torch.float32 in place of"),
        ({"tensors": {"reliability": torch.zeros(2, 4, dtype=torch.double)}}, "damaged: reliability holds"),
        ({"tensors": {"drift_events": torch.zeros(2, 4)}}, "damaged: drift_events holds"),
    ],
    ids=str,
)
def test_a_damaged_or_newer_file_is_refused_with_its_name(tmp_path, change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checker
    path = tmp_path / "step-7"
    rollouts_of([3, 1], [4, 2]).save(path)
    rewritten(path, **change)
    with pytest.raises(FileFormatError, match=message) as caught:
        Rollouts.load(path)
    assert "step-7" in str(caught.value)


def test_no_file_and_no_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no rollouts file at"):
        Rollouts.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        Rollouts.load(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        rollouts_of([1], [1]).save(tmp_path / "missing" / "file")


@pytest.mark.parametrize("failing", ["save_file", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "step"
    old = rollouts_of([2], [3])
    old.save(path)

    def disk_full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(module if failing == "save_file" else module.os, failing, disk_full)
    with pytest.raises(OSError, match="No space left"):
        rollouts_of([5], [6], seed=1).save(path)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step"]
    assert_same(Rollouts.load(path), old)


def test_a_saved_file_may_be_read_by_whoever_may_read_other_files(tmp_path):
    (tmp_path / "other").touch()
    rollouts_of([2], [3]).save(tmp_path / "step")
    assert (tmp_path / "step").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_save_that_dies_halfway_through_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "step"
    old = rollouts_of([2], [3])
    old.save(path)

    def half(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half a header")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        rollouts_of([5], [6]).save(path)
    assert_same(Rollouts.load(path), old)


# ---------------------------------------------------------------------- select and cat


@EXAMPLES
@given(LENGTHS, st.data())
def test_selected_rows_are_those_rows_without_columns_that_are_padding_in_all_of_them(lengths, data):
    record = rollouts_of(*zip(*lengths, strict=True), prompt_width=7, width=8)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6))
    part = record.select(rows)
    prompt, time = max(lengths[row][0] for row in rows), max(lengths[row][1] for row in rows)
    assert part.prompt_ids.shape == (len(rows), prompt)
    assert part.response_ids.shape == (len(rows), time)
    for place, row in enumerate(rows):
        for name, tensor in part.tensors().items():
            whole = record.tensors()[name][row]
            width = {"prompt": prompt, "teacher_prompt": prompt + 1}.get(name.rpartition("_")[0])
            expected = whole[:time] if width is None else whole[len(whole) - width :]
            assert torch.equal(tensor[place], expected), name
        assert part.stop_reason[place] == record.stop_reason[row]
        assert part.teachers[place] == record.teachers[row]


@pytest.mark.parametrize("watched", [True, False])
@EXAMPLES
@given(lengths=LENGTHS)
def test_rows_taken_apart_and_joined_again_are_the_record(watched, lengths):
    record = rollouts_of(*zip(*lengths, strict=True), watched=watched)
    joined = Rollouts.cat([record.select([row]) for row in range(len(record))])
    assert_same(joined, record)


def test_joined_parts_of_different_widths_are_padded_on_their_outer_sides():
    joined = Rollouts.cat([rollouts_of([2, 1], [1, 3]), rollouts_of([4], [5], seed=1)])
    assert (joined.engine, joined.weights) == ("vllm server", "step 0, step 1")
    assert joined.prompt_ids.shape == (3, 4)
    assert joined.response_ids.shape == (3, 5)
    assert joined.prompt_mask.sum(-1).tolist() == [2, 1, 4]
    assert joined.prompt_mask[:, -1].all()
    assert joined.lengths.tolist() == [1, 3, 5]
    assert (joined.sequences[~joined.sequence_mask] == PAD).all()
    assert joined.teacher_prompt_mask.sum(-1).tolist() == [3, 2, 5]
    assert joined.teachers == ("math", "code", "math")
    for name, tensor in joined.tensors().items():
        if "prompt" not in name and name != "response_ids":
            assert not tensor[~joined.response_mask].any(), name


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"config": dataclasses.replace(CONFIG, threshold=0.7)}, "drift settings"),
        ({"watched": False}, "columns"),
        (
            {"teacher_topk_ids": torch.zeros(1, 2, 2).long(), "teacher_topk_log_probs": torch.zeros(1, 2, 2)},
            "candidates",
        ),
        ({"pad_token_id": 0}, "padding"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_not_joined(other, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    parts = [rollouts_of([1], [2], watched=False), rollouts_of([1], [2], **{"watched": False, **other})]
    if other == {"watched": False}:
        parts[0] = rollouts_of([1], [2])
    with pytest.raises(InputError, match=message):
        Rollouts.cat(parts)


def test_nothing_is_neither_selected_nor_joined():
    with pytest.raises(InputError, match="at least one row"):
        rollouts_of([1], [1]).select([])
    with pytest.raises(InputError, match="at least one part"):
        Rollouts.cat([])


@pytest.mark.parametrize("rows", [[True, False], torch.tensor([True, False])], ids=["list", "tensor"])
def test_flags_are_not_taken_for_row_numbers(rows, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match="row numbers"):
        rollouts_of([1, 2], [1, 2]).select(rows)


# ---------------------------------------------------------------------- what it derives and refuses


def test_lengths_weights_and_natural_ends_follow_from_the_columns():
    reliability = torch.tensor([[1.0, 0.5, 0.5], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, 0.5, 0.5], [0.5, 0.0, 0.0]])
    record = rollouts_of(
        [1] * 5,
        [3, 2, 2, 3, 2],
        reliability=reliability,
        stop_reason=("eos", "eos", "drift", "length", "drift"),
    )
    assert record.lengths.tolist() == [3, 2, 2, 3, 2]
    assert record.effective_lengths.tolist() == [3, 1, 2, 3, 1]
    # only the first: the second met its EOS after its reliability was gone, the others did not end by themselves
    assert record.ended_naturally.tolist() == [True, False, False, False, False]
    assert record.loss_weights[1].tolist() == [1.25, 0.25, 0.0]
    assert len(record) == 5


def test_a_printed_record_is_a_few_lines_of_counts():
    record = rollouts_of([3, 1], [4, 2], stop_reason=("eos", "drift"))
    lines = repr(record).splitlines()
    assert len(lines) <= 4
    assert "2 rows: 4 prompt tokens, 6 response tokens, 3.0 a row; stopped: 1 eos, 1 drift" in lines[0]
    overlap = torch.cat([record.overlap[0, :4], record.overlap[1, :2]]).mean()
    assert f"{int(record.drift_events.sum())} drift events, mean overlap {overlap:.3f}" in lines[1]
    assert str(CONFIG) in lines[-1]
    assert "mean overlap" not in repr(rollouts_of([1], [0]))
    assert "mean overlap" not in repr(rollouts_of([1], [2], watched=False))


def test_a_record_can_be_moved_and_keeps_what_it_does_not_have():
    record = rollouts_of([2], [3], watched=False)
    assert_same(record.to("cpu"), record)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("prompt_mask", (3, 2)),
        ("prompt_mask", (2, 3)),
        ("response_mask", (2, 5)),
        ("reliability", (3, 4)),
        ("overlap", (2, 3)),
        ("token_log_probs", (2,)),
        ("student_topk_ids", (2, 4, 2)),
        ("teacher_log_probs", (2, 4, 5)),
        ("teacher_topk_log_probs", (2, 4, 1)),
        ("teacher_topk_ids", (2, 4)),
    ],
)
def test_columns_that_do_not_fit_each_other_are_refused_by_name(name, shape, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checker
    record = rollouts_of([2, 1], [4, 2])
    column = torch.zeros(shape, dtype=record.tensors()[name].dtype)
    with pytest.raises(InputError, match=f"^{name} must have the shape"):
        dataclasses.replace(record, **{name: column})


@pytest.mark.parametrize("reasons", [("eos",), ("eos", "bored"), ("eos",) * 3])
def test_every_row_needs_a_known_reason(reasons):
    with pytest.raises(InputError, match="stop_reason"):
        rollouts_of([1, 1], [1, 1], stop_reason=reasons)
