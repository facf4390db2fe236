"""How a card's template prints: every value escaped, numbers and durations for people.

It knows Markdown and the templates of this folder, no records.
"""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import jinja2

from prune_opd_hf.hub.hub_ids import is_hub_id
from prune_opd_hf.hub.markdown import Markdown, clean_line, code, fence, link, table, to_markdown


def card_environment() -> jinja2.Environment:
    """Where the templates are found and how they print: every value escaped unless it is Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prune_opd_hf.hub"),
        finalize=to_markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # HTML escaping is not enough for Markdown: `finalize` does it
    )
    environment.filters.update(
        code=code,
        count=_count,
        duration=duration,
        figure=_figure,
        link=link,
        percent_of=_percent_of,
        ref=_reference,
        settings_table=_settings_table,
        shell=shell,
    )
    return environment


def shell(command: str) -> Markdown:
    """Commands as a block, one a line."""
    return fence("\n".join(map(clean_line, command.splitlines())), "bash")


def duration(seconds: int | float) -> str:
    """A duration in the largest unit that it fills.

    Example:
        >>> duration(42.0), duration(600.0), duration(18000.0)
        ('42.0 s', '10.0 min', '5.0 h')
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _reference(name: str | None) -> Markdown:
    """A Hub id as a link, any other name as code."""
    if name is not None and is_hub_id(name):
        return Markdown(f"[{code(name)}](https://huggingface.co/{name})")
    return code(name or "unknown")


def _figure(caption: str, path: str) -> Markdown:
    return Markdown(f"![{to_markdown(caption)}]({quote(path)})")


def _settings_table(settings: Mapping[str, Any]) -> Markdown:
    return table(["setting", "value"], [[code(key), code(_plain(value))] for key, value in settings.items()])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _count(value: int | float) -> str:
    return f"{value:,.0f}"


def _percent_of(part: int | float, whole: int | float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"
