"""The drift viewer's HTML file: the page's template, styles and scripts, and the rollouts as text that nothing can execute.

Whatever comes from rollouts or a tokenizer goes into the file as base64 and into the page as text nodes, so no token can be
markup. The content security policy allows this one script and this one style, by their hashes, and nothing else: no
request, no frame, no form, no evaluated string.

It knows `encoding.py` and `visible.py`; it knows no tokenizer and no command line.
"""

import base64
import hashlib
import html
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

import prune_opd_hf
from prune_opd_hf.algorithm.drift import STOP_REASONS
from prune_opd_hf.errors import InputError
from prune_opd_hf.records.files import atomic_path
from prune_opd_hf.records.folders import check_folder
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.viewer import encoding, visible

SCRIPTS = ("data.js", "layout.js", "chart.js", "list.js", "inspector.js", "reader.js", "main.js")
"""Files of `page/` in the order in which they become one script."""


def write_drift_view(
    rollouts: Rollouts,
    path: str | os.PathLike,
    *,
    tokenizer: Any = None,
    tokenizer_name: str | None = None,
    source: str = "rollouts",
    candidates: int = 8,
    limit: int | None = None,
    force: bool = False,
) -> Path:
    """Write rollouts as one HTML file to read, filter and search in a browser, without a network.

    Args:
        rollouts: what to show.
        path: the HTML file.
        tokenizer: of Transformers, to show text; None shows token ids.
        tokenizer_name: what to call it on the page and in messages.
        source: what to call the rollouts on the page.
        candidates: how many of each model's top-k to show at each position; overlap is that of all of them.
        limit: take the first so many rollouts only.
        force: replace a file that exists.

    Returns:
        The path. The file is written atomically; the same input gives the same bytes.

    Raises:
        ConfigError, InputError: the file exists or cannot be written, or a number is out of range.
        VocabularyMismatchError: the tokenizer does not have one of the ids.
    """
    path = Path(path)
    check_view(path, candidates=candidates, limit=limit, force=force)
    rows = range(len(rollouts))[:limit]
    if not rows:
        raise InputError("there is nothing to show: the record holds no rollouts")
    candidates = min(candidates, rollouts.config.top_k, rollouts.teacher_topk_ids.shape[-1], encoding.IN_STUDENTS_TAIL)

    agreement, summaries, vocabulary = encoding.agreement_name(rollouts), [], np.zeros(0, dtype=np.int64)
    for index in rows:
        row = encoding.read_row(rollouts, index)
        vocabulary = np.union1d(vocabulary, encoding.used_ids(row, candidates))
        summaries.append({**encoding.summarize(row, agreement), **_teaching(rollouts, index, tokenizer)})
    ids = vocabulary.tolist()
    name = tokenizer_name or "the tokenizer"
    tokens = visible.describe_tokens(ids, tokenizer, name)
    header = {
        "version": prune_opd_hf.__version__,
        "source": visible.visible(source),
        "tokenizer": None if tokenizer is None else visible.visible(name),
        "stops": STOP_REASONS,
        "config": asdict(rollouts.config),
        "budget": rollouts.config.events_to_exhaustion,
        "candidates": candidates,
        "agreement": agreement,
        "student": rollouts.student_topk_ids is not None and rollouts.teacher_log_probs is not None,
        "ids": ids,
        "tokens": [token.text for token in tokens],
        "breaks": {place: token.breaks for place, token in enumerate(tokens) if token.breaks},
        "special": [place for place, token in enumerate(tokens) if token.special],
        "fragments": [place for place, token in enumerate(tokens) if token.fragment],
        "rollouts": summaries,
    }
    top, bottom, after = re.split(r"<!--header-->\n|<!--blocks-->\n", _page(header["source"]))
    packed = json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii")
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines([top, _block("header", zlib.compress(packed, 6)), bottom])
        file.writelines(_blocks(rollouts, rows, vocabulary, candidates))
        file.write(after)
    return path


def check_view(path: Path, *, candidates: int, limit: int | None, force: bool) -> None:
    """Refuse what `write_drift_view` cannot write, before rollouts are read for it."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    check_folder(path.parent)
    if path.exists() and not force:
        raise InputError(f"{path} exists; pass --force to replace it")
    for name, value in (("candidates", candidates), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def _teaching(rollouts: Rollouts, row: int, tokenizer: Any) -> dict[str, str]:
    """The name of a row's teacher and what it read, where that is not the one teacher and the prompt."""
    found = {"taught_by": visible.visible(rollouts.teachers[row])} if rollouts.teachers else {}
    if rollouts.teacher_prompt_ids is not None and rollouts.teacher_prompt_mask is not None:
        ids = rollouts.teacher_prompt_ids[row][rollouts.teacher_prompt_mask[row]].tolist()
        found["read"] = visible.visible(" ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids))
    return found


def _blocks(rollouts: Rollouts, rows: range, vocabulary: Any, candidates: int) -> Iterator[str]:
    for index in rows:
        row = encoding.read_row(rollouts, index)
        yield _block(f"track-{index}", encoding.pack_track(row, vocabulary))
        yield _block(f"candidates-{index}", encoding.pack_candidates(row, vocabulary, candidates))


def _block(name: str, data: bytes) -> str:
    """A data block: browsers neither run it nor ask the policy about it."""
    return f'<script type="application/x-deflate" id="{name}">{base64.b64encode(data).decode("ascii")}</script>\n'


def _page(source: str) -> str:
    style = _file("style.css")
    script = '(() => {\n"use strict";\n' + "\n".join(_file(name) for name in SCRIPTS) + "})();\n"
    assert not re.search(r"</?(script|style|!--)", script + style, re.IGNORECASE), "the page would end its own script"
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    parts = {"title": html.escape(source), "policy": policy, "style": style, "script": script}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match.group(1)], _file("shell.html"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _file(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")
