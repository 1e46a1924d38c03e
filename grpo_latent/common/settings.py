"""A settings dataclass out of a config's mapping, strictly.

No key is ignored, no value is taken for another type. The dataclass is the schema: its fields are
the keys, their annotations the types, a field without a default is a value that the user must
give. What a value may be beyond its type, the class checks itself in `__post_init__`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from grpo_latent.common.spelling import nearest_fix
from grpo_latent.errors import ConfigError, GrpoLatentError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MISSING = "???"  # OmegaConf's mark of a value that the user has to set
SHOWN_KEYS = 20

Settings = TypeVar("Settings", bound="DataclassInstance")


def build(
    kind: type[Settings],
    values: Mapping[str, Any] | None,
    where: str,
    *,
    note: str = "",
    given: Mapping[str, Any] | None = None,
    error: type[GrpoLatentError] = ConfigError,
) -> Settings:
    """A `kind` with the fields that `values` has, the defaults for the others.

    A list becomes a tuple, and a single value a tuple of one, where the field is a tuple; a
    mapping becomes a dataclass where the field is one. Other values stay as they are: an int that
    a float field takes remains an int.

    >>> @dataclasses.dataclass
    ... class Sizes:
    ...     rows: int
    ...     names: tuple[str, ...] = ()
    >>> build(Sizes, {"rows": 3, "names": "a"}, "sizes")
    Sizes(rows=3, names=('a',))
    >>> build(Sizes, {"row": 3}, "sizes")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    grpo_latent.errors.ConfigError: sizes: unknown key; got ['row']; expected among ['rows']. ...

    Args:
        values: keys and values of a config section, plain or OmegaConf's; None counts as empty.
        where: name of the section, for messages and for the override that they suggest.
        note: added to the expected keys of a message, such as ` of method lvr`.
        given: fields that the caller has built; not keys of the section.
        error: type of what is raised; another one than `ConfigError` for a file, which no override
            changes.

    Raises:
        error: not a mapping, a key is unknown or missing, or a value is not of its field's type.
    """
    given = dict(given or {})
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init and f.name not in given}
    required = [name for name, field in fields.items() if _is_required(field)]
    check_keys(
        {} if values is None else values, fields, where, required=required, note=note, error=error
    )
    hints = _hints(kind)
    built = {
        name: _convert(hints.get(name, Any), value, f"{where}.{name}", error)
        for name, value in (values or {}).items()
    }
    return kind(**built, **given)


def check_keys(
    values: object,
    known: Collection[str],
    where: str,
    *,
    required: Iterable[str] = (),
    note: str = "",
    error: type[GrpoLatentError] = ConfigError,
) -> None:
    """Refuses what is no mapping, keys that are not `known`, and `required` ones that are missing.

    `???` counts as missing.

    Raises:
        error: the first of the three that is found; an unknown key is shown with the known ones
            that look like it.
    """
    if not isinstance(values, Mapping):
        raise error("not a section", where=where, got=values, expected=f"keys {sorted(known)}")
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        near = [name for key in unknown for name in difflib.get_close_matches(key, known)]
        shown = list(dict.fromkeys(near)) or sorted(known)[:SHOWN_KEYS]
        nearest = f"Write {where}.{shown[0]}, the nearest spelling."
        raise error(
            "unknown key",
            where=where,
            got=unknown,
            expected=f"among {shown}{note}",
            fix=nearest if near and error is ConfigError else None,
        )
    absent = sorted(name for name in required if _is_absent(values, name))
    if absent:
        fix = f"Set {where}.{absent[0]}=… on the command line." if error is ConfigError else None
        raise error(
            "missing value",
            where=where,
            got=f"no {', '.join(absent)}",
            expected="a value",
            fix=fix,
        )


def check_types(kind: type, values: Mapping[str, Any], where: str) -> None:
    """Refuses values of another type than the field's of a dataclass that is somebody else's.

    Raises:
        ConfigError: the first of them.
    """
    hints = _hints(kind)
    for name, value in values.items():
        _convert(hints.get(name, Any), value, f"{where}.{name}", ConfigError)


def section(node: object, where: str) -> dict[str, Any]:
    """A config's section as plain values, its references resolved.

    Args:
        node: plain or OmegaConf's; None counts as empty.

    Raises:
        ConfigError: a list or a single value.
    """
    from omegaconf import OmegaConf  # here: settings of plain values need no OmegaConf

    values = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError("not a section", where=where, got=values, expected="keys and values")
    return {str(key): value for key, value in values.items()}


def check_choice(value: object, allowed: Collection[str], where: str, note: str = "") -> None:
    """Raises `ConfigError` where `value` is none of `allowed`."""
    if value not in allowed:
        raise ConfigError(
            "unknown value",
            where=where,
            got=value,
            expected=f"one of {tuple(allowed)}{note}",
            fix=nearest_fix(f"Set {where}={{}}", value, allowed),
        )


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_absent(values: Mapping[str, Any], name: str) -> bool:
    return name not in values or (isinstance(values[name], str) and values[name] == MISSING)


def _hints(kind: type) -> dict[str, Any]:
    """Types of the fields; {} where they are not to be had.

    A class of the user's may name types that exist for a type checker only: it goes unchecked.
    """
    try:
        return typing.get_type_hints(kind)
    except NameError:
        return {}


def _convert(hint: Any, value: Any, where: str, error: type[GrpoLatentError]) -> Any:
    """`value` as a field annotated with `hint` holds it."""
    options = _options(hint)
    if value is None and type(None) in options:
        return None
    for option in options:
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return value if isinstance(value, option) else build(option, value, where, error=error)
        if typing.get_origin(option) is tuple:
            return _tuple(option, value, where, error)
    if isinstance(value, float) and math.isnan(value):
        raise error("not a number", where=where, got="nan", expected=_names(options))
    if not any(_fits(option, value) for option in options):
        raise error("wrong type", where=where, got=repr(value), expected=_names(options))
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    """Members of a union; any other hint is a union of one."""
    return (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )


def _tuple(hint: Any, value: Any, where: str, error: type[GrpoLatentError]) -> tuple:
    if not _is_list(value):
        if value is None:
            raise error("wrong type", where=where, got="None", expected=_names([hint]))
        value = (value,)
    members = typing.get_args(hint)
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    elif not members:
        members = (Any,) * len(value)
    elif len(members) != len(value):
        raise error(
            "wrong length", where=where, got=list(value), expected=f"{len(members)} values"
        )
    return tuple(
        _convert(m, v, f"{where}[{i}]", error)
        for i, (m, v) in enumerate(zip(members, value, strict=True))
    )


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _fits(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    # what is no class (a TypeVar, a string) says nothing that can be checked here
    if origin is Any or not isinstance(origin, type):
        return True
    if isinstance(value, bool):  # Python's True is an int, a user's is not
        return origin in (bool, object)
    if origin is float:
        return isinstance(value, int | float)
    if origin is dict:
        return isinstance(value, Mapping)
    if origin is list:
        return _is_list(value)
    return isinstance(value, origin)


def _names(options: Iterable[Any]) -> str:
    """The types as their annotation reads.

    >>> _names([int, type(None)]), _names([tuple[str, ...]])
    ('int | None', 'tuple[str, ...]')
    """
    names = [
        "None"
        if option is type(None)
        else option.__name__
        if type(option) is type
        else str(option)
        for option in options
    ]
    return " | ".join(names)
