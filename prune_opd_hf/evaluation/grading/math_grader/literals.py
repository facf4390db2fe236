r"""Answers whose value can be read without computer algebra: integers, decimals, fractions, mixed numbers,
sums of numbers, numerals of a base.

Exact and cheap: most golds of competition benchmarks are integers. What is not plainly a literal is None here.
"""

import hashlib
import re
from fractions import Fraction

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
