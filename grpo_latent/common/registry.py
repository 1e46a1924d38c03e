"""Things by name: mechanisms, treatments, backbones, benchmarks. One form for all of them.

    <folder>/<name>.py     one thing, which registers itself: `@register`, or `register(…)`
    <folder>/registry.py   `THINGS = Registry(…)` and `register`, beside what else finds a thing
    <folder>/__init__.py   imports every file of the folder

So a new file is found without a line elsewhere. A user's own lies outside the folder: wherever a
name may stand, `package.module:NAME` may stand.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from grpo_latent.errors import ConfigError

Thing = TypeVar("Thing")
Kind = TypeVar("Kind")


class Registry(dict[str, Thing], Generic[Thing]):
    """The dict from names to things of one kind.

    >>> numbers = Registry("number", instance_of(int), lambda number: (f"n{number}",))
    >>> numbers.register(7), numbers.find("n7", "some.key")
    (7, 7)
    >>> numbers.find("sys:maxunicode", "some.key")
    1114111

    Args:
        noun: what a thing is called in messages.
        takes: the thing of what an import path names, None where that is none.
        names_of: the names of a thing.
    """

    def __init__(
        self,
        noun: str,
        takes: Callable[[Any], Thing | None],
        names_of: Callable[[Thing], Iterable[str]],
    ):
        super().__init__()
        self.noun = noun
        self._takes = takes
        self._names_of = names_of

    def register(self, thing: Thing) -> Thing:
        """Makes a thing known by its names, and returns it; idempotent; a decorator of classes.

        Raises:
            ConfigError: it has no name, or another one has it, which would change its meaning.
        """
        for name in self._names_of(thing) or ("",):
            if not name:
                raise ConfigError(
                    f"a {self.noun} without a name", where=self.noun, got=_described(thing)
                )
            known = self.setdefault(name, thing)
            if known is not thing:
                raise ConfigError(
                    f"two {self.noun}s of one name",
                    where=self.noun,
                    got=f"{name} of {_described(thing)}",
                    expected=f"a name that {_described(known)} does not have",
                )
        return thing

    def find(self, name: Any, where: str) -> Thing:
        """The thing of a registered name, or of an import path.

        Args:
            where: the key that has the name, for messages.

        Raises:
            ConfigError: unknown, not importable, or something else.
        """
        if isinstance(name, str) and name in self:
            return self[name]
        if not isinstance(name, str) or ":" not in name:
            raise ConfigError(
                f"unknown {self.noun}",
                where=where,
                got=name,
                expected=f"one of {sorted(self)}, or package.module:NAME",
            )
        return self.imported(name, where)

    def imported(self, path: str, where: str) -> Thing:
        """The thing that `package.module:NAME` names; errors as `find`."""
        module_name, _, attribute = path.partition(":")
        try:
            named = getattr(importlib.import_module(module_name), attribute)
            found = self._takes(named)
        # ValueError: no module name; TypeError: a class that takes arguments
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise ConfigError(
                f"cannot import the {self.noun}",
                where=where,
                got=f"{path}: {error}",
                expected=f"package.module:NAME of a {self.noun}",
                fix="Put the module's folder on PYTHONPATH.",
            ) from error
        if found is None:
            raise ConfigError(
                f"not a {self.noun}",
                where=where,
                got=f"{path}: {_described(named)}",
                expected=f"package.module:NAME of a {self.noun}",
            )
        return found


def subclass_of(kind: type[Kind]) -> Callable[[Any], type[Kind] | None]:
    """For a registry of classes: takes `kind` and what is made of it."""
    return lambda named: named if isinstance(named, type) and issubclass(named, kind) else None


def instance_of(kind: type[Kind]) -> Callable[[Any], Kind | None]:
    """For a registry of objects: takes one, or a class that makes one without arguments."""

    # however often a class is named, what it makes is one object: a second would be another of
    # the same name
    made: dict[type, Kind] = {}

    def take(named: Any) -> Kind | None:
        if isinstance(named, type) and issubclass(named, kind):
            if named not in made:
                made[named] = named()
            return made[named]
        return named if isinstance(named, kind) else None

    return take


def import_folder(package: str, path: Iterable[str]) -> None:
    """Imports every module of a package, so that each registers what it has.

    Args:
        package, path: its `__name__` and `__path__`.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def _described(thing: Any) -> str:
    if isinstance(thing, type):
        return f"{thing.__module__}.{thing.__qualname__}"
    return f"a {type(thing).__name__}"
