r"""Where the answer stands in a response.

1. The last `\boxed{}` alone is judged: what stands before, after and in earlier boxes does not count, and a last box that is
   empty or was cut off is no answer. Boxes inside a box belong to it.
2. A response without any box may state its answer: "the answer is ...". The last such statement counts.
3. A response that is nothing but one expression is its answer.

Otherwise there is none: a number somewhere in the text is not an answer. The work is linear in the length of the response.
"""

import re

MAX_ANSWER_CHARACTERS = 2000
"""A longer answer is none. The longest gold answer of the registered benchmarks has about 100 characters; a sum of 400 terms
has about 1,500."""

_BOX_OPENS = r"\\(?:boxed|fbox)\s*\{"
_TOKEN = re.compile(rf"(?P<box>{_BOX_OPENS})|\\.|[{{}}]", re.DOTALL)
_STATEMENT = re.compile(
    r"\banswer(?:\s+(?:to|of|for)\b[^.:$\n]{1,80}?)?\**\s{0,9}(?:is|are|=|:)(?![A-Za-z])\s{0,9}:?[\s*]{0,9}",
    re.IGNORECASE,
)
_DELIMITED = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|\*\*(.+?)\*\*", re.DOTALL)
_SENTENCE_ENDS = re.compile(r"[.?](?=\s|$)|\n")
_PROSE = re.compile(r"[A-Za-z]{2,}[,;:]?\s+[A-Za-z]{2,}")
_TEXT_COMMAND = re.compile(r"\\(?:text|mbox|math)[a-z]*\s*\{[^{}]*\}")


def extract_answer(response: str) -> str | None:
    r"""The answer as it was written, or None where there is none."""
    if re.search(_BOX_OPENS, response):
        answer = _last_box(response)
    else:
        answer = _last_statement(response)
        if answer is None:
            answer = _lone_expression(response)
    if answer is None or not answer.strip() or len(answer) > MAX_ANSWER_CHARACTERS:
        return None
    return answer.strip()


def _last_box(response: str) -> str | None:
    open_braces: list[tuple[int, bool]] = []  # (start of the content, whether it opens a box)
    closed: list[tuple[int, int]] = []
    for token in _TOKEN.finditer(response):
        if token["box"]:
            open_braces.append((token.end(), True))
        elif token[0] == "{":
            open_braces.append((token.end(), False))
        elif token[0] == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box:
                while closed and closed[-1][0] > start:
                    closed.pop()
                closed.append((start, token.start()))
    start, end = closed[-1] if closed else (-1, -1)
    cut_off = any(is_box and opened > end for opened, is_box in open_braces)
    return None if cut_off or not closed else response[start:end]


def _last_statement(response: str) -> str | None:
    statements = list(_STATEMENT.finditer(response))
    if not statements:
        return None
    statement = statements[-1]
    rest = response[statement.end() : statement.end() + 2 * MAX_ANSWER_CHARACTERS]
    delimited = _DELIMITED.match(rest)
    if delimited:
        return next(group for group in delimited.groups() if group is not None)
    sentence_end = _SENTENCE_ENDS.search(rest)
    return rest[: sentence_end.start()] if sentence_end else rest


def _lone_expression(response: str) -> str | None:
    text = response.strip()
    if len(text) > MAX_ANSWER_CHARACTERS or "\n" in text or _PROSE.search(_TEXT_COMMAND.sub(" ", text)):
        return None
    return text
