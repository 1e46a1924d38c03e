"""What commands without a config share: ranges of arguments, settings of a mechanism.

Ranges are in the kinds and with the messages of a config's keys.

`argparse` tells of types; its `type` cannot tell of a range with what was got and expected.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import Any

from grpo_latent.common.kinds import Kind
from grpo_latent.errors import ConfigError


def check_arguments(args: Namespace, **kinds: Kind) -> None:
    """Raises `ConfigError` at the first argument that is not of its kind.

    >>> from grpo_latent.common.kinds import whole
    >>> check_arguments(Namespace(max_latents=0), max_latents=whole(1))
    Traceback (most recent call last):
        ...
    grpo_latent.errors.ConfigError: --max-latents: out of range; got 0; expected a whole number >= 1.
    """
    for name, kind in kinds.items():
        value = getattr(args, name)
        if value is None and kind.or_null:
            continue
        if not (kind.is_typed(value) and kind.holds(value)):
            raise ConfigError(
                "out of range",
                where=f"--{name.replace('_', '-')}",
                got=value,
                expected=kind.words(),
            )


def add_settings(parser: ArgumentParser) -> None:
    """Adds `--set`, which gives a mechanism its settings."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="of the mechanism, such as steps=4",
    )


def read_settings(args: Namespace) -> dict[str, Any]:
    """What `--set` was given."""
    return dict(map(parse_setting, args.set))


def parse_setting(text: str) -> tuple[str, Any]:
    """Name and value, read as JSON where it is that, else as it stands.

    >>> parse_setting("steps=4"), parse_setting("answer_token=####")
    (('steps', 4), ('answer_token', '####'))
    """
    name, has_value, value = text.partition("=")
    if not has_value:
        raise ConfigError("not a setting", where="--set", got=text, expected="SETTING=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
