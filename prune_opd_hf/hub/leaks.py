"""A scan of texts for what must not be published: secrets, and paths, user and host names of this machine.

Every file is searched for secrets by their form and for the values of this machine's secret environment variables. Texts
made by or for this package are also searched for paths, user and host names; a tokenizer's vocabulary is not, since it may
hold any word.
"""

import base64
import contextlib
import getpass
import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from prune_opd_hf.hub.markdown import clean_line
from prune_opd_hf.hub.markdown import text as as_markdown

_SECRET_FORMS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"\bxox[abeprs]-[0-9A-Za-z-]{10,}",
    "a private key": r"-----BEGIN (?:[A-Z ]+ )?PRIVATE KEY-----",
    "a signed token": r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}",
    "a Hugging Face token in base64": r"\baGZf[A-Za-z0-9+/_-]{27,}",
    "a header that authorizes": r"(?i)\bauthorization[\"']?\s*[:=]\s*[\"']?(?:basic|bearer|token)\s+[\w.~+/=-]{8,}",
    "a password in an address": r"[a-z]://[^\s/:@\"']+:[^\s/@\"']+@",
}
_NAMED_SECRET = (
    r"(?i)[\"']?\b\w*(?:api_?key|secret(?:_?key)?|passw(?:or)?d|access_token|auth_token|hub_token|credentials?)[\"']?"
    r"\s*[:=]\s*[\"']?(?!null\b|none\b|true\b|false\b|<)[^\s\"',}]{8,}"
)
_SECRET_VARIABLE = re.compile(
    r"TOKEN(?!I[SZ])|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL|AUTH(?!OR)|COOKIE"
    r"|WEBHOOK|(?:^|_)(?:KEY|PASS|PAT|PWD)$",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 8
_MACHINE_PATH = r"(?<![\w.:/-])/(?:home|Users|root|tmp|mnt|scratch|private|var|workspace)/[\w.@+-]+|\b[A-Za-z]:\\{1,2}Users\\|\bfile://"
_COMMON_NAMES = frozenset(
    "student teacher trainer training train model data worker python torch qwen root user admin ubuntu debian runner docker "
    "jovyan nobody test localhost linux".split()
)
"""User and host names that are words of every card."""


@dataclass(frozen=True)
class Leak:
    """One find: where, and what kind of thing. It never holds the thing itself."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.what}"


@dataclass(frozen=True)
class Machine:
    """What must not be published of this machine.

    Attributes:
        secrets: value by the name of the place it comes from.
        paths: absolute paths.
        names: of users and hosts.
    """

    secrets: Mapping[str, str]
    paths: Collection[str]
    names: Collection[str]

    @classmethod
    def here(cls, folder: str | os.PathLike[str], token: str | None = None) -> "Machine":
        """This process's environment, with the folder that is to be published and the Hub token in use."""
        secrets = {
            f"the environment variable {name}": value.strip()
            for name, value in os.environ.items()
            if _SECRET_VARIABLE.search(name)
            and len(value.strip()) >= _SHORTEST_SECRET
            and not Path(value.strip()).is_absolute()
        }
        if token:
            secrets["the Hub token in use"] = token
        places = [Path.home(), Path(sys.prefix), Path(tempfile.gettempdir()), Path.cwd(), Path(folder).resolve()]
        paths = {str(place) for place in places if len(place.parts) > 1}
        names = {socket.gethostname()}
        with contextlib.suppress(OSError, KeyError, ImportError):
            names.add(getpass.getuser())
        return cls(secrets, paths, {name for name in names if len(name) >= 4 and name.lower() not in _COMMON_NAMES})


def find_leaks(
    file: str,
    text: str,
    machine: Machine,
    *,
    allowed_names: Collection[str] = (),
    vocabulary: bool = False,
    template: bool = False,
) -> Iterator[Leak]:
    """Every leak in one text.

    Args:
        file: what to call it.
        machine: what must not appear.
        allowed_names: namespaces on the Hub; a user may have the same name here and there.
        vocabulary: whether the text may rightly hold any word; then only secrets are looked for.
        template: whether the text may rightly speak of paths, as a chat template that tells a model where its tools keep
            files; then only paths of this machine are looked for.
    """
    for place, value in machine.secrets.items():
        yield from _at(file, text, "|".join(map(re.escape, _spellings(value))), f"the value of {place}")
    for what, form in _SECRET_FORMS.items():
        yield from _at(file, text, form, f"what looks like {what}")
    if vocabulary:
        return
    yield from _at(file, text, _NAMED_SECRET, "a setting that is named like a secret and has a value")
    paths = [rf"(?<![\w.]){re.escape(path)}(?![\w])" for path in machine.paths]
    if not template:
        paths.append(_MACHINE_PATH)
    if paths:
        yield from _at(file, text, "|".join(paths), "a path of this machine")
    for name in machine.names:
        if name not in allowed_names:
            yield from _at(file, text, rf"(?<![\w-]){re.escape(name)}(?![\w-])", "the name of this machine or its user")


def _spellings(value: str) -> list[str]:
    """A value as it is, and as JSON, Python, one line of text, Markdown, addresses and base64 write it; longer ones first."""
    written = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]}
    written |= {clean_line(value), str(as_markdown(value)), quote(value, safe="")}
    encoded = base64.b64encode(value.encode()).decode().rstrip("=")
    written |= {encoded, encoded.translate(str.maketrans("+/", "-_"))}
    return sorted(filter(None, written), key=len, reverse=True)


def _at(file: str, text: str, pattern: str, what: str) -> Iterator[Leak]:
    """At most one find of a kind in a line."""
    lines = dict.fromkeys(text.count("\n", 0, found.start()) + 1 for found in re.finditer(pattern, text))
    for line in lines:
        yield Leak(file, line, what)
