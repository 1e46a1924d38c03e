"""Splits a rationale into sentences as IVT-LR does (2510.12603), with fewer false ends.

Its code makes spaces of the line breaks and splits at every ". ". Here, too, a full stop before
white space ends a sentence, and so does a line break before an item of a list or a capital; what
differs is that abbreviations, initials and the numbers of a list end none.
"""

from __future__ import annotations

import re

_STOP = re.compile(r"\.[ \t]+")
_ITEM = re.compile(r"\s*(?:[-*\u2022\u2013]|\(?(?:\d{1,2}|[A-Za-z])[.)])\s")
_MARKER = re.compile(
    r"(?:[-*\u2022\u2013]\s*)?(?:(?:Step|Stage|Part|Case|Point)\s+)?\(?(?:\d{1,2}|[A-Za-z])"
)
_ABBREVIATIONS = frozenset(
    "e.g i.e cf vs viz fig figs eq eqs nos vol pp approx ca dr mr mrs ms prof st mt gen rev "
    "al".split()
)
# these may close a sentence: they do before a capital
_CLOSING_ABBREVIATIONS = frozenset("etc inc ltd co corp jr sr u.s u.k a.m p.m b.c a.d".split())


def split_sentences(text: str) -> list[str]:
    """Splits a text; pieces without a letter or digit are left out.

    >>> split_sentences("The cube is red.\\nIt weighs 3.5 kg, e.g. on Earth. So it falls")
    ['The cube is red.', 'It weighs 3.5 kg, e.g. on Earth.', 'So it falls']
    """
    sentences = []
    for line in _lines(text):
        start = 0
        for stop in _STOP.finditer(line):
            if _ends_a_sentence(line[start : stop.start()], line[stop.end() :]):
                sentences.append(line[start : stop.start() + 1].strip())
                start = stop.end()
        sentences.append(line[start:].strip())
    return [part for part in sentences if any(char.isalnum() for char in part)]


def _lines(text: str) -> list[str]:
    """Joins the lines that go on in the middle of a sentence."""
    lines: list[str] = []
    goes_on = False
    for line in re.split(r"\r\n|[\r\n\u2028\u2029]", text):
        line = " ".join(line.split())
        if goes_on and line and line[0].islower() and not _ITEM.match(line + " "):
            lines[-1] = f"{lines[-1]} {line}"
        elif line:
            lines.append(line)
        goes_on = bool(line)
    return lines


def _ends_a_sentence(before: str, after: str) -> bool:
    """Whether the full stop between the two texts is a sentence's end."""
    words = before.split()
    if not words or _MARKER.fullmatch(before.strip()):  # "1. The cube"
        return False
    word = words[-1].lstrip("([\"'")
    if word.lower() in _ABBREVIATIONS:
        return False
    if word == "No" and len(words) > 1:  # of a number
        return not after[:1].isdigit()
    if word.lower() in _CLOSING_ABBREVIATIONS:
        return after[:1].isupper()
    if len(word) == 1 and word.isupper() and len(words) > 1:
        # J. K. Rowling; behind a whole word it is a label: magnet A
        return not words[-2].endswith(".")
    return True
