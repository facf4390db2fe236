"""Weights as files: their hash follows the values and nothing else; what is cut short, doubled or pickled is refused."""

import hashlib
import json

import pytest
import torch
from loopback_hub.student_folders import save_student, tiny_qwen3
from safetensors.torch import load_file, save_file

from prune_opd_hf.errors import FileFormatError
from prune_opd_hf.records.weights import check_finite, stored_tensors, weight_files, weights_hash

TENSORS = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def write(folder, tensors, name="model.safetensors"):
    save_file(tensors, folder / name)
    return folder


def test_the_hash_does_not_depend_on_shards_or_metadata(tmp_path):
    model = tiny_qwen3()
    for name, size in (("whole", "5GB"), ("sharded", "8KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
    assert len(weight_files(tmp_path / "sharded")) > 1
    assert weights_hash(tmp_path / "whole") == weights_hash(tmp_path / "sharded")
    save_file(
        load_file(tmp_path / "whole" / "model.safetensors"),
        tmp_path / "whole" / "model.safetensors",
        metadata={"x": "y"},
    )
    assert weights_hash(tmp_path / "whole") == weights_hash(tmp_path / "sharded")


@pytest.mark.parametrize(
    "other",
    [
        {**TENSORS, "a": TENSORS["a"] + torch.eye(3)[:2] * 1e-6},
        {**TENSORS, "a": TENSORS["a"].reshape(3, 2)},
        {**TENSORS, "b": torch.ones(4, dtype=torch.float16)},
        {"a": TENSORS["a"], "c": TENSORS["b"]},
        {"a": TENSORS["a"]},
    ],
)
def test_the_hash_changes_with_any_value_shape_type_or_name(tmp_path, other):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert weights_hash(write(first, TENSORS)) != weights_hash(write(second, other))


def test_the_hash_is_that_of_name_type_shape_and_bytes_whatever_the_size_of_a_slice(tmp_path, monkeypatch):
    tensors = {**TENSORS, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "ids": torch.arange(5)}
    types = {"a": "F32", "b": "BF16", "scalar": "F32", "none": "F32", "ids": "I64"}
    expected = hashlib.sha256()
    for name in ("a", "b", "ids", "none", "scalar"):
        expected.update(json.dumps([name, types[name], list(tensors[name].shape)]).encode() + b"\n")
        expected.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    write(tmp_path, tensors)
    for elements in (1, 4, 1 << 22):
        monkeypatch.setattr("prune_opd_hf.records.weights._PART_ELEMENTS", elements)
        assert weights_hash(tmp_path) == f"sha256:{expected.hexdigest()}"


def test_what_is_read_is_what_was_written(tmp_path):
    write(tmp_path, TENSORS)
    assert [(t.name, t.dtype, t.shape, t.elements) for t in stored_tensors(tmp_path)] == [
        ("a", "F32", (2, 3), 6),
        ("b", "BF16", (4,), 4),
    ]


@pytest.mark.parametrize("kept_bytes", [0, 4, 8, 40, -1])
def test_a_file_that_is_cut_short_is_refused_at_every_length(tmp_path, kept_bytes):
    path = write(tmp_path, TENSORS) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(FileFormatError, match=r"model\.safetensors is cut short or damaged"):
        weights_hash(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    tiny_qwen3().save_pretrained(tmp_path, max_shard_size="8KB")
    last = weight_files(tmp_path)[-1]
    last.unlink()
    with pytest.raises(FileFormatError, match=last.name):
        weights_hash(tmp_path)


def test_a_shard_of_another_model_is_refused(tmp_path):
    tiny_qwen3().save_pretrained(tmp_path, max_shard_size="8KB")
    first, second, *_ = weight_files(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(FileFormatError, match="stored twice"):
        weights_hash(tmp_path)


@pytest.mark.parametrize("weight_map", [{}, {"a": "../secret.safetensors"}, {"a": 3}, [], None])
def test_an_index_that_points_elsewhere_is_refused(tmp_path, weight_map):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FileFormatError, match="index"):
        weight_files(tmp_path)


def test_pickled_weights_are_refused_with_the_remedy(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match="save_pretrained"):
        weight_files(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="no weights"):
        weight_files(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_numbers_are_refused_by_name(tmp_path, value, dtype):
    write(tmp_path, {"good": torch.ones(3), "bad": torch.tensor([1.0, value], dtype=dtype)})
    with pytest.raises(FileFormatError, match="'bad'"):
        check_finite(tmp_path)


def test_whole_numbers_and_empty_tensors_are_fine(tmp_path):
    write(tmp_path, {"ids": torch.arange(3), "none": torch.zeros(0), "one": torch.tensor(1.0)})
    check_finite(tmp_path)
    assert weights_hash(tmp_path).startswith("sha256:")


def test_the_single_file_is_preferred_as_transformers_does(tmp_path):
    save_student(tmp_path, records=False)
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]


def test_bytes_that_belong_to_no_tensor_are_refused(tmp_path):
    write(tmp_path, TENSORS)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole + b"words")
    with pytest.raises(FileFormatError, match="cut short or damaged"):
        stored_tensors(tmp_path)
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    del header["b"]  # its bytes stay
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + whole[8 + int.from_bytes(whole[:8], "little") :])
    with pytest.raises(FileFormatError, match="cut short or damaged"):
        stored_tensors(tmp_path)
