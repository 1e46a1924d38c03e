"""Whether two answers are the same."""

from __future__ import annotations

import re
from collections.abc import Callable

from grpo_latent.answers.marks import peel
from grpo_latent.answers.reading import Reading, clean, read
from grpo_latent.answers.units import Unit, parse_unit
from grpo_latent.answers.values import Number, same_number

_PERCENT = parse_unit(["%"])
_RELATION = re.compile(r"[<>\u2264\u2265\u00b1]|\\(?:leq?|geq?|lt|gt|pm|mp)(?![A-Za-z])")


def same_answer(
    gold: str, answer: str, equal_as_maths: Callable[[str, str], bool] | None = None
) -> bool:
    r"""Compares two answers, without their marks: as texts, then as quantities, then as formulas.

    Where both have words beside the number they agree: units by their quantity, names, directions,
    am and pm. A unit that one of them leaves out is forgiven, a negation is not. Texts of letters
    are compared as texts, as are dates, times, scores, versions and phone numbers.

    Args:
        equal_as_maths: decides on two formulas that are no plain numbers; without it they are
            equal only as texts.

    >>> same_answer("100 cm", "1 m"), same_answer("10 m", "10"), same_answer("3 pm", "3 am")
    (True, True, False)
    """
    gold, answer = peel(gold), peel(answer)
    texts = clean(gold), clean(answer)
    if texts[0] == texts[1]:
        return True
    readings = read(gold), read(answer)
    if all(reading.kind == "number" and reading.unit is not None for reading in readings):
        return _same_reading(*readings, equal_as_maths)  # mW and MW differ by their case alone
    if texts[0].casefold() == texts[1].casefold():
        return True
    return _same_reading(*readings, equal_as_maths)


def _same_reading(
    gold: Reading, answer: Reading, equal_as_maths: Callable[[str, str], bool] | None
) -> bool:
    kinds = {gold.kind, answer.kind}
    if "text" in kinds or ("identifier" in kinds and len(kinds) == 2):
        return False
    if not _words_agree(gold, answer):
        return False
    if kinds == {"identifier"}:
        is_same = gold.core.casefold() == answer.core.casefold()
        return is_same and (None in (gold.unit, answer.unit) or gold.unit == answer.unit)
    if gold.number is not None and answer.number is not None:
        if _is_named(gold) and _is_named(answer) and "." in gold.core + answer.core:
            return gold.core == answer.core  # Python 3.10 is not 3.1
        return _same_quantity(gold.number, gold.unit, answer.number, answer.unit)
    if gold.unit is not None and answer.unit is not None and gold.unit != answer.unit:
        return False
    if bool(_RELATION.search(gold.core)) != bool(_RELATION.search(answer.core)):
        return False
    return equal_as_maths is not None and equal_as_maths(_for_maths(gold), _for_maths(answer))


def _for_maths(reading: Reading) -> str:
    """The core, with something to stand in relation where it begins with one; 1e3 as 1000."""
    if reading.number is not None and "e" in reading.core.lower():
        return str(reading.number.value)
    return f"x {reading.core}" if _RELATION.match(reading.core) else reading.core


def _is_named(reading: Reading) -> bool:
    return bool(reading.before) and not reading.after and reading.unit is None


def _words_agree(gold: Reading, answer: Reading) -> bool:
    if gold.qualifiers != answer.qualifiers:
        return False
    if gold.assigned and answer.assigned and gold.assigned != answer.assigned:
        return False
    if gold.words == answer.words:
        return True
    if gold.words and answer.words:
        return False
    wordy, other = (gold, answer) if gold.words else (answer, gold)
    if "identifier" in (wordy.kind, other.kind):
        return False
    if other.unit is None:
        return True  # it is the number alone
    return wordy.unit is not None and not wordy.after


def _same_quantity(
    gold: Number, gold_unit: Unit | None, answer: Number, unit: Unit | None
) -> bool:
    if gold_unit is None or unit is None:
        if same_number(gold, answer):
            return True  # a missing unit is forgiven
        # 50 % are a half
        percents = [_as_share(gold, gold_unit), _as_share(answer, unit)]
        return _PERCENT in (gold_unit, unit) and same_number(*percents)
    if gold_unit.dimension != unit.dimension:
        return False
    return same_number(_in_base(gold, gold_unit), _in_base(answer, unit))


def _in_base(number: Number, unit: Unit) -> Number:
    return Number(number.value * unit.factor, number.is_fraction)


def _as_share(number: Number, unit: Unit | None) -> Number:
    return Number(number.value / (100 if unit == _PERCENT else 1), number.is_fraction)
