"""IVT-LR (2510.12603): slots of the prompt, each behind the image embeddings most attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grpo_latent.latent.mechanisms.fed_back import check_count
from grpo_latent.latent.mechanisms.slots import SlotMechanism


@dataclass(frozen=True)
class IVTLR(SlotMechanism):
    """`steps` slots, `top_k_image` chosen image embeddings before each.

    Attributes:
    top_k_image: image embeddings inserted before each slot; a row takes what is left.
    """

    top_k_image: int = 32

    name: ClassVar[str] = "ivt_lr"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("top_k_image", self.top_k_image, 0)
