"""`mask`: latents are recorded inputs, not actions (the default; 2509.24251's masking with exact
replay).
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_latent.latent.treatments.protocol import Treatment


@dataclass(frozen=True)
class Mask(Treatment):
    """The protocol's defaults: h is fed as it is, replayed as recorded, and has no density."""
