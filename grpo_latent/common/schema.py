"""One check of a whole config: a table of kinds by key, over a config as it is shipped.

    table      key, or pattern with *  ->  Kind       {"optim.lr": number(above=0, at_most=1)}
    reference  which keys there are, and the kind of value of those that the table does not name (a
               default of 8 says whole number, [] or {} anything)

So that a new key needs no row, and a typo finds none.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from grpo_latent.common.kinds import Kind, is_list, kind_of, shown
from grpo_latent.common.references import at_their_source
from grpo_latent.common.settings import MISSING
from grpo_latent.errors import ConfigError

MAX_OTHERS = 8  # further mistakes that a message names
MAX_SIBLINGS = 12  # keys of a section that a message lists


@dataclass(frozen=True)
class Schema:
    """A table and the reference that it is a table of.

    Attributes:
        table: kind by key; a key may have `*` for any run of characters.
        reference: sections and defaults; each of its keys, and each of the table's, is known.
        free: sections whose further keys are somebody else's.
        classes: sections that a class checks when it is built: here only the table's rows are.
    """

    table: Mapping[str, Kind]
    reference: Mapping[str, Any]
    free: frozenset[str] = frozenset()
    classes: frozenset[str] = frozenset()

    def check(self, config: Mapping[str, Any], taken: Mapping[str, str] | None = None) -> None:
        """Raises `ConfigError` at the first mistake; its fix names the keys of others.

        Args:
            taken: keys that take their value from another (`common.references`): what is wrong
                with one is told of the other, which is what a user has written.
        """
        found = [(_key_of(problem), problem) for problem in self.problems(config)]
        problems = at_their_source(found, taken or {})
        if not problems:
            return
        first, others = problems[0], [_key_of(error) for error in problems[1:]]
        if others:
            more = f" and {len(others) - MAX_OTHERS} more" if len(others) > MAX_OTHERS else ""
            also = f"Also wrong: {', '.join(others[:MAX_OTHERS])}{more}."
            raise ConfigError(
                first.what,
                where=first.where,
                got=first.got,
                expected=first.expected,
                fix=f"{first.fix or ''} {also}".strip(),
            )
        raise first

    def check_sections(self, config: Mapping[str, Any]) -> None:
        """Raises `ConfigError` where a value stands for a whole section at the top.

        To be asked before references are followed, which would lead nowhere then.
        """
        for name, value in config.items():
            below = self.reference.get(name)
            if isinstance(below, Mapping) and below and value is not None:
                for problem in _not_a_section(name, value, below):
                    raise problem

    def problems(self, config: Mapping[str, Any]) -> Iterator[ConfigError]:
        """All mistakes, in the config's order."""
        yield from self._section(config, self.reference, "")

    def kind(self, key: str) -> Kind | None:
        """The table's kind of a key; an exact row comes before a pattern."""
        if key in self.table:
            return self.table[key]
        return next((kind for row, kind in self._patterns if fnmatchcase(key, row)), None)

    def known(self) -> list[str]:
        """All keys of reference and table, patterns left out."""
        return list(
            dict.fromkeys([*leaves(self.reference), *(k for k in self.table if "*" not in k)])
        )

    @functools.cached_property
    def _patterns(self) -> list[tuple[str, Kind]]:
        return [(row, kind) for row, kind in self.table.items() if "*" in row]

    def _has_rows(self, section: str) -> bool:
        return any(row.startswith(f"{section}.") for row in self.table)

    def _section(
        self, values: Mapping[str, Any], reference: Mapping[str, Any], where: str
    ) -> Iterator[ConfigError]:
        for name, value in values.items():
            key = f"{where}.{name}" if where else str(name)
            kind, default = self.kind(key), reference.get(name, _ABSENT)
            if kind is not None:
                problem = self._problem(key, value, kind, default)
                if problem is not None:
                    yield problem
                    continue
            elif where in self.classes and not self._has_rows(key):
                continue
            below = default if isinstance(default, Mapping) else {}
            if isinstance(value, Mapping) and (below or self._has_rows(key)):
                yield from self._section(value, below, key)
            elif kind is None and default is _ABSENT:
                if not self._is_free(where, reference):
                    yield self._unknown(where, next(leaves({str(name): value})))
            elif kind is None and isinstance(default, Mapping):
                if value is not None or below:
                    yield from _not_a_section(key, value, below)
            elif kind is None:
                problem = self._problem(key, value, kind_of(default), default)
                if problem is not None:
                    yield problem

    def _is_free(self, where: str, reference: Mapping[str, Any]) -> bool:
        """Whether a section takes further keys: it says so, or is empty in the reference."""
        if any(f"{where}.".startswith(f"{section}.") for section in self.free):
            return True
        return bool(where) and not reference and not self._has_rows(where)

    def _problem(self, key: str, value: Any, kind: Kind, default: Any) -> ConfigError | None:
        if value is None and kind.or_null:
            return None
        if value == MISSING and isinstance(value, str):
            if default == MISSING and key not in self.table:
                return None  # a section that is not in use
            return ConfigError(
                "missing value",
                where=key,
                got=f"no {key.rpartition('.')[2]}",
                expected=kind.words(),
                fix=f"Set {key}=… on the command line.",
            )
        if not kind.is_typed(value):
            what = "wrong type"
        elif not kind.holds(value):
            what = "unknown value" if kind.choices else "out of range"
        else:
            return None
        return ConfigError(
            what,
            where=key,
            got=repr(value),
            expected=kind.words(),
            fix=_fix(key, value, kind, default),
        )

    def _unknown(self, where: str, name: str) -> ConfigError:
        key = f"{where}.{name}" if where else name
        near = nearest_keys(key, with_sections(self.known()))
        section = where or "the config"
        siblings = sorted(
            {
                known.removeprefix(f"{where}.").split(".")[0]
                for known in self.known()
                if not where or known.startswith(f"{where}.")
            }
        )
        listed = siblings[:MAX_SIBLINGS] + ["…"] * (len(siblings) > MAX_SIBLINGS)
        return ConfigError(
            "unknown key",
            where=section,
            got=key,
            expected=" or ".join(near) if near else f"one of {', '.join(listed)}",
            fix=f"Write {near[0]}, the nearest spelling; a key that is there needs no +."
            if near
            else "Take it out.",
        )


_ABSENT: Any = object()


def _key_of(error: ConfigError) -> str:
    """An unknown key stands in what was got: its section is where it was looked for."""
    return str(error.got if error.what == "unknown key" else error.where)


def _not_a_section(key: str, value: Any, below: Mapping[str, Any]) -> Iterator[ConfigError]:
    if isinstance(value, Mapping):
        return
    names = ", ".join(list(below)[:6])
    yield ConfigError(
        "not a section",
        where=key,
        got=repr(value),
        expected=f"keys and values{f', such as {names}' if names else ''}",
        fix=f"Set {key}.{next(iter(below), '<name>')}=… instead.",
    )


def _fix(key: str, value: Any, kind: Kind, default: Any) -> str | None:
    given = value if is_list(value) else [value]
    for item in given:
        near = difflib.get_close_matches(str(item), kind.choices, 1)
        if near and item not in kind.choices:
            written = f"[…, {near[0]}]" if is_list(value) else near[0]
            return f"Set {key}={written}, the nearest spelling."
    if default is _ABSENT or default == MISSING or isinstance(default, Mapping):
        return f"Set {key} to {kind.expected}."
    return f"Set {key}; the default is {shown(default)}."


def leaves(reference: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Keys of all values, and of sections that are empty."""
    for name, value in reference.items():
        key = f"{where}.{name}" if where else str(name)
        if isinstance(value, Mapping) and value:
            yield from leaves(value, key)
        else:
            yield key


def with_sections(keys: Collection[str]) -> list[str]:
    """Keys, and behind them the sections that they stand in.

    >>> with_sections(["latent.treatment.name", "data.seed"])
    ['latent.treatment.name', 'data.seed', 'latent', 'latent.treatment', 'data']
    """
    parts = [key.split(".") for key in keys]
    sections = [".".join(names[:end]) for names in parts for end in range(1, len(names))]
    return list(dict.fromkeys([*keys, *sections]))


def nearest_keys(key: str, known: Collection[str], count: int = 3) -> list[str]:
    """Known keys that look like `key`, or that end as it does, best first.

    >>> nearest_keys("trainer.save_frq", ["trainer.save_freq", "data.seed"])
    ['trainer.save_freq']
    >>> nearest_keys("trainer.lr", ["actor.optim.lr", "trainer.device"])
    ['actor.optim.lr']
    """
    section, _, name = key.rpartition(".")
    beside = [other for other in known if other.rpartition(".")[0] == section]
    names = {other.rpartition(".")[2]: other for other in beside}
    near = [names[found] for found in difflib.get_close_matches(name, names, count, 0.75)]
    near += [other for other in known if other.rpartition(".")[2] == name]
    near += difflib.get_close_matches(key, known, count, 0.85)
    return list(dict.fromkeys(near))[:count]


def resolved(config: Any) -> dict[str, Any]:
    """An OmegaConf section as plain values, its references followed.

    Raises:
        ConfigError: a reference that leads nowhere.
    """
    from omegaconf import OmegaConf  # here: a table of plain values needs no OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            "does not resolve",
            where=str(getattr(error, "full_key", None) or "config"),
            got=str(error).partition("\n")[0],
            expected="a key of this config in each ${…}",
            fix="Correct the reference, or write a value.",
        ) from error
    return values
