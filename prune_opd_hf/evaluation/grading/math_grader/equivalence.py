r"""Whether an answer equals the gold answer, by math-verify, with its misreadings corrected.

`judge` is a pure function of two strings. It may run for ever or exhaust the memory on hostile input, and must then be
stopped from outside: `grading.py` runs it in processes that it can kill.

Before math-verify is asked
1. Text that is equal after `rewrite` is equal.
2. Two literals are compared exactly, not by six decimals; a decimal against 1/3 is left to math-verify.
3. An explicit set {3, 4} is no tuple (3, 4) and no interval [3, 4]; math-verify takes some for others.
4. Numerals of a base compare by value, or by digits where the gold or the answer names no base; math-verify ignores the base.
5. Times and ratios 5:30 compare part by part; math-verify takes 5:30 for 1/6, and so for 6:36.
6. Two numbers side by side ("4 2") are no answer; math-verify takes their sum.
7. Words compare without regard to case, font and blanks.
8. An answer with an ellipsis, an infinity or a negation that the gold does not have is wrong.
9. A chain of equalities between numbers that does not hold (4 = 5) is wrong; math-verify looks at its last member alone.
10. `i` is the imaginary unit on both sides.
11. What math-verify accepts is confirmed by value: it chops small factors, and takes 4^{2023}/\binom{4048}{2024}-2 for
    4^{2024}/\binom{4048}{2024}-2.
12. R is not r where both occur, in longer answers than one letter (an option): math-verify writes all letters small, and
    R - r would be 0.

Known false accepts that remain
- A percentage equals its number: 5\% for 5, and 0.05 for 5\%.
- Six decimals are enough for a gold that no decimal can write: 0.333333 for 1/3, 6.283185 for 2\pi.
- A list is accepted for a tuple in the same order (6, 31, -1), and a tuple for a list in any order.
- A polynomial or equation is accepted if it can be transformed into the gold: (x+1)^2 for x^2+2x+1.
- The degree sign may be missing or added, and so may a unit, which is not checked: 5 m for 5 cm.
- A mixed number may have been meant as a product: 2\frac{1}{2} is 5/2.
- An equation counts by its right side: |x| = 5 for 5.
- Leading zeros are ignored: 025 is 25, as the golds of AIME need it.

Known false rejects that remain
- Rounded decimals with fewer than six places, of golds that are not decimals: 149.33 for 448/3.
- Degrees against radians: \pi/6 for 30^\circ.
- A decimal comma: 0,5 is the list 0, 5. A list of numbers of three digits without blanks, 100,200, is 100200.
- Intervals with outward brackets, ]0,1[, and (-\infty,\infty) against \mathbb{R}.
- Unions of inequalities against unions of intervals; a line in another form, y - 2x = 3 for 2x + 3.
- Amounts in several units: 3 hours 24 minutes for 204.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Eq, Expr, FiniteSet, Float, I, Interval, MatrixBase, Rational, Tuple, UnevaluatedExpr, Union

from .rewriting import (
    canonical_rational,
    distinguish_cases,
    read_based,
    read_literal,
    rewrite,
    shorten,
    split_at_top_level,
    terminates,
)

_LATEX = LatexExtractionConfig(
    boxed_match_priority=-1,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=False, nits=True, boxed="none", equations=False
    ),
)
_BLANK = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # all but those between digits
_LEAD = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?\s*(?:=|\\in(?![A-Za-z]))\s*(?=[^=]+$)")
_RELATION = re.compile(r"=|\\in(?![A-Za-z])|[<>]|\\[lg]eq?(?![A-Za-z])")
_SIDE_BY_SIDE = re.compile(r"(?<![\\A-Za-z_^{\d.])(?:\d+\.?\d*|\.\d+) +(?:\d|\.\d)")
_PARTS = re.compile(r"\d+(?::\d+)+")
_ELLIPSIS = re.compile(r"\\[lc]?dots|\.\.\.|…")
_INFINITY = re.compile(r"\\infty|\binf(?:inity)?\b")
_NEGATION = re.compile(r"\bnot\b|\\neq?(?![A-Za-z])|\\not(?![A-Za-z])")
_WORD_PARTS = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|textit|textsf|mathbf|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'-]+(?:[ ,]+[A-Za-z0-9'-]+)*")
_OPTION = re.compile(r"\(?([A-Z])\)?")

_BRACKET = re.compile(r"\\?[(\[{)\]}]")
MAX_DEPTH = 8
"""Of brackets, and the number of bars. Answers of competitions stay below 6."""

_TOLERANCE = 2e-6
"""math-verify rounds to 6 decimals where a decimal is involved."""

_SIGNIFICANT_DIGITS = 15

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that no time limit of its own is set


class Judgement(NamedTuple):
    """Whether an answer is right, and one string for all of its value (the gold's for a right one; None if unreadable)."""

    correct: bool
    canonical: str | None


class _Reading(NamedTuple):
    text: str
    squeezed: str
    literal: Fraction | None


def judge(answer: str, gold: str) -> Judgement:
    r"""Compare an answer, as `extract_answer` returns it, with the gold as the benchmark states it."""
    golds = _read_gold(gold)
    ours = _read(answer, drop_lead=not _RELATION.search(golds.text))
    if not ours.squeezed:
        return Judgement(False, None)
    try:
        verdict = _judge_as_text(ours, golds)
        if verdict is None:
            verdict = _judge_as_expression(ours, golds)
        return Judgement(True, _canonical_gold(gold)) if verdict else Judgement(False, _canonical(ours))
    except MemoryError:
        raise
    except Exception:  # there is no telling what sympy raises on what a model wrote
        return Judgement(False, None)


def _read(text: str, *, drop_lead: bool = False) -> _Reading:
    """Rewrite; on request without the lead of "x = 5", where the gold is no relation."""
    rewritten = rewrite(text)
    if drop_lead and (lead := _LEAD.match(rewritten)):
        rewritten = rewritten[lead.end() :]
    squeezed = _BLANK.sub("", rewritten)
    literal = None if _SIDE_BY_SIDE.search(rewritten) else read_literal(squeezed)
    return _Reading(rewritten, squeezed, literal)


@lru_cache(maxsize=4096)
def _read_gold(gold: str) -> _Reading:
    return _read(gold)


@lru_cache(maxsize=4096)
def _canonical_gold(gold: str) -> str:
    reading = _read(gold)
    return _canonical(reading) or shorten("".join(reading.text.split()))


def _judge_as_text(ours: _Reading, gold: _Reading) -> bool | None:
    """A verdict where none of both needs algebra; None otherwise."""
    if ours.squeezed == gold.squeezed:
        return True
    if (
        ours.literal is not None
        and gold.literal is not None
        and (ours.literal == gold.literal or terminates(gold.literal) or not terminates(ours.literal))
    ):
        return ours.literal == gold.literal
    our_words, gold_words = _words(ours.text), _words(gold.text)
    if gold_words is not None and our_words is not None:
        return our_words == gold_words
    if _delimiters_differ(ours.text, gold.text) or _SIDE_BY_SIDE.search(ours.text):
        return False
    if any(mark.search(ours.text) and not mark.search(gold.text) for mark in (_ELLIPSIS, _INFINITY, _NEGATION)):
        return False
    our_numeral, gold_numeral = read_based(ours.squeezed), read_based(gold.squeezed)
    if our_numeral and gold_numeral:
        return our_numeral[1] is not None and our_numeral[1] == gold_numeral[1]
    if our_numeral or gold_numeral:
        based, plain = (our_numeral, gold) if our_numeral else (gold_numeral, ours)
        assert based is not None
        same_digits = based[0] == plain.squeezed and based[1] is not None
        return same_digits or (our_numeral is not None and based[1] == plain.literal)
    if _PARTS.fullmatch(ours.squeezed) and _PARTS.fullmatch(gold.squeezed):
        return list(map(int, ours.squeezed.split(":"))) == list(map(int, gold.squeezed.split(":")))
    return None


def _judge_as_expression(ours: _Reading, gold: _Reading) -> bool:
    texts = [ours.text, gold.text]
    if not all(len(text) == 1 for text in texts):
        texts = distinguish_cases(*texts)
    our_expression, gold_expression = map(_parse, texts)
    if our_expression is None or gold_expression is None or _is_false_chain(our_expression):
        return False
    accepted = verify(gold_expression, our_expression, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(accepted) and not _values_differ(our_expression, gold_expression)


@lru_cache(maxsize=256)
def _parse(text: str) -> Basic | MatrixBase | None:
    """Parse one expression; where an equation cannot be read, its right side alone."""
    if not _is_well_nested(text):
        return None
    found = parse(
        f"${text}$", [_LATEX], fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None
    )
    if found:
        expression = found[0]
        imaginary = {symbol: I for symbol in getattr(expression, "free_symbols", ()) if symbol.name == "i"}
        return expression.subs(imaginary) if imaginary else expression
    sides = split_at_top_level(text, separators="=")
    if len(sides) > 1 and len(split_at_top_level(text)) == 1:
        return _parse(sides[-1].strip())
    return None


def _is_well_nested(text: str) -> bool:
    """Whether brackets pair up, [ with ) too, and are not so deep that the parser needs exponential time."""
    open_brackets = ""
    for bracket in _BRACKET.findall(text):
        if bracket[-1] in "([{":
            open_brackets += bracket[-1]
            if len(open_brackets) > MAX_DEPTH:
                return False
        elif not open_brackets or (open_brackets[-1] == "{") != (bracket[-1] == "}"):
            return False
        else:
            open_brackets = open_brackets[:-1]
    return not open_brackets and text.count("|") <= MAX_DEPTH


def _values_differ(ours: Basic | MatrixBase, gold: Basic | MatrixBase) -> bool:
    """Whether both are numbers, or lists of them, that differ in their first decimals."""
    our_values, gold_values = _values(ours), _values(gold)
    if our_values is None or gold_values is None:
        return False
    if isinstance(ours, FiniteSet) or isinstance(gold, FiniteSet):
        our_values, gold_values = sorted(our_values), sorted(gold_values)
    return len(our_values) != len(gold_values) or any(
        abs(part - gold_part) > _TOLERANCE * max(1, abs(gold_part))
        for value, gold_value in zip(our_values, gold_values, strict=True)
        for part, gold_part in zip(value, gold_value, strict=True)
    )


def _values(expression: Basic | MatrixBase) -> list[tuple[Float, Float]] | None:
    """Real and imaginary part of each element, rounded well below the tolerance so that they sort alike."""
    elements = expression.args if isinstance(expression, FiniteSet | Tuple) else (expression,)
    values = []
    for element in elements:
        # 5% stays unevaluated
        if not isinstance(element, Expr) or not element.is_number or element.has(UnevaluatedExpr):
            return None
        parts = [Float(part, 30).round(12) for part in element.evalf(30).as_real_imag() if part.is_Number]
        if len(parts) != 2 or not all(part.is_finite for part in parts):
            return None
        values.append((parts[0], parts[1]))
    return values


def _is_false_chain(expression: Basic | MatrixBase) -> bool:
    relations = expression.atoms(Eq) if isinstance(expression, Basic) else set()
    return any(not relation.free_symbols and relation.doit() == False for relation in relations)  # noqa: E712


def _words(text: str) -> str | None:
    """Letters of an answer in words, or of an option (C); None for anything else."""
    plain = _WORD_PARTS.sub(r" \1 ", text).strip(" .")
    if option := _OPTION.fullmatch("".join(plain.split())):
        return option[1]
    if _WORDS.fullmatch(plain) and (plain != text or len(plain) > 2):
        return "".join(plain.replace(",", " ").split()).casefold()
    return None


def _delimiters_differ(ours: str, gold: str) -> bool:
    sets = [text.startswith(r"\{") and text.endswith(r"\}") for text in (ours, gold)]
    sequences = [
        text.startswith(("(", "[")) and text.endswith((")", "]")) and len(split_at_top_level(text[1:-1])) > 1
        for text in (ours, gold)
    ]
    return (sets[0] and sequences[1]) or (sequences[0] and sets[1])


def _canonical(reading: _Reading) -> str | None:
    if reading.literal is not None:
        return canonical_rational(reading.literal)
    words = _words(reading.text)
    if words is not None or read_based(reading.squeezed) or _PARTS.fullmatch(reading.squeezed):
        return shorten("".join((reading.squeezed if words is None else words).split()))
    if _SIDE_BY_SIDE.search(reading.text):
        return None
    expression = _parse(*distinguish_cases(reading.text))
    return None if expression is None else canonical(expression)


def canonical(expression: Basic | MatrixBase) -> str:
    """The canonical string of a parsed answer: one for every value, so that answers can be counted.

    Rational values are exact, other numbers have 15 significant digits, sets are sorted, and what has free symbols is expanded.
    """
    if isinstance(expression, Eq) and expression.lhs.is_Symbol:
        return canonical(expression.rhs)
    if isinstance(expression, FiniteSet):
        return shorten("{" + ", ".join(sorted({canonical(element) for element in expression.args})) + "}")
    if isinstance(expression, Tuple):
        return shorten("(" + ", ".join(canonical(element) for element in expression.args) + ")")
    if isinstance(expression, Interval):
        opening, closing = "(" if expression.left_open else "[", ")" if expression.right_open else "]"
        return shorten(f"{opening}{canonical(expression.start)}, {canonical(expression.end)}{closing}")
    if isinstance(expression, Union):
        return shorten(" U ".join(sorted(canonical(part) for part in expression.args)))
    value = expression.doit()
    if isinstance(value, Float) and value.is_finite:
        value = Rational(str(value))
    if isinstance(value, Rational):
        return canonical_rational(Fraction(int(value.p), int(value.q)))
    if isinstance(value, Expr):
        if value.is_number and value.is_finite:
            return str(value.evalf(_SIGNIFICANT_DIGITS, chop=True))
        value = value.expand()
    return shorten(str(value))
