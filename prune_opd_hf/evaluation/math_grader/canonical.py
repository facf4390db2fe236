"""One string for every value, so that answers can be counted: equal values that are written differently get the same string.

Rational values are exact. Other numbers are told apart by 15 significant digits. Sets are sorted. What has free symbols is
expanded and printed. Long strings are replaced by a digest.
"""

from fractions import Fraction

import sympy
from sympy import Basic, Eq, Float, Interval, MatrixBase, Rational, Tuple

from .literals import canonical_rational, shorten

_SIGNIFICANT_DIGITS = 15


def canonical_text(text: str) -> str:
    """The canonical string of what is no expression.

    Example:
        >>> canonical_text("no  solution")
        'nosolution'
    """
    return shorten("".join(text.split()))


def canonical(expression: Basic | MatrixBase) -> str:
    """The canonical string of a parsed answer.

    Example: as parsed from 1.5, from x = 3/2, and from {2, sqrt(8)/2}.
        >>> x = sympy.Symbol("x")
        >>> canonical(Float("1.5")), canonical(Eq(x, Rational(3, 2))), canonical(sympy.FiniteSet(2, sympy.sqrt(8) / 2))
        ('3/2', '3/2', '{1.41421356237310, 2}')
    """
    if isinstance(expression, Eq) and expression.lhs.is_Symbol:
        return canonical(expression.rhs)
    if isinstance(expression, sympy.FiniteSet):
        return shorten("{" + ", ".join(sorted({canonical(element) for element in expression.args})) + "}")
    if isinstance(expression, Tuple):
        return shorten("(" + ", ".join(canonical(element) for element in expression.args) + ")")
    if isinstance(expression, Interval):
        opening, closing = "(" if expression.left_open else "[", ")" if expression.right_open else "]"
        return shorten(f"{opening}{canonical(expression.start)}, {canonical(expression.end)}{closing}")
    if isinstance(expression, sympy.Union):
        return shorten(" U ".join(sorted(canonical(part) for part in expression.args)))
    value = expression.doit()
    if isinstance(value, Float) and value.is_finite:
        value = Rational(str(value))
    if isinstance(value, Rational):
        return canonical_rational(Fraction(int(value.p), int(value.q)))
    if isinstance(value, sympy.Expr):
        if value.is_number and value.is_finite:
            return str(value.evalf(_SIGNIFICANT_DIGITS, chop=True))
        value = sympy.expand(value)
    return shorten(str(value))
