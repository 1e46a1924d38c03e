"""Which family of mechanisms a method is made for: its rows and its forward know no other."""

from __future__ import annotations

from grpo_latent.errors import ConfigError
from grpo_latent.latent.config import LatentConfig

FAMILIES = {"spans": "emitted", "slots": "prompt_slots"}  # spans that the model opens, slots of the prompt


def check_family(config: LatentConfig, family: str, what: str) -> None:
    """Raises `ConfigError`, which begins with `what`, where the checkpoint's latents are of another family."""
    if config.trigger != FAMILIES[family]:
        raise ConfigError(
            what,
            where="latent.trigger",
            got=f"{config.trigger} ({config.mechanism})",
            expected=f"{FAMILIES[family]}: a mechanism of {family}",
        )
