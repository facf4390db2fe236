r"""Rewriting an answer to LaTeX that math-verify reads rightly, and reading what needs no computer algebra.

Each rule corrects one misreading of math-verify 0.9, shown beside it. Rules run in the order below.
"""

import hashlib
import re
from collections.abc import Callable
from fractions import Fraction

_SYMBOLS = r"""
    °:^\circ º:^\circ π:\pi ∞:\infty ×:\times ·:\cdot ⋅:\cdot ±:\pm ∓:\mp
    ≤:\le ≥:\ge ≠:\ne ≈:\approx ∪:\cup ∈:\in ∅:\emptyset
"""
_CHARACTERS = {
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # fullwidth forms
    **dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\u2014\ufe63"), "-"),
    **dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x3000], " "),
    **dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u200e\u200f€£¥₹"), ""),
    **{ord(pair[0]): f"{pair[2:]} " for pair in _SYMBOLS.split()},
    **{
        ord(pair[0]): pair[2:]
        for pair in r"÷:/ ∕:/ 。:. ½:\frac{1}{2} ⅓:\frac{1}{3} ⅔:\frac{2}{3} ¼:\frac{1}{4} ¾:\frac{3}{4}".split()
    },
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_NUMBER_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_NOT_A_UNIT = re.compile(
    r"\b(?:or|and|not|more|less|than|at|least|most|if|for|where|when|with|except|only|plus|minus|times|mod|modulo|pi|sqrt|"
    r"sin|cos|tan|cot|sec|csc|log|ln|exp|inf|infty|infinity|percent|pct|percentage|i|e|factorial|choose|over|"
    r"(?<![a-z]{2} )(?<!\bm )(?:squared|cubed)|"  # cm squared and m squared are units, x squared is none
    r"dozens?|scores?|gross|hundreds?|thousands?|[mbtr]+illions?|lakhs?|crores?|double|twice|half|halves|thirds?|quarters?|"
    r"fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?|thousandths?|millionths?|wrong|incorrect|false)\b",
    re.IGNORECASE,
)
_GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_ROW_END = "\ue000"  # stands for the \\ of a matrix, which a blank behind it would make a blank
_ROW_SPACE = r"\[\s*-?(?:[\d.]+\s*[a-z]{2}|[\d.]*\\[A-Za-z]*skip)\s*\]"  # \\[3pt]; other brackets there are an entry
_BARE_ARGUMENT = r"(\d|(?<![A-Za-z])[A-Za-z]|\\(?!frac|sqrt|text|math|[dt]?binom)[A-Za-z]+)"
_TRAILING_TEXT_UNIT = re.compile(
    r"(?P<number>.*(?:[\d})\]%]|\\circ))[\s~]*\\(?:text|mbox|mathrm|textrm|textnormal|textit|mathit|textbf|operatorname)\s*"
    r"\{(?P<unit>[A-Za-z .,/%'-]*)\}(?:\^\{?[23]\}?)?"
)
_SHORT_UNITS = "cm|mm|km|dm|in|ft|yd|mi|kg|mg|lb|lbs|oz|ml|sec|min|hr|hrs|day|deg|mph|kmh|USD|sq"
_TRAILING_WORD_UNIT = re.compile(
    rf"(?P<number>.*(?:[\d}})\]%]|\\circ))(?:\s*(?:{_SHORT_UNITS})\b|\s+[A-Za-z]{{4,}})(?P<unit>(?:[ .]+[A-Za-z]{{2,}})*)"
    r"(?:\^\{?[23]\}?)?"
)
_TEXT_WITH_UNIT = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf)\s*\{\s*(?P<content>[+-]?\d[^{}]*)\}")
_PERCENT = re.compile(
    r"(?:\s|~|\\[,;:! ])*(?:\\?%|\\(?:text|mbox|mathrm|textrm)\s*\{\s*(?:\\?%|per ?cent(?:age points?)?|pct)\s*\}|"
    r"\b(?:per ?cent(?:age points?)?|pct))$"
)
_OPTION_LEAD = re.compile(
    r"\s*(?:(?P<font>\\(?:text|math)[a-z]*\s*\{)\s*\(?(?P<quoted>[A-Ja-j])[).:](?:\s*(?P<closes>\})|\s+|(?<=\)))|"
    r"(?P<letter>[A-Ja-j])\)|\((?P<bracketed>[A-J])\)(?=[\s~]|\\[,;:! ])|(?P<pointed>[A-J])[.:](?=[\s~]|\\[,;:! ]))"
    r"(?:\s|~|:|\\[,;:! ])*(?=[^\s}])(?![+=<>*/^_&|]|-(?!\d)|"
    r"\\(?:c[ua]p|setminus|times|cdot|in|notin|subset\w*|[lg]eq?|neq?|to)(?![A-Za-z]))"
)

_LETTER = re.compile(
    r"\\(?:text|math|mbox|operatorname)[a-z]*\s*\{[^{}]{2,}\}|\\mathbb\s*\{.\}|\\[A-Za-z]+|(?P<letter>[A-Za-z])"
)

_PLUS_MINUS = re.compile(r"\\(?:(?P<upper_plus>pm)|mp)(?![A-Za-z])\s*")
_RULE_LINES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"\s+", " "),
    # 10,\!080\pi and 10,\! 080\pi are the set {10, 80 pi}, and \! keeps a unit from its number
    (r"\\!(?: (?=\d))?", ""),
    # 2**10 and 2^10 are powers, and **5** is bold
    (r"^ ?\*\*(?=[^* ])((?:[^*]|\*(?!\*))+)\*\*", r"\1 "),
    (r"(?<=[\w)\]}])(?:\*\*| \*\* )(?=[\w({\\+-])", "^"),
    (r"\^([+-]?\d+\.\d+|[+-]?\d{2,}|[+-]\d)", r"^{\1}"),
    # delimiters and emphasis inside the box: \boxed{$5$}, \boxed{\(5\)}, \boxed{**5**}
    (r"\\\$|\$|\\[()]|\\\[|(?<!\\)\\\]|\*\*", " "),
    # font and layout commands without meaning
    (
        r"\\(?:displaystyle|textstyle|scriptstyle|bf|rm|it|tt|sf|limits|nolimits|bigl?|bigr|Bigl?|Bigr|large|Large|LARGE|huge|Huge)(?![A-Za-z])",
        " ",
    ),
    (r"\\(?:left|right)(?=[\s()\[\]|.]|\\[{}|])\s*\.?", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:lbrace|rbrace)(?![A-Za-z])", lambda m: r"\{" if "l" in m[0] else r"\}"),
    (r"\\(?:langle|rangle)(?![A-Za-z])", lambda m: "(" if m[0][1] == "l" else ")"),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"\\(?:q?quad|enspace|thinspace|hfill)(?![A-Za-z])|\\hspace\{[^{}]*\}", " "),
    # 13^{} and 13_{} do not parse
    (r"[\^_]\s*\{\s*\}", ""),
    # every spelling of degrees is ^\circ
    (r"\\degrees?(?![A-Za-z])|\\text\s*\{\s*\^\\circ\s*\}", r"^\\circ "),
    (r"\^\s*\{\s*(?:\^\s*)?\\circ\s*\}|(?<!\^)\\circ(?=\s*$)", r"^\\circ "),
    (
        r"(?<=\d)\s*\^\s*(?:\{\s*)?\\(?:text|mathrm)\s*\{\s*o\s*\}(?:\s*\})?|(?<=\d)\s*\^\s*\{?o\}?(?=\s*$)",
        r"^\\circ ",
    ),
    (r"\^\s*\^\s*\\circ", r"^\\circ "),
    # \mathrm{i} is read as a unit
    (r"\\(?:text|mathrm|textrm|mathit|mathbf)\s*\{\s*([ie])\s*\}", r"{\1}"),
    # \frac12, \frac 1 2, \frac\pi2 and \frac{\sqrt{3}}2, before blanks between digits are judged
    (rf"(\\(?:frac|[dt]?binom))\s*{_BARE_ARGUMENT}", r"\1{\2}"),
    (rf"(\\(?:frac|[dt]?binom)\s*{_GROUP})\s*{_BARE_ARGUMENT}", r"\1{\2}"),
    # 1 7/17 is the mixed number
    (r"(?<![\d./^_{}\\A-Za-z])(\d+)\s+(\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    # a repeating decimal is written with a bar, a line or a dot
    (r"(?<=[\d.])\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", r"\\overline{\1\2\3}"),
    (r"(?<=[\d.])\\(?:bar|dot)\s*(?:\{(\d+)\}|(\d))", r"\\overline{\1\2}"),
    # numerals of a base in brackets, (101)_2
    (r"^\s*\((\d+)\)(?=_)", r"\1"),
    # √5, √(5) and √\pi
    (r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}"),
    (r"√", r"\\sqrt "),
    # \sqrt3, \sqrt\pi, \sqrt\frac{1}{2}, sqrt(3), \sqrt(3), x^(2)
    (rf"(\\sqrt\s*(?:\[[^\[\]]*\])?)\s*{_BARE_ARGUMENT}", r"\1{\2}"),
    (rf"\\sqrt\s*(\\frac\s*{_GROUP}\s*{_GROUP})", r"\\sqrt{\1}"),
    (r"(?:\\|(?<![\\A-Za-z]))sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    # 1e3
    (r"(?<![\w.\\])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])", r"\1\\times 10^{\2}"),
    # the degrees of \cos 60^\circ are radians to math-verify
    (
        r"\\(sin|cos|tan|cot|sec|csc)\s*(?:\(\s*|\{\s*)?(\d+(?:\.\d+)?)\s*\^\\circ\s*[)}]?",
        r"\\\1(\\frac{\2\\pi}{180})",
    ),
    # a cube root of a negative number is the real one
    (r"\\sqrt\s*\[\s*([3579])\s*\]\s*\{\s*-\s*(\d+)\s*\}", r"(-\\sqrt[\1]{\2})"),
)
_RULES = tuple((re.compile(pattern), replacement) for pattern, replacement in _RULE_LINES)
_THOUSANDS = (
    re.compile(r"(?<![\d.\w^_])(?<!\d,)([1-9]\d{0,2}(?: ?(?:\{,\}|\\[,;: ]|~) ?\d{3})+)(?!\d)"),
    re.compile(r"(?<![\d.\w^_])(?<!\d,)(?<!\d )([1-9]\d{0,2}(?: \d{3})+)(?!\d| \d)"),
    re.compile(r"(?<![\d.\w^_])(?<!\d,)([1-9]\d{0,2}(?:,\d{3})+)(?!\d|,\d)"),
)


def rewrite(answer: str) -> str:
    r"""The answer as LaTeX that math-verify reads rightly.

    Example:
        >>> rewrite(r"$1\,234$ apples."), rewrite("336°"), rewrite(r"\text{Answer: } \textcolor{red}{\dfrac12}")
        ('1234', '336^\\circ', '\\frac{1}{2}')
        >>> rewrite(r"0, \pm i\sqrt{6}")
        '0, +i\\sqrt{6}, -i\\sqrt{6}'
    """
    text = "".join(character for character in answer if character.isprintable() or character.isspace())
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    if re.search(r"(?<!\\)\\begin", text):
        text = re.sub(rf"\s*\\\\(?:\s*{_ROW_SPACE})?\s*", _ROW_END, text)
    text = re.sub(r"(?<!\\)\\\\(?=[A-Za-z])", r"\\", text)  # doubled backslashes of escaped text
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _unwrap(_strip_lead(text))
    text = _strip_end(_join_thousands(text))
    text = re.sub(r"(?:\\[,;:> ]|~)+", " ", text)
    text = _strip_unit(text)
    text = re.sub(
        r"_\{?\s*\\text\s*\{\s*([a-z]+)\s*\}\s*\}?", lambda word: f"_{{{_NUMBER_WORDS.get(word[1], word[1])}}}", text
    )
    return _expand_plus_minus(_strip_end(text)).replace(_ROW_END, r"\\")


def _unwrap(text: str) -> str:
    r"""\boxed{5}, \textcolor{red}{5}, \underline{5} and \mathbf{5} do not parse or parse as text: keep the content."""
    text = re.sub(r"\\(?:textcolor|color)\s*\{[^{}]*\}", "", text)
    wrapper = re.compile(
        r"\\(?:boxed|fbox|underline|mathbf|mathtt|boldsymbol|bm|mathsf|emph|ensuremath|mathop)\s*(" + _GROUP + ")"
    )
    number = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|textit|texttt)\s*\{\s*([+-]?[\d,. ]*\d)\s*\}")
    for _ in range(4):  # wrappers nest, but not deeply
        unwrapped = number.sub(r"\1", wrapper.sub(r"\1", text)).strip()
        if re.fullmatch(_GROUP, unwrapped) and not re.search(r"\\(?:over|choose)(?![A-Za-z])", unwrapped):
            unwrapped = unwrapped[1:-1]
        if unwrapped == text:
            break
        text = unwrapped
    return text


def _strip_lead(text: str) -> str:
    r""" "\text{Answer: } 204" and "\textbf{(C)} 5" are products to math-verify."""
    said = r"(?:\b(?:is|are|be|equals|answer)|[:=])\s*"
    text = re.sub(rf"^\s*\\text[a-z]*\s*\{{[^{{}}]*{said}\}}\s*(?=\S)", "", text, flags=re.I)
    text = re.sub(r"^\s*(?:the\s+)?(?:final\s+)?answer\s*(?:is|:|=)\s*", "", text, flags=re.I)
    about = r"(?:about|approximately|approx\.?|roughly)"
    text = re.sub(rf"^\s*(?:\\text[a-z]*\s*\{{\s*{about}\s*\}}|{about}\s)\s*(?=[\d\\.-])", "", text, flags=re.I)
    return split_option(text)[1]


def split_option(text: str) -> tuple[str | None, str]:
    r"""The letter of an option that stands before its value, and the rest; no letter where none does.

    Example:
        >>> split_option("A) 5"), split_option(r"\textbf{(C)}\ 204"), split_option(r"\text{(B) Evelyn}"), split_option("(C)")
        (('A', '5'), ('C', '204'), ('B', '\\text{Evelyn}'), (None, '(C)'))
    """
    lead = _OPTION_LEAD.match(text)
    if lead is None:
        return None, text
    letter = lead["quoted"] or lead["letter"] or lead["bracketed"] or lead["pointed"]
    return letter.upper(), (lead["font"] if lead["font"] and not lead["closes"] else "") + text[lead.end() :]


def _strip_end(text: str) -> str:
    return re.sub(r"(?:[\s.,;:?~]|\\[,;:! ]|(?<=\d)\\\\|\\(?=[\s.]*$))+$", "", text).strip()


def _strip_unit(text: str) -> str:
    r"""A unit after the number, as \text{...} or as words: math-verify also takes the letters of "5d" and "5\text{ or 6}"."""
    quoted = _TEXT_WITH_UNIT.fullmatch(text)
    if quoted and read_literal(number := _strip_unit(quoted["content"].strip())) is not None:
        return number
    match = _TRAILING_TEXT_UNIT.fullmatch(text) or _TRAILING_WORD_UNIT.fullmatch(text)
    if match and r"\text" not in match["number"] and not _NOT_A_UNIT.search(text[match.end("number") :]):
        return match["number"].strip()
    return text


def without_percent(text: str) -> str | None:
    r"""The numbers of a rewritten answer without their percent signs, or words for them; None where one has none.

    Example:
        >>> without_percent(r"12.5\%"), without_percent(r"5 \text{ percent}, 7%"), without_percent("5%, 7")
        ('12.5', '5, 7', None)
    """
    elements = [element.strip() for element in split_at_top_level(text)]
    signs = [_PERCENT.search(each) for each in elements]
    if not all(sign is not None and sign.start() for sign in signs):
        return None
    return ", ".join(each[: sign.start()] for each, sign in zip(elements, signs, strict=True) if sign)


def _join_thousands(text: str) -> str:
    r"""1\,234 and 1 234 are the sum 235 to math-verify. A comma separates elements inside brackets: (100,200)."""
    grouped, blank, comma = _THOUSANDS
    patterns = [grouped, blank] if re.search(r"[(\[]|\\\{", text) else [grouped, blank, comma]
    for pattern in patterns:
        text = pattern.sub(lambda match: re.sub(r"\D", "", match[1]), text)
    return text


def _expand_plus_minus(text: str) -> str:
    r"""A ± inside a fraction does not parse: write both values out. All signs of one element are taken together."""
    if not _PLUS_MINUS.search(text):
        return text
    if braced := re.fullmatch(r"((?:[^{}]*(?:=|\\in))?\s*\\\{)(.*)\\\}", text):
        return rf"{braced[1]}{_expand_plus_minus(braced[2])}\}}"
    elements = []
    for element in split_at_top_level(text):
        elements.append(_PLUS_MINUS.sub(lambda sign: "+" if sign["upper_plus"] else "-", element))
        if _PLUS_MINUS.search(element):
            elements.append(_PLUS_MINUS.sub(lambda sign: "-" if sign["upper_plus"] else "+", element))
    return ", ".join(element.strip() for element in elements)


def distinguish_cases(*texts: str) -> list[str]:
    r"""The texts with capitals replaced by letters that none of them has, where one is also there as a small letter."""
    letters = {match["letter"] for text in texts for match in _LETTER.finditer(text)} - {None}
    both = sorted(letter for letter in letters if letter.isupper() and letter.lower() in letters and letter not in "EI")
    free = [letter for letter in "qjkvwuzyxtsrponmlhgcba" if letter not in letters and letter.upper() not in letters]
    stand_ins = dict(zip(both, free, strict=False))
    return [_LETTER.sub(lambda match: stand_ins.get(match["letter"], match[0]), text) for text in texts]


def split_at_top_level(text: str, separators: str = ",;") -> list[str]:
    r"""Split at separators that stand in no bracket, and at "or" and "and", with or without \text."""
    parts, depth, start = [], 0, 0
    words = r"(?P<word>\\text\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))"
    for token in re.finditer(words + r"|\\[{}]|\\.|[(\[{)\]},;=]", text, re.DOTALL):
        if token[0] in ("(", "[", "{", r"\{"):
            depth += 1
        elif token[0] in (")", "]", "}", r"\}"):
            depth -= 1
        elif depth == 0 and (token[0] in separators or token["word"]):
            parts.append(text[start : token.start()])
            start = token.end()
    return [*parts, text[start:]]


# Literals: integers, decimals, fractions, mixed numbers, sums of numbers, numerals of a base. Exact and cheap: most golds of
# competition benchmarks are integers.
_INTEGER = r"\d{1,2000}"
_DECIMAL = re.compile(rf"([+-]?)({_INTEGER}\.?\d{{0,2000}}|\.{_INTEGER})")
_RATIO = re.compile(rf"([+-]?)\\frac\{{([+-]?{_INTEGER})\}}\{{([+-]?{_INTEGER})\}}")
_SLASH = re.compile(rf"([+-]?)({_INTEGER})/({_INTEGER})")
_MIXED = re.compile(rf"([+-]?)({_INTEGER})\\frac\{{({_INTEGER})\}}\{{({_INTEGER})\}}")
_PERIODIC = re.compile(rf"([+-]?)({_INTEGER})\.(\d{{0,2000}})\\overline\{{({_INTEGER})\}}")
_SUM = re.compile(r"[+-]?\d+(?:\.\d+)?(?:[+-]\d+(?:\.\d+)?)+")
_TERM = re.compile(r"[+-]?[\d.]+")
_BASED = re.compile(r"([0-9A-Z]{1,2000})_\{?(\d{1,2})\}?")

MAX_CANONICAL_CHARACTERS = 100


def read_literal(text: str) -> Fraction | None:
    r"""The exact value of a rewritten answer without blanks, or None if it is not a literal.

    Example:
        >>> read_literal("142.0"), read_literal(r"-\frac{13}{96}"), read_literal(r"1\frac{7}{17}")
        (Fraction(142, 1), Fraction(-13, 96), Fraction(24, 17))
        >>> read_literal("1+2+3"), read_literal("x+1")
        (Fraction(6, 1), None)
    """
    try:
        if match := _DECIMAL.fullmatch(text):
            return _signed(match[1], Fraction(match[2]))
        if _SUM.fullmatch(text):  # math-verify needs seconds for 400 terms
            return sum(map(Fraction, _TERM.findall(text)), Fraction(0))
        if match := _RATIO.fullmatch(text) or _SLASH.fullmatch(text):
            return _signed(match[1], Fraction(int(match[2]), int(match[3])))
        if match := _MIXED.fullmatch(text):
            return _signed(match[1], int(match[2]) + Fraction(int(match[3]), int(match[4])))
        if match := _PERIODIC.fullmatch(text):
            fixed, period = match[3], match[4]
            unit = Fraction(1, 10 ** len(fixed))
            repeating = Fraction(int(period), 10 ** len(period) - 1) * unit
            return _signed(match[1], int(match[2]) + (int(fixed) * unit if fixed else 0) + repeating)
    except ZeroDivisionError:
        return None
    return None


def terminates(value: Fraction) -> bool:
    """Whether a decimal can write the value exactly."""
    return 10 ** value.denominator.bit_length() % value.denominator == 0


def read_based(text: str) -> tuple[str, int | None] | None:
    r"""Digits and value of a numeral with its base as subscript; the value is None where a digit does not fit the base."""
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    try:
        return match[1], int(match[1], int(match[2]))
    except ValueError:
        return match[1], None


def canonical_rational(value: Fraction) -> str:
    """The canonical string of an exact value."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 3 * MAX_CANONICAL_CHARACTERS:
        return _digest(f"{value.numerator:x}/{value.denominator:x}")  # hexadecimal: no limit on digits, linear time
    return str(value)


def shorten(text: str) -> str:
    """The text itself, or a digest where it is long."""
    return text if len(text) <= MAX_CANONICAL_CHARACTERS else _digest(text)


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _signed(sign: str, value: Fraction | int) -> Fraction:
    return Fraction(-value if sign == "-" else value)
