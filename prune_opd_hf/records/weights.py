"""The weights of a saved model as files: which they are, what identifies them, whether they are whole.

Reads safetensors by their format, in slices; it loads no model and never unpickles anything.
"""

import hashlib
import itertools
import json
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prune_opd_hf.errors import FileFormatError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")

_SLICE_BYTES = 1 << 24
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: where its bytes lie and what they mean."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files that `from_pretrained` reads, in its order of preference: whole, sharded, adapter.

    Raises:
        FileFormatError: there are none, only pickled ones, or the index names files that are not there.
    """
    root = Path(folder)
    if (root / SINGLE_FILE).is_file():
        return [root / SINGLE_FILE]
    if (root / INDEX_FILE).is_file():
        shards = sorted(set(_weight_map(root).values()))
        missing = [name for name in shards if not (root / name).is_file()]
        if missing:
            raise FileFormatError(
                f"{INDEX_FILE} names {missing[0]}, which is not there ({len(missing)} of {len(shards)} files missing): "
                "save the model again"
            )
        return [root / name for name in shards]
    if (root / ADAPTER_FILE).is_file():
        return [root / ADAPTER_FILE]
    pickled = [path.name for pattern in PICKLED_WEIGHTS for path in sorted(root.glob(pattern))]
    if pickled:
        raise FileFormatError(
            f"the weights are pickled ({pickled[0]}), and loading a pickle runs its code: save them as safetensors, "
            "with model.save_pretrained(folder)"
        )
    raise FileFormatError(f"no weights: expected {SINGLE_FILE}, {INDEX_FILE} or {ADAPTER_FILE} in {root.name}/")


def stored_tensors(folder: str | os.PathLike[str]) -> list[StoredTensor]:
    """Every tensor of the weights, sorted by name.

    Raises:
        FileFormatError: a file is cut short or damaged, a tensor is stored twice, or the index and the files disagree.
    """
    files = weight_files(folder)
    tensors = sorted((tensor for file in files for tensor in _read_header(file)), key=lambda tensor: tensor.name)
    names = [tensor.name for tensor in tensors]
    for first, second in itertools.pairwise(names):
        if first == second:
            raise FileFormatError(f"tensor {first!r} is stored twice: remove weight files of an earlier save")
    if files[0].name not in {SINGLE_FILE, ADAPTER_FILE}:
        mapped = _weight_map(Path(folder))
        stored = {tensor.name: tensor.file.name for tensor in tensors}
        if mapped != stored:
            odd = sorted(set(mapped.items()) ^ set(stored.items()))[0][0]
            raise FileFormatError(f"{INDEX_FILE} and the files disagree about {odd!r}: save the model again")
    if not tensors:
        raise FileFormatError(f"{files[0].name} holds no tensors")
    return tensors


def weights_hash(folder: str | os.PathLike[str]) -> str:
    """What identifies these very weights: SHA-256 over name, dtype, shape and bytes of every tensor, by name.

    It does not depend on how the tensors are spread over files, so that a sharded copy has the hash of a whole one.

    Returns:
        "sha256:" and 64 hex digits.

    Raises:
        FileFormatError: the weights are missing, pickled or damaged.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"a": torch.zeros(2), "b": torch.ones(1)}, f"{folder}/model.safetensors")
        ...     weights_hash(folder)[:15]
        'sha256:ce97ef3e'
    """
    digest = hashlib.sha256()
    for tensor in stored_tensors(folder):
        digest.update(json.dumps([tensor.name, tensor.dtype, list(tensor.shape)]).encode() + b"\n")
        for part in _slices(tensor):
            digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def check_finite(folder: str | os.PathLike[str]) -> None:
    """Refuse weights with NaN or infinite values: a model with them answers nothing.

    Raises:
        FileFormatError: names the first such tensor.
    """
    for tensor in stored_tensors(folder):
        dtype = _FLOATS.get(tensor.dtype)
        if dtype is None:
            continue
        for part in _slices(tensor):
            if not torch.isfinite(torch.frombuffer(bytearray(part), dtype=dtype)).all():
                raise FileFormatError(
                    f"tensor {tensor.name!r} in {tensor.file.name} holds NaN or infinity: publish an earlier checkpoint"
                )


def _weight_map(root: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((root / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileFormatError(f"{INDEX_FILE} cannot be read ({error}): save the model again") from error
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise FileFormatError(f"{INDEX_FILE} must map tensor names to files beside it: save the model again")
    return weight_map


def _read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file, with every offset checked against its size."""
    size = file.stat().st_size
    damaged = f"{file.name} is cut short or damaged"
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise FileFormatError(f"{damaged} (its header does not fit into its {size} bytes): save the model again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            base = 8 + length
            tensors = [
                StoredTensor(
                    name=name,
                    dtype=entry["dtype"],
                    shape=tuple(entry["shape"]),
                    file=file,
                    start=base + entry["data_offsets"][0],
                    end=base + entry["data_offsets"][1],
                )
                for name, entry in header.items()
            ]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise FileFormatError(f"{damaged} (its header cannot be read): save the model again") from error
    for tensor in tensors:
        width = _BYTES.get(tensor.dtype)
        expected = tensor.elements * width if width else tensor.end - tensor.start
        if not base <= tensor.start <= tensor.end <= size or tensor.end - tensor.start != expected:
            raise FileFormatError(f"{damaged} (tensor {tensor.name!r} is not all there): save the model again")
    position = base
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != position:
            break
        position = tensor.end
    if position != size:
        raise FileFormatError(f"{damaged} (it holds bytes that belong to no tensor or to two): save the model again")
    return tensors


def _slices(tensor: StoredTensor) -> Iterator[bytes]:
    if tensor.start == tensor.end:
        return
    with tensor.file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for start in range(tensor.start, tensor.end, _SLICE_BYTES):
            yield data[start : min(start + _SLICE_BYTES, tensor.end)]
