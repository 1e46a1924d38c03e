"""Reads an answer as one value with the words beside it, as a formula, or as mere text."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction

from grpo_latent.answers.marks import PLAIN_SIGNS
from grpo_latent.answers.units import Unit, parse_unit
from grpo_latent.answers.values import Number, read_value

MAX_CHARS = 1000  # no published answer is longer; a policy's endless one is compared as text
# what typesetting puts between thousands: LaTeX's spaces and {,}, no-break and thin spaces, the
# Swiss apostrophe
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;:! ]|\{,\}|[~'\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_SIGNS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\u2014": "-", "\u2010": "-", "\u2011": "-", "\u2019": "'"}
    | {"\u00b2": "^2", "\u00b3": "^3", "\u00a0": " ", "\u2009": " ", "\u202f": " "}
    | {
        "\u2260": " not ",
        "\u2248": " about ",
        "\u2103": "\u00b0C",
        "\u2109": "\u00b0F",
        "\u03bc": "\u00b5",
        "\u2126": "\u03a9",
    }
)
_PRICE = r"[$\u00a3\u00a5\u20ac\u20b9]\s?[\d.,]*\d"
# pattern -> replacement, in this order
_CLEANING = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (
            r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|boxed|operatorname)\s*"
            r"\{((?:[^{}]|\{[^{}]*\})*)\}",
            r" \1 ",
        ),
        # a formula inside a sentence; "$5 or $6" are prices
        (r"(?<![\\$])\$(?=\S)([^$]*[^$\s\\])\$(?![\d$])|\\[([](.*?)\\[)\]]", r"\1\2"),
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|\u00b0)\s*", "\u00b0 "),
        (r"\u00b0 ([CFcf])(?![A-Za-z])", "\u00b0\\1"),
        (r"\\(?:neq?|neg|lnot)(?![A-Za-z])|\\not\s*=|!=|\u00ac", " not "),
        (r"\\(?:approx|sim)(?![A-Za-z])|^~", " about "),
        (r"(?<=\d)\s*(?:~|\bto\b)\s*(?=\d)", "-"),
        (r"\s+(?=\^)", ""),
        (r"\\([%$])", r"\1"),
        (r"(?<!\\)\\[,;:! ]|~", " "),
        (r"(?<=\d)\s*_\s*\{(\d+)\}", r"_\1"),
        (r"(?i)(?<![a-z])([ap])\.\s?m\b\.?", r"\1m"),
        (r"(?i)\b(?:minus|negative)\s+(?=[\d.$])", "-"),
        (r"(?<=\d)\s*([-:/])\s*(?=\d)", r"\1"),
        (r"(?<=\d)(?=(?:st|nd|rd|th)\b)", " "),
        (r"(?<=\d)[kK](?![A-Za-z])", " thousand"),
        (r"\bUS\$", "$"),
        (rf"({_PRICE})\s?[Mm](?:n|ln)?(?![A-Za-z])", r"\1 million"),
        (rf"({_PRICE})\s?[Bb]n?(?![A-Za-z])", r"\1 billion"),
        (r"(?:#|\b[Nn]o\.)\s*(?=\d+\Z)", ""),
        # between letters a comma ends an item, however it is spaced; between digits it may not
        (r"(?<=[^\W\d_])\s*([,;])\s*|\s*([,;])\s*(?=[^\W\d_])", r"\1\2 "),
    )
)
_CODES = frozenset("usd eur gbp jpy cny inr".split())
_LIST = re.compile(r"[-+\d.\s]+(?:(?:[,;](?:\s*and\b)?|and\b)[-+\d.\s]+)+")
_SEPARATOR = re.compile(r"[,;](?:\s*and\b)?|and\b")
# "3600s" are seconds, as are "1800s" where no "the" says otherwise
_DECADE = re.compile(r"(?:.*\s)?(?:(?<=the )1[5-9]|19|20)\d0s", re.DOTALL | re.IGNORECASE)
_OPEN_END = re.compile(r"[-+*/^_=<>&]\s*\Z|\A\s*[*/^_&]")  # "= 5" is whole
# commands that math-verify passes over say something all the same
_PASSED_OVER = re.compile(r"\\(?:\w*(?:arrow|dots)|to|lnot|neg|parallel|perp)(?![A-Za-z])|\d\s*_")
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_SCALES["trillion"] = 10**12
_FILLERS = frozenset(
    "the a an is are was it of about approximately approx around roughly exactly equals "
    "total".split()
)
# what turns a number into another statement: never left out on one side
QUALIFIERS = frozenset(
    "not no never non without except neither nor cannot isn't aren't wasn't false wrong "
    "incorrect or but besides excluding instead hardly barely scarcely almost nearly unless "
    "more less fewer greater least most than over under above below between up at".split()
)
_NAMES = r"(?P<names>(?:[^\W\d_][^\W\d_'.-]*[:,.]?\s+)*)"
_VALUE = (
    r"(?P<value>[-+]?\s*(?:\d+\s*)?\\[dt]?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\}|[-+]?\d+\s+\d+/\d+"
    r"|[-+]?\.?\d(?:[\d.,:/-]*\d)?\.?"
    r"(?:[eE][-+]?\d+|\s*(?:\\times|\\cdot|[x*\u00d7\u00b7])\s*10\s*\^\s*\{?[-+]?\d+\}?)?"
    r"|[^\W\d_]+[-.]?\d[\w.:/-]*)"
)
_AFTER = (
    r"(?P<after>(?:[^\W\d_]|[\u00b0%\u2030$\u00a2-\u00a5\u20ac\u20b9\u00b7/.,'\s-]"
    r"|(?<=[^\W\d_])\^\{?-?\d\}?|(?<=[A-Za-z])[23](?!\w))*)"
)
_ONE_VALUE = re.compile(
    rf"{_NAMES}(?P<sign>-?)\s*(?P<currency>[$\u00a3\u00a5\u20ac\u20b9]?)\s*{_VALUE}\s*{_AFTER}"
)
_ASSIGNED = re.compile(r"(\\?[A-Za-z][\w\\{}]{0,20})\s*=\s*([^=]+)")
_PART_OF_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([^\W\d_]+|%)\s*(?:,|and\b)?\s*")
_FUNCTIONS = frozenset("sin cos tan cot sec csc log ln exp sqrt pi mod lim det gcd lcm".split())


@dataclass(frozen=True)
class Reading:
    """What an answer says.

    Attributes:
        kind: `number`, `identifier` (date, time, score, phone number, version, decade, list of
            numbers, formula that is compared as written), `maths` or `text`.
        core: the value as written; the whole text for `text`.
        number: for kind `number`, else None.
        unit: None if none is written.
        before: words in front of the value, in small letters and without fillers.
        after: words behind it that are no unit.
        assigned: the name in "x = 4".
    """

    kind: str
    core: str
    number: Number | None = None
    unit: Unit | None = None
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    assigned: str | None = None

    @property
    def words(self) -> list[str]:
        return sorted(word for word in self.before + self.after if word not in QUALIFIERS)

    @property
    def qualifiers(self) -> list[str]:
        return sorted(word for word in self.before + self.after if word in QUALIFIERS)


def clean(text: str) -> str:
    r"""Writes signs, spaces, degrees and thousands in one way.

    >>> clean(r"$12\,000$ \text{cm}"), clean(r"90^\circ"), clean("5 p.m.")
    ('12000 cm', '90°', '5 pm')
    """
    text = unicodedata.normalize("NFC", text).translate(PLAIN_SIGNS)
    text = _THOUSANDS.sub("", text).translate(_SIGNS)
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def read(text: str) -> Reading:
    """Reads a peeled answer.

    >>> reading = read("blue 5 km")
    >>> reading.kind, reading.core, reading.words, reading.unit.factor
    ('number', '5', ['blue'], Fraction(1000, 1))
    >>> [read(text).kind for text in ("555-1234", "x^2 + 1", "left", "3 pens and 2 cups")]
    ['identifier', 'maths', 'text', 'text']
    """
    text = clean(text)
    if len(text) > MAX_CHARS:
        return Reading("text", text)
    assignment = _ASSIGNED.fullmatch(text)
    if assignment is not None:
        reading = read_unassigned(assignment[2].strip())
        if reading.kind != "text":
            return replace(reading, assigned=assignment[1])
    return read_unassigned(text)


def read_unassigned(text: str) -> Reading:
    """Reads a clean text without "x =" in front."""
    found = _ONE_VALUE.fullmatch(text)
    reading = None if found is None else _one_value(found)
    return reading or _compound(text) or _list(text) or _formula(text) or Reading("text", text)


def _one_value(found: re.Match[str]) -> Reading | None:
    if _DECADE.fullmatch(found[0]):  # no seconds
        return Reading("identifier", found["value"] + "s", before=tuple(_words(found["names"])))
    if found["after"].strip()[-1:] in ("-", "/"):  # 5-: something is left out
        return None
    after = [word.strip(",.") for word in found["after"].split()]
    words = _words(found["names"])
    core = found["value"].strip()
    scale = 1
    number = read_value(core)
    while number is not None and after and after[0].lower() in _SCALES:
        scale *= _SCALES[after.pop(0).lower()]
    if words and words[-1] in _CODES:  # USD 5
        after = [words.pop(), *after]
    if found["currency"]:
        after = [found["currency"], *[word for word in after if parse_unit([word]) is None]]
    unit, rest = _unit_and_rest(after)
    # one letter that is no unit is a variable: 5x is no five
    if any(len(word) == 1 and word.isalpha() and word.isascii() for word in rest):
        return None
    before, behind = tuple(words), tuple(_words(" ".join(rest)))
    if number is None:
        if "," in core:  # a list
            return None
        return Reading("identifier", found["sign"] + core, None, unit, before, behind)
    sign = -1 if found["sign"] else 1
    number = replace(number, value=sign * scale * number.value)
    return Reading("number", found["sign"] + core, number, unit, before, behind)


def _unit_and_rest(words: list[str]) -> tuple[Unit | None, list[str]]:
    """Takes the longest unit that the words begin with."""
    for length in range(min(len(words), 6), 0, -1):
        unit = parse_unit(words[:length])
        if unit is not None:
            return unit, words[length:]
    return None, words


def _words(text: str) -> list[str]:
    words = [word.strip(",.:;'").lower() for word in text.split()]
    # plural and singular are one word
    words = [
        word[:-1] if len(word) > 3 and word.endswith("s") and word not in QUALIFIERS else word
        for word in words
    ]
    return [word for word in words if word and word not in _FILLERS]


def _compound(text: str) -> Reading | None:
    """Adds up a quantity in falling units: 1 hour 30 minutes."""
    total: Fraction | None = None
    last: Unit | None = None
    at = 0
    while at < len(text):
        part = _PART_OF_QUANTITY.match(text, at)
        number = read_value(part[1]) if part else None
        unit = parse_unit([part[2]]) if part else None
        if part is None or number is None or unit is None:
            return None
        if last is not None and (unit.dimension != last.dimension or unit.factor >= last.factor):
            return None
        total = (total or 0) + number.value * unit.factor
        last, at = unit, part.end()
    if total is None or last is None:
        return None
    return Reading("number", text, Number(total), Unit(Fraction(1), last.dimension))


def _list(text: str) -> Reading | None:
    """Takes numbers with commas between them for what stands there, in this order."""
    items = [item.strip() for item in _SEPARATOR.split(text)] if _LIST.fullmatch(text) else []
    numbers = [number for number in map(read_value, items) if number is not None]
    if not items or len(numbers) != len(items):
        return None
    return Reading("identifier", ", ".join(str(number.value) for number in numbers))


def _formula(text: str) -> Reading | None:
    words, unit = text.split(" "), None
    for length in range(1, min(len(words) - 1, 4) + 1):
        found = parse_unit(words[-length:])
        if found is not None and any(char.isdigit() for char in " ".join(words[:-length])):
            text, unit = " ".join(words[:-length]), found
    if unit is None and text.endswith(("%", "\u00b0")):
        text, unit = text[:-1].strip(), parse_unit([text[-1]])
    bare = re.sub(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+", " ", text)
    runs = re.findall(r"[^\W\d_]+", bare)
    is_formula = all(
        run.isascii() and (len(run) == 1 or run.lower() in _FUNCTIONS) for run in runs
    )
    if not is_formula or re.search(r"[\d+*/^=<>\\]", text) is None:
        return None
    # a bar at an end that nothing closes
    is_open = text.count("|") % 2 == 1 and "|" in (text[0], text[-1])
    if is_open or _OPEN_END.search(text) or _PASSED_OVER.search(text):
        return Reading("identifier", "".join(text.split()))  # as written, however it is spaced
    return Reading("maths", text, None, unit)
