r"""Where the answer stands in a response.

1. What a model thinks is no answer: only what stands behind the last `</think>` counts, and a thought that never ends has none.
   The tags are those of `THOUGHT_TAGS`.
2. The last `\boxed{}` alone is judged: what stands before, after and in earlier boxes does not count, and a last box that is
   empty or was cut off is no answer. Boxes inside a box belong to it. `\fbox{}` and `\framebox{}` are boxes as well, and so is
   `\boxed 5`, where a number, a fraction, a root, a text or a capital letter follows: it ends at the next blank or dollar sign.
   `\boxed{1}, \boxed{2} and \boxed{3}` are one answer, the list of them, as math-verify reads it.
3. Where a response has an `<answer>` block, its last one alone is read, by the other rules.
4. A response without any box may state its answer: "the answer is ...", or a line `#### 42` as in GSM8K. The last such statement
   counts.
5. A response that is nothing but one expression is its answer.

Markdown's marks around an answer (`**73**`) are no part of it. A gold may be a whole solution: see `final_answer`.

Otherwise there is none: a number somewhere in the text is not an answer. The work is linear in the length of the response.
"""

import re

MAX_ANSWER_CHARACTERS = 2000
"""A longer answer is none. The longest gold answer of the registered benchmarks has about 100 characters; a sum of 400 terms
has about 1,500."""

THOUGHT_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
)
"""What opens and closes a thought: Qwen3, DeepSeek-R1 and most others; EXAONE Deep; Magistral."""

_BOX = r"\\(?:boxed|fbox|framebox)(?![A-Za-z])"
_BOX_OPENS = _BOX + r"\s*(?:\[[^\[\]{}]{0,20}\]){0,2}\s*\{"  # \framebox[3cm][c]{
_BARE_BOX = _BOX + r"\s{0,9}(?=[+-]?\.?\d|\\(?:[dtc]?frac|sqrt|text|math|pi)|[A-Z](?![A-Za-z]))"
_ANY_BOX = re.compile(rf"{_BOX_OPENS}|{_BARE_BOX}")
_BARE_CONTENT = re.compile(r"(?:[^\s${}\\]|\{(?:[^{}]|\{[^{}]*\})*\}|\\[A-Za-z]+|\\[^)\]])+")
_WITHOUT_BRACES = -1
_BLANKS = r"(?:[\s$~]|\\q?quad(?![A-Za-z])|\\[,;: ])*"
_WORD = r"(?:\\text\s*\{\s*)?(?:and|or)\b(?:\s*\})?"
_AND = rf"{_BLANKS}(?:[,;](?:{_BLANKS}{_WORD})?|{_WORD}){_BLANKS}(?:[A-Za-z]\w?\s*=\s*)?"
_ONE_BOX = r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
_LISTED_BOXES = re.compile(rf"{_ONE_BOX}(?:{_AND}{_ONE_BOX})+")
_TOKEN = re.compile(rf"(?P<box>{_BOX_OPENS})|(?P<bare>{_BARE_BOX})|\\(?!{_BOX}).|[{{}}]", re.DOTALL)
_STATEMENT = re.compile(
    r"\banswer(?:\s+(?:to|of|for)\b[^.:$\n]{1,80}?)?\**\s{0,9}(?:is|are|=|:)(?![A-Za-z])\s{0,9}:?(?:\*{0,2}\s){0,9}"
    r"|^#### {0,9}(?=[-+$]{0,2}[\d.,/]{1,40}%?\s*$)",
    re.IGNORECASE | re.MULTILINE,
)
_GSM8K = "####"
_MARKDOWN = "*_`"
_DELIMITED = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|\*\*(.+?)\*\*", re.DOTALL)
_SENTENCE_ENDS = re.compile(r"[.?](?=\s|$)|\n")
_PROSE = re.compile(r"[A-Za-z]{2,}[,;:]?\s+[A-Za-z]{2,}")
_TEXT_COMMAND = re.compile(r"\\(?:text|mbox|math)[a-z]*\s*\{[^{}]*\}")


def extract_answer(response: str) -> str | None:
    r"""The answer as it was written, or None where there is none.

    Example:
        >>> extract_answer(r"<think>\boxed{4}? No.</think> It is \boxed{5}."), extract_answer(r"<think>It is \boxed{4}")
        ('5', None)
    """
    if is_thinking(response):
        return None
    for _, closing in THOUGHT_TAGS:
        response = response.rpartition(closing)[2]
    marked = response.rpartition("</answer>")[0].rpartition("<answer>")
    if marked[1] and marked[2].strip():
        response = marked[2]
    if _ANY_BOX.search(response):
        answer = _last_box(response)
    else:
        answer = _last_statement(response)
        if answer is None:
            answer = _lone_expression(response)
        answer = answer and answer.strip().strip(_MARKDOWN)
    if answer is None or not answer.strip() or len(answer) > MAX_ANSWER_CHARACTERS:
        return None
    return answer.strip()


def final_answer(gold: str) -> str:
    r"""The answer of a gold that may be a whole solution: behind its last `####` (GSM8K), else in its last box (MATH).

    Example:
        >>> final_answer("48 / 2 = 24 in May.\n#### 72"), final_answer(r"$\boxed{2}$ or $\boxed{3}$."), final_answer("x = 2")
        ('72', '2, 3', 'x = 2')
    """
    if _GSM8K in gold:
        return gold.rpartition(_GSM8K)[2].strip() or gold
    return (_last_box(gold) or gold) if _ANY_BOX.search(gold) else gold


def is_thinking(text: str) -> bool:
    """Whether a thought is open at the end of a text."""
    return any(text.rfind(opening) > text.rfind(closing) for opening, closing in THOUGHT_TAGS)


def thought_opened_by(prompt: str) -> str:
    """The tag with which a prompt ends where its template opens a thought, so that the response begins inside of it; else ""."""
    return next((opening for opening, _ in THOUGHT_TAGS if prompt.rstrip().endswith(opening)), "")


def _last_box(response: str) -> str | None:
    response = _LISTED_BOXES.sub(lambda boxes: rf"\boxed{{{', '.join(re.findall(_ONE_BOX, boxes[0]))}}}", response)
    open_braces: list[tuple[int, bool]] = []  # (start of the content, whether it opens a box)
    closed: list[tuple[int, int]] = []  # (start and end of the content; the end of a box without braces is found last)
    for token in _TOKEN.finditer(response):
        if token["box"]:
            open_braces.append((token.end(), True))
        elif token["bare"]:
            closed.append((token.end(), _WITHOUT_BRACES))
        elif token[0] == "{":
            open_braces.append((token.end(), False))
        elif token[0] == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box:
                while closed and closed[-1][0] > start:
                    closed.pop()
                closed.append((start, token.start()))
    start, end = closed[-1] if closed else (-1, -1)
    if not closed or any(is_box and opened > start for opened, is_box in open_braces):
        return None  # none, or the last one was cut off
    if end == _WITHOUT_BRACES:
        content = _BARE_CONTENT.match(response, start, start + 2 * MAX_ANSWER_CHARACTERS)
        return content and content[0]
    return response[start:end]


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
