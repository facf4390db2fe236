"""Loading: a model or its tokenizer from the Hub or a folder, whole weights or an adapter on a base, by one function each.

peft is imported here alone, and only for adapters.
"""

import copy
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from prune_opd_hf.errors import ConfigError, FileFormatError, InputError, PruneOPDError
from prune_opd_hf.models.compatibility import context_length
from prune_opd_hf.models.generation_config import make_savable
from prune_opd_hf.models.lm_head import base_causal_lm
from prune_opd_hf.records.files import first_line
from prune_opd_hf.records.folders import naming_full_disk, refuse_used_folder
from prune_opd_hf.records.training_summary import SUMMARY_FILE
from prune_opd_hf.records.weights import ADAPTER_FILE, weight_files

logger = logging.getLogger(__name__)

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of `from_pretrained` that say where files are."""

TOKENIZER_ARGUMENTS = (*HUB_ARGUMENTS, "trust_remote_code", "code_revision", "gguf_file")
"""Arguments that a model's tokenizer is loaded with as well."""

WEIGHT_ARGUMENTS = ("revision", "subfolder", "variant", "gguf_file", "quantization_config")
"""Arguments that decide which weights a name stands for."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model given by name comes from.

    Attributes:
        base: the Hub id or folder of whole weights.
        arguments: for `from_pretrained`.
        adapter: the Hub id or folder of an adapter on the base; None where there is none.
        adapter_arguments: where the adapter's files are.
    """

    base: str
    arguments: Mapping[str, Any]
    adapter: str | None = None
    adapter_arguments: Mapping[str, Any] = field(default_factory=dict)

    def has_base_of(self, other: "ModelSource") -> bool:
        """Whether both stand on the same weights."""
        places = [os.path.realpath(each.base) if os.path.isdir(each.base) else each.base for each in (self, other)]
        chosen = [{name: _as_dict(each.arguments.get(name)) for name in WEIGHT_ARGUMENTS} for each in (self, other)]
        return places[0] == places[1] and chosen[0] == chosen[1]


def _as_dict(value: Any) -> Any:
    """Settings of a quantization by their values: as objects those of 4 and of 8 bits are equal."""
    return value.to_dict() if hasattr(value, "to_dict") else value


def find_source(name: str | os.PathLike[str], role: str = "model", **arguments: Any) -> ModelSource:
    """Look whether a name is that of whole weights or of an adapter, without loading any.

    Args:
        role: how the error message calls the model.
        arguments: for `from_pretrained`. Where the files of an adapter are does not say where those of its base are.

    Raises:
        InputError: there is no such folder, or an adapter that names no base.
        ConfigError: an unknown dtype, or one under its older name.
    """
    name, dtype = os.fspath(name), arguments.get("dtype")
    if "torch_dtype" in arguments:  # the older name; what stands under the newer one by default would win in silence
        raise ConfigError(f"torch_dtype of the {role} is called dtype: write dtype={arguments['torch_dtype']!r}")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    places = {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}
    with _in_one_line(role, name):
        path = find_adapter_config_file(name, **places)
        if path is None or _has_whole_weights(name):
            return ModelSource(name, arguments)
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        if not config["base_model_name_or_path"]:
            raise KeyError("its adapter_config.json names no base_model_name_or_path")
    own = {key: value for key, value in arguments.items() if key not in ("revision", "subfolder")}
    if config.get("revision"):
        own["revision"] = config["revision"]
    return ModelSource(config["base_model_name_or_path"], own, name, places)


def _has_whole_weights(name: str) -> bool:
    try:
        return os.path.isdir(name) and weight_files(name)[0].name != ADAPTER_FILE
    except FileFormatError:
        return False


def load_causal_lm(name: str | os.PathLike[str], role: str = "model", **arguments: Any) -> Any:
    """A causal LM of the Hub or of a folder; an adapter comes as a PEFT model, on the base that it names."""
    source = find_source(name, role, **arguments)
    return add_adapter(load_base(source, role), source, role)


def load_base(source: ModelSource, role: str) -> Any:
    """The whole weights of a source, without its adapter."""
    with _in_one_line(role if source.adapter is None else f"base of the {role}", source.base):
        return AutoModelForCausalLM.from_pretrained(source.base, **source.arguments)


def known_context(model: Any, role: str, **arguments: Any) -> int | None:
    """Tokens that a model reads at most; one that is given by name is asked by its config, with the arguments for loading it."""
    if not isinstance(model, str | os.PathLike):
        return context_length(model)
    source = find_source(model, role, **arguments)
    with _in_one_line(role, source.base):
        config = AutoConfig.from_pretrained(source.base, **source.arguments)
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def add_adapter(base: nn.Module, source: ModelSource, role: str, *, trainable: bool = False) -> Any:
    """The base with the adapter of a source, if it has one, and with the generation config that lies beside the adapter.

    Args:
        trainable: whether the adapter's weights get gradients.
    """
    if source.adapter is None:
        return base
    with _in_one_line(role, source.adapter):
        try:
            from peft import PeftModel
        except ImportError:
            raise ImportError("it is an adapter, which needs peft: pip install 'prune-opd-hf[peft]'") from None
        model = PeftModel.from_pretrained(base, source.adapter, is_trainable=trainable, **source.adapter_arguments)
        with suppress(OSError):  # PEFT's own way saves none
            base.generation_config = GenerationConfig.from_pretrained(source.adapter, **source.adapter_arguments)
        return model


def load_tokenizer(name: str | os.PathLike[str], role: str = "model", **arguments: Any) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model of the Hub or of a folder, or that of its base where an adapter has none; it takes its part
    of the arguments that the model is loaded with."""
    name, own = os.fspath(name), {key: arguments[key] for key in TOKENIZER_ARGUMENTS if key in arguments}
    try:
        with _in_one_line(f"{role}'s tokenizer", name):
            return AutoTokenizer.from_pretrained(name, **own)
    except InputError:
        source = find_source(name, role, **own)
        if source.adapter is None:
            raise
    return load_tokenizer(source.base, role, **source.arguments)


def as_tokenizer(given: Any, name: str) -> PreTrainedTokenizerBase:
    """A tokenizer as it was given, or that of a processor, which comes with the multimodal classes."""
    tokenizer = given if isinstance(given, PreTrainedTokenizerBase) else getattr(given, "tokenizer", given)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(
            f"{name} must be a tokenizer or a processor that holds one, got {type(given).__name__}: "
            "AutoTokenizer.from_pretrained(...) loads one"
        )
    return tokenizer


@contextmanager
def _in_one_line(what: str, name: str) -> Iterator[None]:
    """Whatever loading raises as an `InputError` of one line: OSError, ValueError, KeyError, safetensors', JSON's, the Hub's."""
    try:
        if os.path.isfile(name):
            raise NotADirectoryError("it is a file, no folder")
        if not os.path.isdir(name):
            try:
                validate_repo_id(name)
            except HFValidationError:  # what cannot be the id of a repository was meant to be a folder
                raise NotADirectoryError("no such folder") from None
        yield
    except PruneOPDError:
        raise
    except Exception as error:
        raise InputError(f"cannot load the {what} {name!r}: {first_line(error)[:300]}{_remedy(name, error)}") from error


def _remedy(name: str, error: Exception) -> str:
    """What of a name that cannot be loaded its user may not know."""
    if not os.path.exists(name):
        return "" if isinstance(error, NotADirectoryError) else " (no folder of this name here)"
    checkpoints = sorted(Path(name).glob("checkpoint-*"), key=os.path.getmtime)
    saved = any(os.path.exists(os.path.join(name, file)) for file in ("config.json", "adapter_config.json"))
    if checkpoints and not saved:
        return f" (checkpoints and no saved model: name one of them, such as {checkpoints[-1]}, or call trainer.save_model())"
    return ""


def quantization(settings: Mapping[str, Any]) -> Any:
    """What Transformers quantizes by.

    Args:
        settings: of the quantization, with "quant_method", as Transformers writes them into a model's config.
    """
    from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

    try:
        config = AutoQuantizationConfig.from_dict(dict(settings))
        with suppress(ValueError, RuntimeError):  # of devices, which loading knows
            AutoHfQuantizer.from_config(config).validate_environment()
    except (ValueError, TypeError, ImportError, KeyError) as error:
        reason = first_line(error)
        extra = " (pip install 'prune-opd-hf[quantized]' brings it)" if "requires bitsandbytes" in reason else ""
        raise ConfigError(f"the quantization {dict(settings)} cannot be used: {reason}{extra}") from error
    return config


def quantized(arguments: Mapping[str, Any], settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load a model quantized as `quantization` says, on this device where they name none."""
    placed = {} if device.type == "cpu" else {"device_map": {"": str(device)}}
    return {**placed, **arguments, "quantization_config": quantization(settings)}


def published_name(model: Any) -> str | None:
    """What a model, Hub id or folder may be called in a published record: the Hub id, or the folder's name without its path;
    None for a model that was loaded from nowhere.
    """
    known = model
    if not isinstance(model, (str, os.PathLike)):
        known = getattr(getattr(model, "config", None), "_name_or_path", "")
    name = os.fspath(known or "")
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not os.path.exists(name)
    return name if is_hub_id else Path(name).resolve().name if name else None


# ---------------------------------------------------------------------- adapters


def is_adapted(model: Any) -> bool:
    """Whether a model has an adapter, as a PEFT model or put in by Transformers."""
    return hasattr(model, "peft_config")


def active_adapters(model: Any) -> list[str]:
    """The names of the adapters in use of a model that has some: a method where Transformers put them in, a property with PEFT."""
    active = model.active_adapters
    return active() if callable(active) else active


def copy_with_shared_weights(model: nn.Module, *, copies_trained: bool = False) -> nn.Module:
    """Another model over the same parameters. For adapters, which leave the weights of their base alone.

    Args:
        copies_trained: copy those that are trained; else no weight is copied.
    """
    shared = {
        id(parameter): parameter for parameter in model.parameters() if not (copies_trained and parameter.requires_grad)
    }
    return copy.deepcopy(model, shared)


def check_adapter_config(peft_config: Any) -> None:
    """Refuse what is no configuration of an adapter; None is fine."""
    if peft_config is None:
        return
    from peft import PeftConfig

    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config must be a configuration such as peft.LoraConfig(r=16), got {type(peft_config).__name__}"
        )


def make_adapter(model: nn.Module, peft_config: Any) -> Any:
    """A fresh adapter on a model."""
    from peft import get_peft_model

    if is_adapted(model):
        raise ConfigError(
            "the student has an adapter already: leave out peft_config (use_peft) to go on training it, or merge it first "
            "(prune-opd merge)"
        )
    try:
        return get_peft_model(model, _without_fused_layers(model, peft_config))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"the adapter does not fit the student: {first_line(error)} (target_modules, or lora_target_modules on the command "
            "line, name its layers)"
        ) from error


def _without_fused_layers(model: nn.Module, peft_config: Any) -> Any:
    """The config with Mamba's `out_proj` left out of "all-linear": kernels read its weight past an adapter in a whole pass and not
    in decoding (huggingface/peft#2556)."""
    if (
        getattr(peft_config, "target_modules", None) != "all-linear"
        or getattr(peft_config, "exclude_modules", ()) is not None
    ):
        return peft_config
    mixers = [name for name, module in model.named_modules() if hasattr(module, "A_log") and hasattr(module, "D")]
    if not mixers:
        return peft_config
    logger.warning("the adapter leaves out out_proj of %d Mamba layers, whose kernels would not see it", len(mixers))
    config = copy.copy(peft_config)
    config.exclude_modules = [f"{name}.out_proj" for name in mixers]
    return config


def ensure_trainable(model: Any) -> None:
    """Let the adapter of a model get gradients, where it was loaded for inference."""
    if getattr(model, "is_quantized", False) and not is_adapted(model):
        raise ConfigError(
            "quantized weights are not trained: train an adapter on them (peft_config; use_peft on the command line)"
        )
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if not is_adapted(model):
        raise ConfigError(
            "no weight of the student gets a gradient: call model.requires_grad_(True), or pass a peft_config"
        )
    active = active_adapters(model)[0]
    model.set_adapter(active)
    model.peft_config[active].inference_mode = False


def _untie_adapted_inplace(base: Any) -> None:
    """Give the head weights of its own where it is tied to the embeddings and an adapter changes one of the two.

    Merged into the shared weights, it would change the other as well.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    config = base.config.get_text_config()
    if config.tie_word_embeddings and any(isinstance(layer, BaseTunerLayer) for layer in (embeddings, head)):
        plain = getattr(head, "base_layer", head)
        plain.weight = nn.Parameter(plain.weight.detach().clone())
        base.config.tie_word_embeddings = config.tie_word_embeddings = False


def merge_adapter(name: str | os.PathLike[str], output_dir: str | os.PathLike[str], **arguments: Any) -> None:
    """Write a plain model, the adapter's weights added to its base's, with tokenizer and training summary; a new folder at once.

    Raises:
        InputError: it cannot be loaded, or is no adapter.
        ConfigError: `output_dir` holds something.
        UnsupportedGenerationError: the adapter is a learnt prompt, which has no weights to add.
    """
    refuse_used_folder(output_dir)
    target = Path(output_dir)
    source = find_source(name, "adapter", **arguments)
    if source.adapter is None:
        raise InputError(f"{source.base} is no adapter: there is no adapter_config.json, so there is nothing to merge")
    model = add_adapter(load_base(source, "adapter"), source, "adapter")
    _untie_adapted_inplace(base_causal_lm(model))  # which refuses a learnt prompt
    model = model.merge_and_unload(safe_merge=True)
    make_savable(model.generation_config)
    is_there = target.exists()  # and empty: it may be a link, a disk of its own or where somebody stands, and stays
    unfinished = (target if is_there else target.parent) / f".{uuid4().hex}.{target.name}"
    tokenizer = load_tokenizer(name, "adapter", **arguments)
    try:
        with naming_full_disk(target):
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            if (summary := Path(source.adapter) / SUMMARY_FILE).is_file():
                shutil.copyfile(summary, unfinished / SUMMARY_FILE)
            if not is_there:
                os.replace(unfinished, target)
                return
            for written in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(written, target / written.name)  # config.json last: without it, it is no model
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
