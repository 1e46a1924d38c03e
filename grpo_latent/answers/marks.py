"""Takes the marks off an answer that typesetting and sentences put around it."""

from __future__ import annotations

import re

# what a keyboard for Chinese or Japanese writes for ASCII's signs, digits and letters, and what
# takes no room or a space's
PLAIN_SIGNS = {0xFF01 + idx: chr(0x21 + idx) for idx in range(94)}
PLAIN_SIGNS |= {0x200B: "", 0x200C: "", 0x200D: "", 0x2060: "", 0xFEFF: "", 0x3000: " "}
MAX_CHARS = 2000  # no published answer is longer; a longer one keeps its marks
_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|bb|cal)|mbox|boxed|fbox|emph|bm"
    r"|boldsymbol|operatorname|underline|displaystyle)\s*(?=\{)"
)
_LETTER = re.compile(
    r"(?:(?i:option|choice)\s+)?[(\[]\s*([A-Za-z])\s*[)\]]|([A-Za-z])\s*[)\]]"
    r"|(?i:option|choice)\s+([A-Za-z])"
)
# an ellipsis is no full stop; a call ends a word, a factorial a number or one letter
_CLOSING_STOP = re.compile(r"(?<!\.)\.{1,2}\Z|(?<=[^\W\d_]{2})!+\Z")
# opening, closing, what must not stand between them (two formulas are not one)
_PAIRS = (
    ("$$", "$$", "$"),
    ("$", "$", "$"),
    (r"\(", r"\)", r"\)"),
    (r"\[", r"\]", r"\]"),
    ("__", "__", "__"),
    ("_", "_", "_"),
    ('"', '"', '"'),
    ("'", "'", "'"),
    ("\u201c", "\u201d", "\u201d"),
    ("\u2018", "\u2019", "\u2019"),
    ("\u00ab", "\u00bb", "\u00bb"),
)
# two or more asterisks that are no power: (x)**2 keeps them
_BOLD = re.compile(r"(?<![\w)\]}])\*{2,}(?=\S)|(?<=\S)\*{2,}(?![\w(\\])")
_EMPHASIS = re.compile(r"(?<![\w*])(\*|_{1,3})(?=[^\s_*])([^*]*?[^\s_*])\1(?![\w*])")
_HEADING = re.compile(r"\A\s*#{1,6}\s+")


def peel(text: str) -> str:
    r"""Strips marks, in any order, until nothing changes.

    >>> [peel(text) for text in (r"$\boxed{\text{B}}$.", "**(B).**", "`left`", "2 apples...")]
    ['B', 'B', 'left', '2 apples...']
    """
    text = text.translate(PLAIN_SIGNS).strip()
    while len(text) <= MAX_CHARS:
        peeled = _peel_once(text)
        if peeled == text:
            break
        text = peeled
    return text


def unmark(line: str) -> str:
    """Takes off the marks inside a sentence: pairs of asterisks or underscores, a heading's sign.

    >>> unmark("### **Answer:** B"), unmark("2**3 and 4**5")
    ('Answer: B', '2**3 and 4**5')
    """
    line = _HEADING.sub("", line.translate(PLAIN_SIGNS))
    return line if len(line) > MAX_CHARS else _EMPHASIS.sub(r"\2", _BOLD.sub("", line))


def _peel_once(text: str) -> str:
    text = text.strip("*` \t\r\n").removeprefix("\\displaystyle").strip()
    for opening, closing, barred in _PAIRS:
        inner = _inside(text, opening, closing)
        core = inner
        while core is not None and barred in core:  # of nested pairs the innermost is looked into
            core = _inside(core, opening, closing)
        if inner is not None and core is not None and not inner.endswith("\\"):  # `\$`: a dollar
            return inner.strip()
    letter = _LETTER.fullmatch(text)
    if letter is not None:
        return letter[1] or letter[2] or letter[3]
    command = _COMMAND.match(text)
    start = command.end() if command else 0
    # bare braces group; with a comma they hold a set
    if text[start : start + 1] == "{" and text.endswith("}") and _is_one_group(text[start:]):
        if command or "," not in text:
            return text[start + 1 : -1].strip()
    return _without_closing_marks(text)


def _inside(text: str, opening: str, closing: str) -> str | None:
    if len(text) < len(opening) + len(closing):
        return None
    if not text.startswith(opening) or not text.endswith(closing):
        return None
    return text[len(opening) : len(text) - len(closing)]


def _is_one_group(text: str) -> bool:
    """Whether the brace that opens the text is closed by the one that ends it."""
    depth = 0
    for idx, char in enumerate(text):
        if char in "{}" and text[idx - 1 : idx] != "\\":
            depth += 1 if char == "{" else -1
        if depth == 0:
            return idx == len(text) - 1
    return False


def _without_closing_marks(text: str) -> str:
    # a dollar alone is half of a pair, unless a number stands beside it
    if text.count("$") == 1:
        if text.startswith("$") and re.match(r"\$\s*[-\d.]", text) is None:
            return text[1:].strip()
        if text.endswith("$") and re.search(r"[\d\\]\s*\$\Z", text) is None:
            return text[:-1].strip()
    text = _CLOSING_STOP.sub("", text)
    return re.sub(r"[,;:\u3002\uff0e]+\Z|\\[ ,;]?\Z", "", text).strip()
