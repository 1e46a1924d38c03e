"""Mechanisms by name; `common.registry` says how all registries work."""

from __future__ import annotations

from grpo_latent.common.registry import Registry, subclass_of
from grpo_latent.latent.mechanisms.protocol import Mechanism

MECHANISMS: Registry[type[Mechanism]] = Registry(
    "mechanism", subclass_of(Mechanism), lambda cls: (cls.name,)
)
register = MECHANISMS.register
