"""Which family of mechanisms a method is made for: its rows and its forward know no other."""

from __future__ import annotations

from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import Mechanism, SlotMechanism, SpanMechanism

FAMILIES = {
    "spans": SpanMechanism,
    "slots": SlotMechanism,
}  # spans that the model opens, slots of the prompt


def check_family(mechanism: Mechanism, family: str, what: str) -> None:
    """Raises `ConfigError`, which begins with `what`, where the checkpoint's latents are of
    another family.
    """
    if not isinstance(mechanism, FAMILIES[family]):
        raise ConfigError(
            what,
            where="latent",
            got=f"mechanism {mechanism.key()}",
            expected=f"a mechanism of {family}, {FAMILIES[family].__name__}",
        )
