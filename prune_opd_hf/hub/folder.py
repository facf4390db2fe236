"""Which files of a student's folder go to the Hub, and in what form: an explicit list, cleaned and searched for leaks."""

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from prune_opd_hf.errors import FileFormatError, LeakError
from prune_opd_hf.hub.card import ModelFacts
from prune_opd_hf.hub.client import is_hub_id, is_local
from prune_opd_hf.hub.leaks import Leak, Machine, find_leaks
from prune_opd_hf.records.evaluation_report import EvaluationReport
from prune_opd_hf.records.training_summary import SUMMARY_FILE, TrainingSummary
from prune_opd_hf.records.weights import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    check_finite,
    stored_tensors,
    weight_files,
)

CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    ADAPTER_CONFIG,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
VOCABULARY_FILES = ("tokenizer.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model")
LICENSE_FILES = ("LICENSE", "LICENSE.*", "NOTICE", "NOTICE.*")
_CODE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"\x1f\x8b", b"\x7fELF")
DOWNLOADED_PATTERNS = (
    *CONFIG_FILES,
    *VOCABULARY_FILES,
    *LICENSE_FILES,
    "*.safetensors",
    INDEX_FILE,
    "README.md",
    "training_summary.json",
    "evaluation/*.json",
    "figures/*.png",
    "figures/*.csv",
    ".eval_results/*.yaml",
)
"""What `download_student` fetches: nothing that could be executed."""
REPLACED_PATTERNS = (
    *CONFIG_FILES,
    *VOCABULARY_FILES,
    "*.safetensors",
    INDEX_FILE,
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
    "training_args.bin",
    "training_summary.json",
    "evaluation/*",
    "figures/*",
    ".eval_results/*",
)
"""Files of an earlier revision that a new one replaces or, where it has no such file, removes: a leftover shard or
tokenizer file would be loaded together with the new ones."""


def student_files(root: Path) -> dict[str, Path | bytes]:
    """The files of the folder that a reader needs; paths of this machine are taken out of the configs."""
    files: dict[str, Path | bytes] = {}
    for pattern in (*CONFIG_FILES, *VOCABULARY_FILES, *LICENSE_FILES):
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                _refuse_disguised(root, path)
                files[path.relative_to(root).as_posix()] = path
    for path in weight_files(root):
        files[path.name] = path
    if weight_files(root)[0].name not in {SINGLE_FILE, ADAPTER_FILE}:
        files[INDEX_FILE] = root / INDEX_FILE
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", ADAPTER_CONFIG):
        if name in files:
            files[name] = _clean_config(root / name)
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
    content = path.read_bytes()
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path.name} is damaged ({error}): save the model again") from error
    origins = [
        key for key in ("_name_or_path", "name_or_path") if not is_hub_id(config.get(key) or None) and key in config
    ]
    if not origins:
        return content
    kept = {key: value for key, value in config.items() if key not in origins}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def refuse_leaks(files: Mapping[str, Path | bytes], machine: Machine, allowed_names: Collection[str]) -> None:
    """Search everything that would be published; images and the values of weights hold no words.

    Raises:
        LeakError: names file, line and kind of the first finds.
    """
    leaks: list[Leak] = []
    for path, content in files.items():
        if path.endswith(".png"):
            continue
        vocabulary = any(fnmatch(path, pattern) for pattern in VOCABULARY_FILES)
        text = _header(content) if path.endswith(".safetensors") else _text(content)
        template = path.endswith(".jinja")
        leaks.extend(
            find_leaks(path, text, machine, allowed_names=allowed_names, vocabulary=vocabulary, template=template)
        )
    if leaks:
        shown = "; ".join(map(str, leaks[:5])) + (f"; and {len(leaks) - 5} more" if len(leaks) > 5 else "")
        raise LeakError(
            f"not for the public: {shown}. Remove it there or in the record it comes from; nothing was uploaded"
        )


def _header(content: Path | bytes) -> str:
    """The readable part of a safetensors file."""
    assert isinstance(content, Path)
    with content.open("rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little")).decode("utf-8", errors="replace")


def _text(content: Path | bytes) -> str:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", errors="replace")


def is_replaced(path: str) -> bool:
    """Whether a file of an earlier revision belongs to the student that a new revision replaces.

    Example:
        >>> is_replaced("model-00002-of-00002.safetensors"), is_replaced("notes/model.safetensors"), is_replaced("notes.md")
        (True, False, False)
    """
    return any(fnmatch(path, pattern) for pattern in REPLACED_PATTERNS if ("/" in pattern) == ("/" in path))


def left_out(root: Path, files: Mapping[str, Path | bytes]) -> tuple[str, ...]:
    """What lies in the folder and stays there: checkpoints, optimizer states, logs, pickles."""
    taken = {path.split("/")[0] for path in files}
    return tuple(path.name + "/" * path.is_dir() for path in sorted(root.iterdir()) if path.name not in taken)


def size_bytes(content: Path | bytes) -> int:
    """Of one file."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def readable_size(size: int) -> str:
    """A number of bytes for people.

    Example:
        >>> readable_size(900), readable_size(3_400_000_000)
        ('900 B', '3.40 GB')
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} B"


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


REPORTS_FOLDER = "evaluation"
COMPARISONS_FOLDER = "evaluation/comparisons"


@dataclass(frozen=True)
class StudentRecords:
    """How a student was trained and how well it does.

    Attributes:
        training: None where no summary came with it.
        reports: of the student itself.
        comparisons: of other models, by the name of their column in the card.
    """

    training: TrainingSummary | None = None
    reports: tuple[EvaluationReport, ...] = ()
    comparisons: Mapping[str, tuple[EvaluationReport, ...]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "StudentRecords":
        """Read the records of a folder, as `files` named them; those that are not there are left empty.

        Raises:
            FileFormatError: a record is damaged or of a version this package does not read.
        """
        root = Path(folder)
        training = TrainingSummary.load(root) if (root / SUMMARY_FILE).is_file() else None
        places = [place for place in sorted((root / COMPARISONS_FOLDER).glob("*")) if place.is_dir()]
        comparisons = {re.sub(r"^[0-9]{2}-", "", place.name): _load_reports(place) for place in places}
        return cls(training, _load_reports(root / REPORTS_FOLDER), comparisons)

    def files(self) -> dict[str, bytes]:
        """The records' content by path in the repository."""
        found: dict[str, bytes] = {}
        if self.training is not None:
            found[SUMMARY_FILE] = self.training.to_json().encode()
        found.update(_report_files(REPORTS_FOLDER, self.reports))
        for number, (column, reports) in enumerate(
            self.comparisons.items()
        ):  # numbered, so that they come back in order
            found.update(_report_files(f"{COMPARISONS_FOLDER}/{number:02d}-{_file_name(column)}", reports))
        return found


def load_reports(paths: Sequence[str | os.PathLike[str]]) -> tuple[EvaluationReport, ...]:
    """Reports from files and from folders of files.

    Raises:
        FileFormatError: a path does not exist, or a file is no report.
    """
    reports: list[EvaluationReport] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileFormatError(f"{path} does not exist: name the JSON file that prune-opd evaluate wrote")
        reports.extend(_load_reports(path) if path.is_dir() else [EvaluationReport.load(path)])
    return tuple(reports)


def _load_reports(place: Path) -> tuple[EvaluationReport, ...]:
    return tuple(EvaluationReport.load(path) for path in sorted(place.glob("*.json")))


def _report_files(place: str, reports: Sequence[EvaluationReport]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for number, report in enumerate(reports):
        benchmarks = "-".join(result.name for result in report.benchmarks)
        found[f"{place}/{number:02d}-{_file_name(benchmarks)}.json"] = report.to_json().encode()
    return found


def _file_name(words: str) -> str:
    """`words` as a file's name, readable and harmless on every system.

    Example:
        >>> _file_name("base student"), _file_name("../a:b"), _file_name("🙂")
        ('base student', 'a b', 'other')
    """
    return re.sub(r"[^A-Za-z0-9_+-]+", " ", words).strip()[:80] or "other"
