"""Units by their quantity: a factor to the base unit, and the exponents of the base units."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPONENT = 9
_PREFIXES = {"n": -9, "\u00b5": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9}
_LONG_PREFIXES = {"nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3}
_LONG_PREFIXES |= {"mega": 6, "giga": 9}
# base symbol -> (names, dimension, factor): takes SI prefixes
_SI = {
    "m": ("meter metre", {"m": 1}, "1"),
    "g": ("gram gramme", {"kg": 1}, "1/1000"),
    "s": ("second", {"s": 1}, "1"),
    "l": ("liter litre", {"m": 3}, "1/1000"),
    "A": ("ampere amp", {"A": 1}, "1"),
    "mol": ("mole", {"mol": 1}, "1"),
    "N": ("newton", {"kg": 1, "m": 1, "s": -2}, "1"),
    "J": ("joule", {"kg": 1, "m": 2, "s": -2}, "1"),
    "W": ("watt", {"kg": 1, "m": 2, "s": -3}, "1"),
    "Pa": ("pascal", {"kg": 1, "m": -1, "s": -2}, "1"),
    "V": ("volt", {"kg": 1, "m": 2, "s": -3, "A": -1}, "1"),
    "\u03a9": ("ohm", {"kg": 1, "m": 2, "s": -3, "A": -2}, "1"),
    "Hz": ("hertz", {"s": -1}, "1"),
    "cal": ("calorie", {"kg": 1, "m": 2, "s": -2}, "4.184"),
    "eV": ("electronvolt", {"eV": 1}, "1"),
    "Wh": ("watthour", {"kg": 1, "m": 2, "s": -2}, "3600"),
    "bit": ("bit", {"bit": 1}, "1"),
    "B": ("byte", {"bit": 1}, "8"),
}
# names -> (dimension, factor): takes none
_OTHERS = {
    "min mins minute": ({"s": 1}, "60"),
    "h hr hrs hour": ({"s": 1}, "3600"),
    "sec secs": ({"s": 1}, "1"),
    "day": ({"s": 1}, "86400"),
    "week wk": ({"s": 1}, "604800"),
    "month": ({"month": 1}, "1"),
    "yr yrs year": ({"month": 1}, "12"),
    "in inch inches": ({"m": 1}, "0.0254"),
    "ft foot feet": ({"m": 1}, "0.3048"),
    "yd yard": ({"m": 1}, "0.9144"),
    "mi mile": ({"m": 1}, "1609.344"),
    "mph": ({"m": 1, "s": -1}, "0.44704"),
    "kph kmh": ({"m": 1, "s": -1}, "5/18"),
    "t tonne ton": ({"kg": 1}, "1000"),
    # the currency shares the word, and an answer in one is never right for the other
    "lb lbs pound \u00a3 gbp": ({"kg": 1}, "0.45359237"),
    "oz ounce": ({"kg": 1}, "0.028349523125"),
    "ha hectare": ({"m": 2}, "10000"),
    "acre": ({"m": 2}, "4046.8564224"),
    "gal gallon": ({"m": 3}, "0.003785411784"),
    "\u00b0 deg degree": ({"deg": 1}, "1"),
    "rad radian": ({"rad": 1}, "1"),
    "celsius centigrade \u00b0c C": ({"celsius": 1}, "1"),
    "fahrenheit \u00b0f F": ({"fahrenheit": 1}, "1"),
    "kelvin K": ({"kelvin": 1}, "1"),
    "$ dollar usd buck": ({"usd": 1}, "1"),
    "cent \u00a2": ({"usd": 1}, "1/100"),
    "\u20ac euro eur": ({"eur": 1}, "1"),
    "\u00a5 yen jpy": ({"jpy": 1}, "1"),
    "yuan rmb cny": ({"cny": 1}, "1"),
    "\u20b9 rupee inr": ({"inr": 1}, "1"),
    "% percent pct": ({"percent": 1}, "1"),
    "\u2030": ({"percent": 1}, "1/10"),
    "Kb": ({"bit": 1}, "1000"),
    "Mb": ({"bit": 1}, "1000000"),
    "Gb": ({"bit": 1}, "1000000000"),
    "KB": ({"bit": 1}, "8000"),
    "TB": ({"bit": 1}, "8000000000000"),
}
_ITEM = re.compile(
    r"(\$|%|\u2030|[^\W\d_]+|\u00b0[CFcf]?|[\u00a2-\u00a5\u20ac\u20b9])\^?\{?(-?\d)?\}?"
)
_SUPERSCRIPTS = str.maketrans("\u00b2\u00b3\u207b\u00b9\u03bc\u2126", "23-1\u00b5\u03a9")


@dataclass(frozen=True)
class Unit:
    """A unit as a multiple of base units.

    Attributes:
        factor: of one such unit, in base units.
        dimension: (base unit, exponent), sorted.
    """

    factor: Fraction
    dimension: tuple[tuple[str, int], ...]


def parse_unit(words: Sequence[str]) -> Unit | None:
    """Reads words as one unit, None if they are none.

    >>> parse_unit(["km", "per", "hour"]) == parse_unit(["km/h"]), parse_unit(["apples"])
    (True, None)
    """
    text = " ".join(words).translate(_SUPERSCRIPTS)
    text = re.sub(r"\b(?:degrees?|deg)\s+((?i:celsius|centigrade|fahrenheit)|[CF])\b", r"\1", text)
    text = re.sub(r"\bper\b", "/", text)
    text = re.sub(r"\b(?:square|sq\.?)\s+(\w+)", r"\1^2", text)
    text = re.sub(r"\bcubic\s+(\w+)", r"\1^3", text)
    text = re.sub(r"(\w+)\s+squared\b", r"\1^2", text)
    text = re.sub(r"(\w+)\s+cubed\b", r"\1^3", text)
    above, *below = [part.strip() for part in text.split("/")]
    if len(below) > 1 or not above:
        return None
    factor, dimension = Fraction(1), dict[str, int]()
    for part, sign in ((above, 1), *((part, -1) for part in below)):
        for item in re.split(r"[\s\u00b7*]+", part.removesuffix(".")):
            found = _ITEM.fullmatch(item)
            unit = _named(found[1]) if found else None
            if found is None or unit is None:
                return None
            exponent = sign * int(found[2] or 1)
            factor *= unit.factor**exponent
            for base, power in unit.dimension:
                dimension[base] = dimension.get(base, 0) + power * exponent
    return Unit(factor, tuple(sorted(item for item in dimension.items() if item[1])))


def _named(name: str) -> Unit | None:
    """Finds a unit by its symbol as written, else by its name in small letters, plural or not."""
    small = name.lower()
    for key in (name, small, small.removesuffix("s")):
        if key in _TABLE and (len(key) > 2 or key in (name, small)):
            return _TABLE[key]
    return None


def _table() -> dict[str, Unit]:
    table = {}
    for symbol, (names, dimension, factor) in _SI.items():
        base = Unit(Fraction(factor), tuple(sorted(dimension.items())))
        prefixes = {"": 0} | (
            _PREFIXES if symbol not in ("bit", "B") else {"k": 3, "M": 6, "G": 9}
        )
        for prefix, power in prefixes.items():
            table[prefix + symbol] = Unit(base.factor * Fraction(10) ** power, base.dimension)
        for prefix, power in ({"": 0} | _LONG_PREFIXES).items():
            for name in names.split():
                table[prefix + name] = Unit(base.factor * Fraction(10) ** power, base.dimension)
    for names, (dimension, factor) in _OTHERS.items():
        for name in names.split():
            table[name] = Unit(Fraction(factor), tuple(sorted(dimension.items())))
    table["L"], table["mL"], table["um"] = table["l"], table["ml"], table["\u00b5m"]
    table["kilo"] = table["kg"]
    return table


_TABLE = _table()
