"""The model under evaluation: loaded from the Hub or a folder, or taken as it is, with what identifies it."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prune_opd_hf.errors import ConfigError


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
        ConfigError: a model in memory without its tokenizer.
        FileFormatError: the weights are no safetensors.
    """
    from prune_opd_hf.publishing.weights import weights_hash as hash_of

    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(path, revision=revision)
        loaded = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=dtype).to(device).eval()
        folder = path if os.path.isdir(path) else _snapshot(path, revision)
        found = Path(path).resolve().name if os.path.isdir(path) else path
        return Subject(loaded, tokenizer, name or found, weights_hash or hash_of(folder))
    if tokenizer is None:
        raise ConfigError("a model in memory needs its tokenizer: pass processing_class")
    if weights_hash is None:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            weights_hash = hash_of(folder)
    return Subject(model, tokenizer, name or _known_name(model), weights_hash)


def _known_name(model: PreTrainedModel) -> str:
    known = getattr(model.config, "_name_or_path", "") or ""
    is_hub_id = known.count("/") == 1 and not os.path.exists(known) and not known.startswith((".", "/", "~"))
    return known if is_hub_id else Path(known).name or type(model).__name__


def _snapshot(repo_id: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(repo_id, revision=revision, allow_patterns=["*.safetensors", "*.safetensors.index.json"])
