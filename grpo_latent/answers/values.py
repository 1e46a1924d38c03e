r"""Numbers as answers write them: `1,200`, `1e5`, `3/4`, `1 1/2`, `\frac{1}{2}`, `2\times10^3`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 400  # of a number, and of a power of ten
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+|\d+\.(?!\d)"
_POWER = (
    r"(?:[eE]([-+]?\d{1,4})"
    r"|\s*(?:\\times|\\cdot|[x*\u00d7\u00b7])\s*10\s*\^\s*\{?([-+]?\d{1,4})\}?)"
)
_FRACTION = r"(\d+)\s*/\s*(\d+)|\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)(?:\s+(?=\d)|\s*(?=\\)))?(?:{_FRACTION})"
    rf"|(?P<sign2>[-+]?)\s*(?P<decimal>{_DECIMAL})(?:{_POWER})?"
)


@dataclass(frozen=True)
class Number:
    """A number, and whether it was written as a fraction, which decimals only approximate."""

    value: Fraction
    is_fraction: bool = False


def read_value(text: str) -> Number | None:
    """Reads the number that the whole text is, None if it is none.

    >>> [str(read_value(text).value) for text in ("1,200", "1e5", "007", "-.5", "1 1/2")]
    ['1200', '100000', '7', '-1/2', '3/2']
    """
    found = _NUMBER.fullmatch(text.strip()) if len(text) <= MAX_DIGITS else None
    if found is None or not text.isascii() and any(c.isdigit() and c > "\x7f" for c in text):
        return None
    if found["decimal"] is None:
        _, _, above, below, above_of, below_of = found.groups()[:6]
        denominator = int(below or below_of)
        if denominator == 0:
            return None
        value = int(found["whole"] or 0) + Fraction(int(above or above_of), denominator)
        return Number(-value if found["sign"] == "-" else value, True)
    power = int(found.groups()[-2] or found.groups()[-1] or 0)
    if abs(power) > MAX_DIGITS:
        return None
    value = Fraction(found["decimal"].replace(",", "").removesuffix(".")) * Fraction(10) ** power
    return Number(-value if found["sign2"] == "-" else value)


def same_number(first: Number, second: Number) -> bool:
    """Compares exactly; a fraction and its decimals to a millionth.

    >>> same_number(read_value("1/3"), read_value("0.333333"))
    True
    """
    if first.is_fraction == second.is_fraction:
        return first.value == second.value
    return abs(first.value - second.value) * 10**6 <= max(abs(first.value), abs(second.value))
