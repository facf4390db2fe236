"""A student's folder: which files are published and in what form, whether plain Transformers can load it, its records.

The files are an explicit list, cleaned and searched for leaks. The checks need no network and run none of the folder's code.
"""

import json
import threading
from collections import Counter
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from prune_opd_hf.errors import FileFormatError, LeakError
from prune_opd_hf.hub.card import ModelFacts
from prune_opd_hf.hub.client import is_hub_id, is_local
from prune_opd_hf.hub.leaks import Leak, Machine, find_leaks
from prune_opd_hf.models.compatibility import context_length
from prune_opd_hf.models.loading import load_tokenizer
from prune_opd_hf.records.files import first_line
from prune_opd_hf.records.training_summary import SUMMARY_FILE
from prune_opd_hf.records.weights import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    check_finite,
    stored_tensors,
    weight_files,
)

CARD_FILE = "README.md"
LOADED_FILES = ("config.json", "generation_config.json", ADAPTER_CONFIG, "tokenizer_config.json")
CONFIG_FILES = (*LOADED_FILES, "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/*.jinja")
VOCABULARY_FILES = ("tokenizer.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model")
LICENSE_FILES = ("LICENSE", "LICENSE.*", "NOTICE", "NOTICE.*")
STUDENT_FILES = (*CONFIG_FILES, *VOCABULARY_FILES, "*.safetensors", INDEX_FILE, SUMMARY_FILE)
RECORD_FILES = ("evaluation/*.json", "figures/*.png", "figures/*.csv", ".eval_results/*.yaml")
DOWNLOADED_PATTERNS = (*STUDENT_FILES, *LICENSE_FILES, *RECORD_FILES, CARD_FILE)
"""What `download_student` fetches: nothing that could be executed."""
REPLACED_PATTERNS = (
    *STUDENT_FILES,
    *("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "training_args.bin"),
    *("evaluation/*", "figures/*", ".eval_results/*"),
)
"""Files of an earlier revision that a new one replaces or, where it has no such file, removes: a leftover shard or
tokenizer file would be loaded together with the new ones."""
_CODE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"\x1f\x8b", b"\x7fELF")
_one_load_at_a_time = threading.Lock()  # loading switches torch's global state; two threads leave it on "meta"
_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def student_files(root: Path) -> dict[str, Path | bytes]:
    """The files of the folder that a reader needs; paths of this machine are taken out of the configs."""
    weights = weight_files(root)
    files: dict[str, Path | bytes] = {path.name: path for path in weights}
    if weights[0].name not in {SINGLE_FILE, ADAPTER_FILE}:
        files[INDEX_FILE] = root / INDEX_FILE
    for pattern in (*CONFIG_FILES, *VOCABULARY_FILES, *LICENSE_FILES):
        for path in filter(Path.is_file, sorted(root.glob(pattern))):
            _refuse_disguised(root, path)
            files[path.relative_to(root).as_posix()] = _clean_config(path) if path.name in LOADED_FILES else path
    return files


def _refuse_disguised(root: Path, path: Path) -> None:
    """A text or vocabulary must be one, and lie in the folder or, where that is of the Hub's cache, in the cache's store."""
    with path.open("rb") as stream:
        start = stream.read(4)
    if start.startswith(_CODE_STARTS):
        raise FileFormatError(
            f"{path.name} is a pickle, an archive or a program, whatever its name says: remove it from the folder"
        )
    store = root.resolve().parent.parent / "blobs"
    if not any(path.resolve().is_relative_to(place) for place in (root.resolve(), store)):
        raise FileFormatError(f"{path.name} is a link out of the folder: put the file itself there, or remove the link")


def _clean_config(path: Path) -> bytes:
    """A config without the note of where it was loaded from, where that is a folder; otherwise byte for byte."""
    config = _read_config(path)
    origins = {key for key in ("_name_or_path", "name_or_path") if key in config and not is_hub_id(config[key] or None)}
    if not origins:
        return path.read_bytes()
    kept = {key: value for key, value in config.items() if key not in origins}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def refuse_leaks(files: Mapping[str, Path | bytes], machine: Machine, allowed_names: Collection[str]) -> None:
    """Search everything that would be published; a LeakError names file, line and kind of the first finds.

    Images and the values of weights hold no words.
    """
    leaks: list[Leak] = []
    for path, content in files.items():
        if path.endswith(".png"):
            continue
        leaks += find_leaks(
            path,
            _text(content),
            machine,
            allowed_names=allowed_names,
            vocabulary=any(fnmatch(path, pattern) for pattern in VOCABULARY_FILES),
            template=path.endswith(".jinja"),
        )
    if leaks:
        shown = "; ".join(map(str, leaks[:5])) + (f"; and {len(leaks) - 5} more" if len(leaks) > 5 else "")
        raise LeakError(
            f"not for the public: {shown}. Remove it there or in the record it comes from; nothing was uploaded"
        )


def _text(content: Path | bytes) -> str:
    """What can be read in a file; of weights, their names and notes."""
    if isinstance(content, Path) and content.suffix == ".safetensors":
        with safe_open(content, "pt") as stored:
            return json.dumps([list(stored.keys()), stored.metadata()])
    return (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", errors="replace")


def is_replaced(path: str) -> bool:
    """Whether a file of an earlier revision belongs to the student that a new revision replaces.

    Example:
        >>> is_replaced("model-00002-of-00002.safetensors"), is_replaced("notes/model.safetensors"), is_replaced("notes.md")
        (True, False, False)
    """
    return any(fnmatch(path, pattern) for pattern in REPLACED_PATTERNS if ("/" in pattern) == ("/" in path))


def student_facts(folder: Path) -> ModelFacts:
    """Check everything that plain Transformers needs to load the student, and say what it is.

    Raises:
        FileFormatError, InputError: the first thing that is missing, damaged or would need foreign code, with its remedy.
    """
    check_finite(folder)
    sizes: Counter[str] = Counter()
    for tensor in stored_tensors(folder):
        sizes[tensor.dtype] += tensor.elements
    ((dtype, _),) = sizes.most_common(1)
    is_adapter = weight_files(folder)[0].name == ADAPTER_FILE
    config = _read_config(folder / (ADAPTER_CONFIG if is_adapter else "config.json"))
    _refuse_foreign_code(folder / "tokenizer_config.json")
    tokenizer = load_tokenizer(folder, "student", local_files_only=True, trust_remote_code=False)
    if is_adapter:
        adapter_base(folder)
        architecture, context = str(config.get("peft_type", "PEFT")), None
    else:
        architecture, context = _load_without_memory(folder, tokenizer)
    return ModelFacts(
        architecture=architecture,
        parameters=sizes.total(),
        dtype=_DTYPE_NAMES.get(dtype, dtype),
        context_length=context,
        chat=bool(tokenizer.chat_template),
        adapter=is_adapter,
    )


def adapter_base(folder: Path) -> str:
    """The Hub id of an adapter's base model; a FileFormatError where its config names none."""
    base = _read_config(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not is_hub_id(base) or is_local(base):
        raise FileFormatError(
            f"{ADAPTER_CONFIG} names no base model on the Hub, so nobody else could load the adapter: merge it (prune-opd "
            "merge) and publish whole weights, or name the base by its Hub id"
        )
    return base


def _load_without_memory(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int | None]:
    """Let Transformers load the model without its values; its class, and how many tokens it reads at most."""
    _refuse_foreign_code(folder / "config.json")
    _read_config(folder / "generation_config.json")
    try:
        with _one_load_at_a_time:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                device_map="meta",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise FileFormatError(f"the model does not load ({first_line(error)}): save it again") from error
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
    return type(model).__name__, context_length(model)


def _refuse_foreign_code(path: Path) -> None:
    config = _read_config(path)
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in str(config.get(name)):
            raise FileFormatError(
                f"{path.name} asks for a kernel from the Hub ({name}), which is code: remove that line from it"
            )
    if config.get("auto_map"):
        raise FileFormatError(
            f"{path.name} asks for code of its own (auto_map): a published student must load without trust_remote_code"
        )


def _read_config(path: Path) -> dict[str, Any]:
    """A JSON object of Transformers' own, which may hold numbers that no record of ours does (`model_max_length` 1e30)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path.name} is missing or damaged ({first_line(error)}): save the model again"
        ) from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path.name} must hold a JSON object: save the model again")
    return value
