"""`recompute`: the update feeds the *current* policy's latents, so text trains what made them.

LVR's RL recomputes without a gradient (2509.24251 section 3.3: `cut`); Monet's depth is `one_hop`,
Coconut's and ILVR's `bptt`. Old and reference log-probs are those of the recorded latents: the
rollout's policy made them, and old, reference and new scores share their inputs as long as the
weights are those of the rollout. One update costs one forward more for each latent of the longest
row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grpo_latent.common.settings import check_choice
from grpo_latent.latent.treatments.protocol import GRADIENTS, Treatment
from grpo_latent.latent.treatments.registry import register


@register
@dataclass(frozen=True)
class Recompute(Treatment):
    """Makes the latents anew in the update's forward; rollouts are those of `mask`.

    Attributes:
        gradient: `cut`, `one_hop` or `bptt`, what flows from the text into the making of its
            latents.
    """

    name: ClassVar[str] = "recompute"
    gradient: str = "cut"

    def __post_init__(self) -> None:
        check_choice(self.gradient, GRADIENTS, "latent.treatment.recompute.gradient")
