"""Where a config's value is written that other keys take over: `n: ${oc.select:rollout.n,1}`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from grpo_latent.errors import ConfigError

# the whole value is one reference, with or without a default
_REFERENCE = re.compile(r"\$\{(?:oc\.select:\s*)?(\.*)([\w.]+)\s*(?:,.*)?\}", re.DOTALL)


def references(values: Mapping[str, Any]) -> dict[str, str]:
    """Keys of a config as it is written whose value is that of another key, and which one that is."""
    found = _found(values, "")
    return {key: other for key, other in found.items() if _is_there(values, other)}


def source(key: str, taken: Mapping[str, str]) -> str:
    """The key at which a key's value is written.

    >>> source("ref.n", {"ref": "actor", "actor.n": "rollout.n"})
    'rollout.n'
    """
    section, below = key, ""
    while section:
        if section in taken:
            return source(taken[section] + below, taken)
        section, _, name = section.rpartition(".")
        below = f".{name}{below}"
    return key


def at_their_source(
    problems: Iterable[tuple[str, ConfigError]], taken: Mapping[str, str]
) -> list[ConfigError]:
    """One problem a value, told of the key at which it is written, in the order given.

    Args:
        problems: each with the key that it is of.
    """
    by_key = dict(problems)
    told: dict[str, ConfigError] = {}
    for key, problem in by_key.items():
        written = source(key, taken)
        if written not in told:
            told[written] = by_key.get(written) or _moved(problem, key, written)
    return list(told.values())


def _moved(problem: ConfigError, key: str, written: str) -> ConfigError:
    return ConfigError(
        f"{problem.what} for {key}, which takes it over",
        where=written,
        got=problem.got,
        expected=problem.expected,
        fix=f"Set {written}, or {key} to a value of its own.",
    )


def _found(section: Mapping[str, Any], where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in section.items():
        key = f"{where}.{name}" if where else str(name)
        match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if isinstance(value, Mapping):
            found |= _found(value, key)
        elif match:
            found[key] = _absolute(where, *match.groups())
    return found


def _absolute(section: str, dots: str, name: str) -> str:
    """One dot in front is the section itself, each further one the section above."""
    if not dots:
        return name
    parts = section.split(".")
    return ".".join([*parts[: len(parts) - len(dots) + 1], name])


def _is_there(values: Mapping[str, Any], key: str) -> bool:
    """Whether the config has the key; verl's references name some that only defaults stand for."""
    value: Any = values
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return False
        value = value[name]
    return True
