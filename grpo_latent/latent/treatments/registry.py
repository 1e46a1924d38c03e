"""Treatments by name; `common.registry` says how all registries work."""

from __future__ import annotations

from grpo_latent.common.registry import Registry, subclass_of
from grpo_latent.latent.treatments.protocol import Treatment

TREATMENTS: Registry[type[Treatment]] = Registry(
    "treatment", subclass_of(Treatment), lambda cls: (cls.name,)
)
register = TREATMENTS.register


def names_without_parameters() -> str:
    """The treatments, for messages, that run where no parameters of theirs are kept."""
    return ", ".join(sorted(name for name, cls in TREATMENTS.items() if not cls().has_parameters))
