"""Kinds of values that a config's keys may hold: types, ranges, choices. No number is ever NaN.

number(above=0, at_most=1)    whole(1, also=-1)    null_or(choice("fixed", "adaptive"))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo_latent.common.settings import MISSING


@dataclass(frozen=True)
class Kind:
    """What one key may hold.

    Attributes:
        expected: in words, for messages.
        is_typed: whether a value is of the type; one that is none is not asked further.
        holds: whether a value of the type is in range, or among the choices.
        choices: texts among which the nearest spelling is looked for.
        why: appended to `expected` in a message.
        or_null: whether null stands for something, too.
    """

    expected: str
    is_typed: Callable[[Any], bool]
    holds: Callable[[Any], bool] = lambda value: True
    choices: tuple[str, ...] = ()
    why: str = ""
    or_null: bool = False

    def words(self) -> str:
        null = ", or null" if self.or_null else ""
        return f"{self.expected}{null}{f' ({self.why})' if self.why else ''}"


def null_or(kind: Kind) -> Kind:
    """The same, or null."""
    return replace(kind, or_null=True)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def number(
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    why: str = "",
    or_inf: bool = False,
) -> Kind:
    """A number, finite but for `or_inf`, between bounds.

    >>> number(above=0, at_most=1).words()
    'a number > 0 and <= 1'
    """
    bounds = _bounds(above, at_least, below, at_most)

    def holds(value: Any) -> bool:
        return (math.isfinite(value) or (or_inf and value == math.inf)) and all(
            holds(value) for _, holds in bounds
        )

    words = " and ".join(text for text, _ in bounds)
    expected = f"a number {words}" if words else "a finite number"
    return Kind(f"{expected}, or inf" if or_inf else expected, is_number, holds, why=why)


def whole(
    at_least: int | None = None,
    why: str = "",
    also: int | None = None,
    at_most: float = math.inf,
) -> Kind:
    """A whole number of at least `at_least`, or `also`, such as -1 for never.

    >>> whole(1, also=-1).words()
    'a whole number >= 1, or -1'
    """
    expected = "a whole number" if at_least is None else f"a whole number >= {at_least}"
    expected += "" if at_most == math.inf else f" and <= {at_most}"
    expected = expected if also is None else f"{expected}, or {also}"

    def holds(value: Any) -> bool:
        is_within = (at_least is None or value >= at_least) and value <= at_most
        return is_within or value == also

    return Kind(expected, is_whole, holds, why=why)


def seed() -> Kind:
    """A seed that numpy takes, too."""
    return whole(0, at_most=2**32 - 1)


def share(why: str = "") -> Kind:
    """A number in [0, 1]."""
    return number(at_least=0, at_most=1, why=why)


def flag() -> Kind:
    return Kind("true or false", lambda value: isinstance(value, bool))


def only(value: Any, why: str) -> Kind:
    """One value: others are verl's, and not ours."""
    return Kind(
        shown(value),
        is_number if is_number(value) else lambda got: type(got) is type(value),
        lambda got: got == value,
        choices=(value,) if isinstance(value, str) else (),
        why=why,
    )


def text(what: str = "a text", why: str = "") -> Kind:
    """Any text but an empty one."""
    return Kind(
        what, lambda value: isinstance(value, str), lambda value: value.strip() != "", why=why
    )


def choice(*names: str, why: str = "") -> Kind:
    """One of some texts.

    >>> choice("fixed", "adaptive").words()
    'fixed or adaptive'
    """
    listed = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return Kind(
        listed, lambda value: isinstance(value, str), lambda value: value in names, names, why
    )


def some(kind: Kind, *, at_least: int = 1, exactly: int | None = None, why: str = "") -> Kind:
    """A list of values of `kind`."""
    if exactly is not None:
        expected = f"{exactly} values, each {kind.expected}"
    else:
        expected = f"a list{' of at least one' if at_least else ''}, each {kind.expected}"

    def holds(values: Any) -> bool:
        fits = len(values) >= at_least if exactly is None else len(values) == exactly
        return fits and all(kind.is_typed(item) and kind.holds(item) for item in values)

    return Kind(expected, is_list, holds, kind.choices, why)


def one_or_some(kind: Kind, at_least: int = 1, why: str = "") -> Kind:
    """A value of `kind`, or a list of such."""
    several = some(kind, at_least=at_least)

    def holds(value: Any) -> bool:
        return several.holds(value) if is_list(value) else kind.holds(value)

    return Kind(
        f"{kind.expected}, or a list of such",
        lambda value: is_list(value) or kind.is_typed(value),
        holds,
        kind.choices,
        why,
    )


def entries(what: str) -> Kind:
    """A section whose keys are somebody else's."""
    return Kind(what, lambda value: isinstance(value, Mapping))


def anything() -> Kind:
    return Kind("anything", lambda value: True, or_null=True)


def is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def as_list(value: str | Sequence[str]) -> list[str]:
    """One text or several, as a list: `trainer.logger`, `data.train_files`."""
    return [value] if isinstance(value, str) else list(value)


def _bounds(
    above: float | None, at_least: float | None, below: float | None, at_most: float | None
) -> list[tuple[str, Callable[[float], bool]]]:
    bounds: list[tuple[str, Callable[[float], bool]]] = []
    if above is not None:
        bounds.append((f"> {above:g}", lambda value: value > above))
    if at_least is not None:
        bounds.append((f">= {at_least:g}", lambda value: value >= at_least))
    if below is not None:
        bounds.append((f"< {below:g}", lambda value: value < below))
    if at_most is not None:
        bounds.append((f"<= {at_most:g}", lambda value: value <= at_most))
    return bounds


def kind_of(default: Any) -> Kind:
    """The kind of value that a default shows; a null, a list and an empty section show none."""
    if isinstance(default, bool):
        return flag()
    if isinstance(default, int):
        return whole()
    if isinstance(default, float):
        return number()
    if isinstance(default, str) and default not in ("", MISSING):
        return text()
    return some(anything(), at_least=0) if is_list(default) else anything()


def shown(value: Any) -> str:
    """As a config writes it."""
    if value is None:
        return "null"
    text = str(value).replace("'", "")
    return text.lower() if isinstance(value, bool) else text
