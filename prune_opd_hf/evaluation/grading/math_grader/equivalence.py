r"""Whether an answer equals the gold answer, by math-verify, with its misreadings corrected.

`judge` is a pure function of two strings. It may run for ever or exhaust the memory on hostile input, and must then be
stopped from outside: `grading.py` runs it in processes that it can kill.

Before math-verify is asked
1. Text that is equal after `rewrite` is equal.
2. Two literals are compared exactly, not by six decimals; a decimal against 1/3 is left to math-verify.
3. An explicit set {3, 4} is no tuple (3, 4) and no interval [3, 4]; math-verify takes some for others.
4. Numerals of a base compare by value, or by digits where the gold or the answer names no base; math-verify ignores the base.
5. A gold that can be a time, 5:30 or 1:05:00, compares part by part with what has a colon, and equals no fraction; any other
   ratio, 4:6:8, is what is proportional to it. math-verify takes 5:30 for 1/6, and so for 6:36.
6. Two numbers side by side ("4 2") are no answer; math-verify takes their sum.
7. Words compare without regard to case, font and blanks.
8. An answer with an ellipsis, an infinity or a negation that the gold does not have is wrong.
9. A chain of equalities between numbers that does not hold (4 = 5) is wrong; math-verify looks at its last member alone.
10. `i` is the imaginary unit on both sides.
11. What math-verify accepts is confirmed by value, with numbers in the place of letters. It drops what is below 1e-15, and
    takes 2^{-98} for 2^{-99} and 4^{2023}/\binom{4048}{2024}-2 for 4^{2024}/\binom{4048}{2024}-2. Rational values are equal
    or not; others agree to 40 digits; a decimal and what no decimal can write, to six decimals and four digits.
12. R is not r where both occur, in longer answers than one letter (an option): math-verify writes all letters small, and
    R - r would be 0.
13. A percent sign, or the word, may stand on one side alone: 12.5\% is 12.5 and 0.125. Where both sides have it, the numbers
    are equal.
14. `2**10` and `2^10` are powers; `\approx 27` is 27, and of `8\sqrt{10} \approx 25.3` the first side counts; words behind a
    number are its unit (27 ways) unless they change it (27 factorial).
15. A letter before a value, `A) 5`, names an option. A gold that is an option's letter compares with it, another with the value.

Known false accepts that remain
- A percentage equals its number and its value: 5\% for 5, and 0.05 for 5\%, though 5 is not 0.05.
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
- Intervals with outward brackets, ]0,1[.
- Unions of inequalities against unions of intervals; a line in another form, y - 2x = 3 for 2x + 3.
- Amounts in several units: 3 hours 24 minutes for 204.
- A ratio that may be a time in other numbers, 2:24 for 1:12, or as a fraction.
- What is equal for positive letters alone: \sqrt{1/n} for 1/\sqrt{n}, \sqrt{x^2} for x.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import (
    Add,
    Basic,
    Eq,
    Expr,
    FiniteSet,
    Float,
    I,
    Interval,
    MatrixBase,
    Rational,
    Tuple,
    UnevaluatedExpr,
    Union,
    prime,
)
from sympy.core.relational import Relational

from .rewriting import (
    canonical_rational,
    distinguish_cases,
    read_based,
    read_literal,
    rewrite,
    shorten,
    split_at_top_level,
    split_option,
    terminates,
    without_percent,
)

_LATEX = LatexExtractionConfig(
    boxed_match_priority=-1,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=False, nits=True, boxed="none", equations=False
    ),
)
_BLANK = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # all but those between digits
_LEAD = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?\s*(?:=|\\in(?![A-Za-z]))\s*(?=[^=]+$)")
_ABOUT = re.compile(r"\s*\\(?:approx|simeq)(?![A-Za-z])\s*")
_LETTER_IS_ABOUT = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?)\s*\\(?:approx|simeq)(?![A-Za-z])")
_RELATION = re.compile(r"=|\\in(?![A-Za-z])|[<>]|\\[lg]eq?(?![A-Za-z])")
_SIDE_BY_SIDE = re.compile(r"(?<![\\A-Za-z_^{\d.])(?:\d+\.?\d*|\.\d+) +(?:\d|\.\d)")
_PARTS = re.compile(r"\d+(?::\d+)+")
_TIME = re.compile(r"[01]?\d:[0-5]\d(?::[0-5]\d)?|2[0-3]:[0-5]\d(?::[0-5]\d)?")
_ELLIPSIS = re.compile(r"\\[lc]?dots|\.\.\.|…")
_INFINITY = re.compile(r"(?<!,)(?<!, )(?<!,\+)(?<!, \+)\\infty(?!\s*,)|\binf(?:inity)?\b")  # but as a bound
_NEGATION = re.compile(r"\bnot\b|\\neq?(?![A-Za-z])|\\not(?![A-Za-z])")
_WORD_PARTS = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|textit|textsf|mathbf|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'-]+(?:[ ,]+[A-Za-z0-9'-]+)*")
_OPTION = re.compile(r"\(?([A-Z])\)?")

_POWER_OF_POWER = re.compile(r"\^\s*(?:\{[^{}]*\}|[^\s{}\\])\s*\^(?!\s*\\circ)")  # 2^3^2 may mean 64 and 512
_BRACKET = re.compile(r"\\?[(\[{)\]}]")
MAX_DEPTH = 8
"""Of brackets, and the number of bars. Answers of competitions stay below 6."""

_DECIMALS, _DIGITS = Rational(2, 10**6), Rational(1, 10**4)
"""How far a decimal may be from a value that no decimal can write, as it stands and as a share of the value. math-verify rounds
to 6 decimals where a decimal is involved."""

_PRECISION = 60
_EXACT = Rational(1, 10**40)
"""Values are computed to so many digits, and are equal where their difference is less than this share of its terms."""

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
    is_percent: bool = False


def judge(answer: str, gold: str) -> Judgement:
    r"""Compare an answer, as `extract_answer` returns it, with the gold as the benchmark states it."""
    golds = _read_gold(gold)
    option, _ = split_option(answer.strip(" $*"))
    if option and _OPTION.fullmatch(_words(golds.text) or ""):
        return Judgement(option == _words(golds.text), option)
    ours = _read(answer, drop_lead=not _RELATION.search(golds.text))
    if not ours.squeezed:
        return Judgement(False, None)
    try:
        verdict = _judge(ours, golds)
        if not verdict and ours.is_percent != golds.is_percent:
            verdict = _judge(_worked_out(ours), _worked_out(golds))
        return Judgement(True, _canonical_gold(gold)) if verdict else Judgement(False, _canonical(ours))
    except MemoryError:
        raise
    except Exception:  # there is no telling what sympy raises on what a model wrote
        return Judgement(False, None)


def _judge(ours: _Reading, gold: _Reading) -> bool:
    verdict = _judge_as_text(ours, gold)
    return _judge_as_expression(ours, gold) if verdict is None else verdict


def _read(text: str, *, drop_lead: bool = False) -> _Reading:
    """Rewrite; on request without the lead of "x = 5", where the gold is no relation. Percent signs are set apart."""
    rewritten = rewrite(text)
    if about := _LETTER_IS_ABOUT.match(rewritten):
        rewritten = f"{about[1]} = {rewritten[about.end() :]}"
    if drop_lead and (lead := _LEAD.match(rewritten)):
        rewritten = rewritten[lead.end() :]
    rewritten = next(filter(None, _ABOUT.split(rewritten)), "")
    plain = without_percent(rewritten)
    rewritten = rewritten if plain is None else plain
    squeezed = _BLANK.sub("", rewritten)
    literal = None if _SIDE_BY_SIDE.search(rewritten) else read_literal(squeezed)
    return _Reading(rewritten, squeezed, literal, plain is not None)


def _worked_out(reading: _Reading) -> _Reading:
    """A percentage as its value."""
    if not reading.is_percent:
        return reading
    text = ", ".join(rf"\frac{{{element.strip()}}}{{100}}" for element in split_at_top_level(reading.text))
    return _Reading(text, _BLANK.sub("", text), None if reading.literal is None else reading.literal / 100)


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
    if _delimiters_differ(ours.squeezed, gold.squeezed) or _SIDE_BY_SIDE.search(ours.text):
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
    if _PARTS.fullmatch(gold.squeezed) and (_PARTS.fullmatch(ours.squeezed) or _TIME.fullmatch(gold.squeezed)):
        as_ratio = not _TIME.fullmatch(gold.squeezed)
        return _parts(ours.squeezed, as_ratio=as_ratio) == _parts(gold.squeezed, as_ratio=as_ratio)
    return None


def _parts(text: str, *, as_ratio: bool) -> list[int] | None:
    """The numbers of 4:6:8; of a ratio in their lowest terms. None for anything else."""
    if not _PARTS.fullmatch(text):
        return None
    numbers = list(map(int, text.split(":")))
    common = gcd(*numbers) if as_ratio else 1
    return [number // max(common, 1) for number in numbers]


def _judge_as_expression(ours: _Reading, gold: _Reading) -> bool:
    texts = [ours.text, gold.text]
    if not all(len(text) == 1 for text in texts):
        texts = distinguish_cases(*texts)
    our_expression, gold_expression = map(_parse, texts)
    if our_expression is None or gold_expression is None or _is_false_chain(our_expression):
        return False
    if not verify(gold_expression, our_expression, timeout_seconds=None, allow_set_relation_comp=True):
        return False
    if (last := _last_side(texts[0])) is not None and not isinstance(gold_expression, Relational):
        our_expression = _parse(last) or our_expression  # the side that math-verify has compared
    return not _values_differ(our_expression, gold_expression)


@lru_cache(maxsize=256)
def _parse(text: str) -> Basic | MatrixBase | None:
    """Parse one expression; where an equation cannot be read, its right side alone."""
    if not _is_well_nested(text) or _POWER_OF_POWER.search(text):
        return None
    found = parse(
        f"${text}$", [_LATEX], fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None
    )
    if found:
        expression = found[0]
        imaginary = {symbol: I for symbol in getattr(expression, "free_symbols", ()) if symbol.name == "i"}
        return expression.subs(imaginary) if imaginary else expression
    last = _last_side(text)
    return None if last is None else _parse(last)


def _last_side(text: str) -> str | None:
    """Of one equation, or a chain of them."""
    sides = split_at_top_level(text, separators="=")
    return sides[-1].strip() if len(sides) > 1 and len(split_at_top_level(text)) == 1 else None


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
    """Whether both can be evaluated, number by number, and are not the same."""
    if isinstance(ours, Eq) and isinstance(gold, Eq) and ours.lhs == gold.lhs:
        ours, gold = ours.rhs, gold.rhs
    our_numbers, gold_numbers = _numbers(ours), _numbers(gold)
    if our_numbers is None or gold_numbers is None:
        return False
    if len(our_numbers) != len(gold_numbers):
        return True
    if not isinstance(ours, FiniteSet) and not isinstance(gold, FiniteSet):
        return any(map(_differ, our_numbers, gold_numbers))
    for number in our_numbers:
        same = [index for index, other in enumerate(gold_numbers) if not _differ(number, other)]
        if not same:
            return True
        del gold_numbers[same[0]]
    return False


def _numbers(expression: Basic | MatrixBase) -> list[Any] | None:
    """What an answer consists of; None where that is no list of expressions."""
    if isinstance(expression, Interval):
        return [expression.start, expression.end]
    if isinstance(expression, MatrixBase):
        return list(expression.flat())
    if isinstance(expression, FiniteSet | Tuple):
        return list(expression.args)
    return [expression] if isinstance(expression, Expr) else None


def _differ(ours: Any, gold: Any) -> bool:
    """Whether two expressions have values, and different ones, with numbers in the place of letters."""
    if (
        not (isinstance(ours, Expr) and isinstance(gold, Expr))
        or ours.has(UnevaluatedExpr)
        or gold.has(UnevaluatedExpr)
    ):
        return False
    letters = sorted(ours.free_symbols | gold.free_symbols, key=str)
    point = {letter: Rational(prime(index + 4), prime(index + 3)) for index, letter in enumerate(letters)}
    value, gold_value = (_without_floats(each).subs(point).doit() for each in (ours, gold))
    gap = value - gold_value
    if not gap.is_number:
        return False
    exact = next((each for number, each in ((ours, value), (gold, gold_value)) if not number.has(Float)), None)
    rounded = (ours.has(Float) or gold.has(Float)) and exact is not None and not _is_decimal(exact)
    if gap.is_Rational and not rounded:
        return bool(gap != 0)
    distance, size = abs(gap.evalf(_PRECISION)), abs(gold_value.evalf(_PRECISION))
    if not (distance.is_finite and size.is_finite):
        return False
    return bool(distance > (min(_DECIMALS * max(1, size), _DIGITS * size) if rounded else _rounding(gap)))


def _rounding(value: Expr) -> Expr:
    """What a sum may come to where it is 0."""
    return _EXACT * sum(abs(term.evalf(_PRECISION)) for term in Add.make_args(value))


def _is_decimal(value: Expr) -> bool:
    return bool(value.is_Rational) and terminates(Fraction(int(value.p), int(value.q)))


def _without_floats(expression: Expr) -> Expr:
    """Decimals as the fractions that they state."""
    return expression.xreplace({decimal: Rational(str(decimal)) for decimal in expression.atoms(Float)})


def _to_fifteen_digits(value: Expr) -> str:
    """A number, without the noise that its real or imaginary part has where that is 0."""
    parts = value.evalf(_PRECISION).as_real_imag()
    if not all(part.is_Number for part in parts):
        return str(value.evalf(_SIGNIFICANT_DIGITS, chop=True))
    least = max(_EXACT * max(map(abs, parts)), _rounding(value))
    real, imaginary = (part if abs(part) > least else 0 for part in parts)
    return str((real + I * imaginary).evalf(_SIGNIFICANT_DIGITS))


def _is_false_chain(expression: Basic | MatrixBase) -> bool:
    relations = expression.atoms(Eq) if isinstance(expression, Basic) else set()
    return any(not relation.free_symbols and relation.doit() == False for relation in relations)  # noqa: E712


def _words(text: str) -> str | None:
    """Letters of an answer in words, or of an option (C); None for anything else."""
    plain = _WORD_PARTS.sub(r" \1 ", text).strip(" .")
    if option := _OPTION.fullmatch("".join(plain.split())):
        return option[1]
    if _WORDS.fullmatch(plain) and (plain != text or len(plain) > 2 or plain.casefold() == "no"):
        return "".join(plain.replace(",", " ").split()).casefold()
    return None


def _delimiters_differ(ours: str, gold: str) -> bool:
    elements = [split_at_top_level(text) for text in (ours, gold)]
    sets = [first.startswith(r"\{") and first.endswith(r"\}") for first, *_ in elements]
    sequences = [
        first.startswith(("(", "[")) and first.endswith((")", "]")) and len(split_at_top_level(first[1:-1])) > 1
        for first, *_ in elements
    ]
    return len(elements[0]) == len(elements[1]) and ((sets[0] and sequences[1]) or (sequences[0] and sets[1]))


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
            return str(_to_fifteen_digits(value))
        value = value.expand()
    return shorten(str(value))
