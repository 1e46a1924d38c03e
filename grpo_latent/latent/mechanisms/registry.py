"""Mechanisms by name, or by package.module:Class."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms.coconut import Coconut
from grpo_latent.latent.mechanisms.hybrid_gate import HybridGate
from grpo_latent.latent.mechanisms.ilvr import ILVR
from grpo_latent.latent.mechanisms.ivt_lr import IVTLR
from grpo_latent.latent.mechanisms.lvr import LVR
from grpo_latent.latent.mechanisms.own_slots import OwnSlots
from grpo_latent.latent.mechanisms.protocol import Mechanism

MECHANISMS: dict[str, type[Mechanism]] = {
    cls.name: cls for cls in (LVR, ILVR, IVTLR, Coconut, HybridGate, OwnSlots)
}


def mechanism_class(name: Any, where: str = "latent.mechanism") -> type[Mechanism]:
    """The class of a name in `MECHANISMS`, or of package.module:Class.

    >>> mechanism_class("ivt_lr").__name__
    'IVTLR'

    Raises:
        ConfigError: no such mechanism.
    """
    if name in MECHANISMS:
        return MECHANISMS[name]
    module_name, _, class_name = str(name).partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            "unknown mechanism",
            where=where,
            got=f"{name} ({error})",
            expected=f"one of {tuple(MECHANISMS)}, or package.module:Class",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Mechanism)):
        raise ConfigError(
            "not a mechanism", where=where, got=name, expected="a Mechanism subclass"
        )
    return found


def mechanism_config(name: str, ids: Mapping[str, int], **settings: Any) -> Mechanism:
    """The mechanism of this name as published, but for `settings`; see `Mechanism.from_tokens`."""
    return mechanism_class(name).from_tokens(ids, **settings)
