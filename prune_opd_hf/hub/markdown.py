"""Markdown from untrusted words: names, settings and answers appear as they are and do nothing else.

Every value that a template prints goes through `text` unless it is `Markdown` already, so that forgetting to escape is
not possible. The dialect is the Hub's: CommonMark with GitHub's tables and automatic links.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

_BIDI = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
_INLINE = re.compile(r"([\\`*_\[\]~$@])")
_BLOCK = re.compile(r"^(?:([#+=-])|(\d+)([.)])(?=\s|$))")


class Markdown(str):
    """Text that is Markdown already; everything else is escaped when a template prints it."""


def to_markdown(value: Any) -> Markdown:
    """`value` as Markdown: unchanged if it is Markdown, nothing for None, else escaped."""
    if isinstance(value, Markdown):
        return value
    return Markdown("") if value is None else text(str(value))


def clean_line(value: str) -> str:
    """`value` on one line, without control characters, reordering marks and characters that no file format takes."""
    words = " ".join(value.split())
    kept = (
        character
        for character in words
        if character not in _BIDI and unicodedata.category(character) not in {"Cc", "Cs", "Co", "Cn"}
    )
    return "".join(kept).strip()


def text(value: str) -> Markdown:
    """Plain words: no emphasis, no link, no HTML, no new line, and safe inside a table."""
    line = clean_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _INLINE.sub(r"\\\1", line)
    line = line.replace("|", "&#124;").replace("://", r":\//").replace("www.", r"www\.")
    line = _BLOCK.sub(lambda found: rf"\{found[1]}" if found[1] else rf"{found[2]}\{found[3]}", line)
    return Markdown(line)


def code(value: Any) -> Markdown:
    """A code span, safe inside a table."""
    line = clean_line(str(value))
    if not line or "|" in line:
        return Markdown(f"<code>{text(line)}</code>")
    ticks = "`" * (_longest_run_of_ticks(line) + 1)
    pad = " " if line[0] in "` " or line[-1] in "` " or len(ticks) > 1 else ""
    return Markdown(f"{ticks}{pad}{line}{pad}{ticks}")


def fence(value: str, language: str = "") -> Markdown:
    """A block of code that nothing inside can close."""
    ticks = "`" * max(3, _longest_run_of_ticks(value) + 1)
    return Markdown(f"{ticks}{language}\n{value.rstrip()}\n{ticks}")


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Markdown:
    """A table; cells that are not Markdown are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(to_markdown(cell)) if row is not lines[1] else cell for cell in row] for row in lines]
    return Markdown("\n".join("| " + " | ".join(row) + " |" for row in cells))


def link(label: Any, url: str) -> Markdown:
    """A link to a web address; any other address stays plain words."""
    address = clean_line(url).replace(" ", "%20")
    if not re.match(r"https?://", address) or any(character in address for character in "<>\\\"'`"):
        return Markdown(f"{to_markdown(label)} ({text(url)})")
    return Markdown(f"[{to_markdown(label)}](<{address}>)")


def shell(commands: str) -> Markdown:
    """Commands as a block, one a line."""
    return fence("\n".join(map(clean_line, commands.splitlines())), "bash")


def _longest_run_of_ticks(value: str) -> int:
    return max((len(run) for run in re.findall("`+", value)), default=0)
