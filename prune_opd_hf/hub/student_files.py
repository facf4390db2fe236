"""Which files of a student's folder go to the Hub, and in what form: an explicit list, cleaned and searched for leaks."""

import json
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path

from prune_opd_hf.errors import FileFormatError, LeakError
from prune_opd_hf.hub.hub_ids import is_hub_id
from prune_opd_hf.hub.leaks import Leak, Machine, find_leaks
from prune_opd_hf.records.weights import ADAPTER_CONFIG, ADAPTER_FILE, INDEX_FILE, SINGLE_FILE, weight_files

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
