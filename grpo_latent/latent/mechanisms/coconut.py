"""Coconut (2412.06769): slots of the prompt, h alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grpo_latent.latent.mechanisms.registry import register
from grpo_latent.latent.mechanisms.slots import SlotMechanism


@register
@dataclass(frozen=True)
class Coconut(SlotMechanism):
    """`steps` slots, no image embeddings."""

    name: ClassVar[str] = "coconut"
