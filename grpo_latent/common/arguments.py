"""Ranges of command-line arguments, in the kinds and with the messages of a config's keys.

`argparse` tells of types; its `type` cannot tell of a range with what was got and expected.
"""

from __future__ import annotations

from argparse import Namespace

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
