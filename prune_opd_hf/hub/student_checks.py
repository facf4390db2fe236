"""Is a saved student fit to be published? Checks of its folder that need no network and run none of its code."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from prune_opd_hf.errors import FileFormatError
from prune_opd_hf.hub.cards import ModelFacts
from prune_opd_hf.hub.hub_ids import is_hub_id, is_local
from prune_opd_hf.records.weights import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    check_finite,
    stored_tensors,
    weight_files,
)

_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def student_facts(folder: Path) -> ModelFacts:
    """Check everything that plain Transformers needs to load the student, and say what it is.

    Raises:
        FileFormatError: the first thing that is missing, damaged or would need foreign code, with its remedy.
    """
    adapter = weight_files(folder)[0].name == ADAPTER_FILE
    tensors = stored_tensors(folder)
    check_finite(folder)
    read_json(folder / (ADAPTER_CONFIG if adapter else "config.json"))
    tokenizer = load_tokenizer(folder)
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.elements
    dtype = max(sizes, key=lambda name: sizes[name])
    common: dict[str, Any] = {
        "parameters": sum(sizes.values()),
        "dtype": _DTYPE_NAMES.get(dtype, dtype),
        "chat": bool(tokenizer.chat_template),
    }
    if adapter:
        config = adapter_config(folder)
        return ModelFacts(architecture=str(config.get("peft_type", "PEFT")), adapter=True, **common)
    return ModelFacts(**_whole_model_facts(folder, tokenizer), **common)


def adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's settings, with a base model that others can load.

    Raises:
        FileFormatError: there are none, or the base model is not a repository on the Hub.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not is_hub_id(base) or is_local(base):
        raise FileFormatError(
            f"{ADAPTER_CONFIG} names no base model on the Hub, so nobody else could load the adapter: merge it "
            "(model.merge_and_unload()) and publish whole weights, or name the base by its Hub id"
        )
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The student's tokenizer, from its own folder.

    Raises:
        FileFormatError: it is missing, does not load, or needs foreign code.
    """
    remedy = "save it beside the weights: tokenizer.save_pretrained(folder)"
    if not (folder / "tokenizer_config.json").is_file():
        raise FileFormatError(f"no tokenizer (tokenizer_config.json is missing): {remedy}")
    _refuse_foreign_code(folder / "tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise FileFormatError(f"the tokenizer does not load ({_first_line(error)}): {remedy}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileFormatError: it is missing or not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path.name} is missing or damaged ({_first_line(error)}): save the model again"
        ) from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path.name} must hold a JSON object: save the model again")
    return value


def _whole_model_facts(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    _refuse_foreign_code(folder / "config.json")
    if not (folder / "generation_config.json").is_file():
        raise FileFormatError("no generation_config.json: save it with model.generation_config.save_pretrained(folder)")
    read_json(folder / "generation_config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with _quiet_loading():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                device_map="meta",  # shapes and names are checked without memory for the values
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise FileFormatError(f"the model does not load ({_first_line(error)}): save it again") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            names = sorted(str(name) for name in info[problem])
            raise FileFormatError(
                f"weights and config.json disagree: {len(names)} {problem.replace('_', ' ')}, first {names[0]}: "
                "save the model again"
            )
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise FileFormatError(
            f"the tokenizer has ids up to {highest}, the model embeds {rows}: resize the embeddings or save the right tokenizer"
        )
    text_config = config.get_text_config(decoder=True)
    return {
        "architecture": type(model).__name__,
        "context_length": getattr(text_config, "max_position_embeddings", None),
    }


def _refuse_foreign_code(path: Path) -> None:
    config = read_json(path)
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in str(config.get(name)):
            raise FileFormatError(
                f"{path.name} asks for a kernel from the Hub ({name}), which is code: remove that line from it"
            )
    if config.get("auto_map"):
        raise FileFormatError(
            f"{path.name} asks for code of its own (auto_map): a published student must load without trust_remote_code"
        )


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
