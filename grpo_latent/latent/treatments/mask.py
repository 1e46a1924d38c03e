"""`mask`, the default: latents are recorded inputs, not actions (2509.24251, replayed exactly)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grpo_latent.latent.treatments.protocol import Treatment
from grpo_latent.latent.treatments.registry import register


@register
@dataclass(frozen=True)
class Mask(Treatment):
    """Feeds h as it is, replays it as recorded, gives it no density: the protocol's defaults.

    Trajectories of a group with the same tokens before a latent then share it: they explore text
    alone, and RL can reward a right answer that was read off a wrong latent.
    """

    name: ClassVar[str] = "mask"
