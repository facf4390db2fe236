"""The model under evaluation: loaded from the Hub or a folder, or taken as it is, with what identifies it."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prune_opd_hf.errors import ConfigError, FileFormatError, UnsupportedGenerationError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)?")


@dataclass(frozen=True)
class Subject:
    """A model that is ready to generate.

    Attributes:
        model, tokenizer: on their device.
        name: Hub id, or the folder's name alone.
        weights_hash: "sha256:..." of the weights as safetensors.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    weights_hash: str


def resolve_subject(
    model: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    device: torch.device,
    name: str | None = None,
    weights_hash: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
) -> Subject:
    """Load what is not loaded yet, and find out what it is.

    Args:
        model: a Hub id, a folder, or a model, which stays on its device.
        tokenizer: loaded beside the model by default.
        device: where a model that is loaded here goes.
        name, weights_hash: instead of what is found out. A model in memory is saved to a temporary folder to be hashed.
        revision: of a Hub id.
        dtype: to load with; "auto" takes the one that was saved.

    Raises:
        ConfigError: a model in memory without its tokenizer; a dtype or a revision that means nothing.
        FileNotFoundError: no such folder.
        FileFormatError: model or tokenizer cannot be read, or the weights are no safetensors.
        UnsupportedGenerationError: an encoder-decoder model.
        OSError: the Hub does not have the model, or cannot be reached.
    """
    from prune_opd_hf.records.weights import weights_hash as hash_of

    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        _check_names(path, revision, dtype)
        with _loading(path, "tokenizer"):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(path, revision=revision)
        with _loading(path, "model"):
            loaded = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=dtype).to(device).eval()
        folder = path if os.path.isdir(path) else _snapshot(path, revision)
        found = Path(path).resolve().name if os.path.isdir(path) else path
        return Subject(loaded, tokenizer, name or found, weights_hash or hash_of(folder))
    if model.config.is_encoder_decoder:
        raise UnsupportedGenerationError("evaluation is for decoder-only models; this one is an encoder-decoder")
    if tokenizer is None:
        raise ConfigError("a model in memory needs its tokenizer: pass processing_class")
    if weights_hash is None:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            weights_hash = hash_of(folder)
    return Subject(model, tokenizer, name or _known_name(model), weights_hash)


def _check_names(path: str, revision: str | None, dtype: str) -> None:
    """Refuse what Transformers would take for something else."""
    known = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise ConfigError(f"dtype must be auto, or a floating-point dtype such as bfloat16 or float32, got {dtype!r}")
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "config.json")):
            raise FileFormatError(
                f"{path} is no model: it has no config.json; give the folder that holds it, or a Hub id"
            )
        if revision is not None:
            raise ConfigError(f"revision belongs to a Hub id, and {path} is a folder: leave it out")
    elif not _HUB_ID.fullmatch(path) or os.path.exists(path):
        raise FileNotFoundError(
            f"no model folder {path!r}, and it is no Hub id either: give one of the form owner/name"
        )


@contextlib.contextmanager
def _loading(path: str, what: str) -> Iterator[None]:
    """One line about what cannot be read; what the Hub says passes as it is."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileFormatError(f"the {what} of {path} cannot be loaded: {reason[:300]}") from error


def _known_name(model: PreTrainedModel) -> str:
    known = getattr(model.config, "_name_or_path", "") or ""
    is_hub_id = known.count("/") == 1 and not os.path.exists(known) and not known.startswith((".", "/", "~"))
    return known if is_hub_id else Path(known).name or type(model).__name__


def _snapshot(repo_id: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(repo_id, revision=revision, allow_patterns=["*.safetensors", "*.safetensors.index.json"])
