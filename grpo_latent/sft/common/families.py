"""Which family of mechanisms a method is made for: its rows and its forward know no other."""

from __future__ import annotations

from typing import TypeVar

from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import Mechanism

Family = TypeVar("Family", bound=Mechanism)


def check_family(mechanism: Mechanism, family: type[Family], what: str) -> Family:
    """Returns the mechanism as one of the family: spans that a model opens, or slots of a prompt.

    Raises:
        ConfigError: the checkpoint's latents are of another; the message begins with `what`.
    """
    if not isinstance(mechanism, family):
        raise ConfigError(
            what,
            where="latent",
            got=f"mechanism {mechanism.key()}",
            expected=f"a mechanism that is a {family.__name__}",
        )
    return mechanism
