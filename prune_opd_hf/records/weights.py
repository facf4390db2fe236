"""The weights of a saved model as files: which they are, what identifies them, whether they are complete.

Reads safetensors through its library; it loads no model and never unpickles anything.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prune_opd_hf.errors import FileFormatError
from prune_opd_hf.records.files import first_line, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")

_PART_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, without its values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

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
    return [tensor for tensor, _ in _opened(folder)]


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
    for tensor, values in _opened(folder):
        digest.update(json.dumps([tensor.name, tensor.dtype, list(tensor.shape)]).encode() + b"\n")
        for part in values.split(_PART_ELEMENTS):
            digest.update(memoryview(part.view(torch.uint8).numpy()))
    return f"sha256:{digest.hexdigest()}"


def check_finite(folder: str | os.PathLike[str]) -> None:
    """Refuse weights with NaN or infinite values: a model with them answers nothing."""
    for tensor, values in _opened(folder):
        for part in values.split(_PART_ELEMENTS):
            if part.is_floating_point() and not part.float().isfinite().all():
                raise FileFormatError(
                    f"tensor {tensor.name!r} in {tensor.file.name} holds NaN or infinity: publish an earlier checkpoint"
                )


def _weight_map(root: Path) -> dict[str, str]:
    weight_map = read_json(root / INDEX_FILE, "index of weights").get("weight_map")
    if not isinstance(weight_map, dict):
        weight_map = {}
    names = list(weight_map.values())
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise FileFormatError(f"{INDEX_FILE} must map tensor names to files beside it: save the model again")
    return weight_map


def _opened(folder: str | os.PathLike[str]) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Every tensor by name, with its values in one line, read where they are used. All files are checked before the first."""
    files = weight_files(folder)
    with ExitStack() as stack:
        entries = []
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    values = opened.get_slice(name)
                    tensor = StoredTensor(name, values.get_dtype(), tuple(values.get_shape()), file)
                    entries.append((tensor, opened))
            except (SafetensorError, OSError) as error:
                raise FileFormatError(
                    f"{file.name} is cut short or damaged ({first_line(error)}): save the model again"
                ) from error
        entries.sort(key=lambda entry: entry[0].name)
        _check_names([tensor for tensor, _ in entries], files)
        for tensor, opened in entries:
            yield tensor, opened.get_tensor(tensor.name).flatten()


def _check_names(tensors: list[StoredTensor], files: list[Path]) -> None:
    for first, second in itertools.pairwise(tensors):
        if first.name == second.name:
            raise FileFormatError(f"tensor {first.name!r} is stored twice: remove weight files of an earlier save")
    if files[0].name not in {SINGLE_FILE, ADAPTER_FILE}:
        mapped = _weight_map(files[0].parent)
        stored = {tensor.name: tensor.file.name for tensor in tensors}
        if mapped != stored:
            odd = sorted(set(mapped.items()) ^ set(stored.items()))[0][0]
            raise FileFormatError(f"{INDEX_FILE} and the files disagree about {odd!r}: save the model again")
    if not tensors:
        raise FileFormatError(f"{files[0].name} holds no tensors")
