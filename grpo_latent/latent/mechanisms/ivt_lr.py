"""IVT-LR (2510.12603): slots of the prompt, each behind the image embeddings most attended to.

The published code inserts them in the order of `topk(sorted=False)`, which is nobody's promise: on
CUDA it most likely is the order of their index, on the CPU neither that nor best first. The sets
are the same; the order moves logits by 1e-3 to 2e-3. By default they stand by index here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grpo_latent.latent.mechanisms.fed_back import check_choice, check_count
from grpo_latent.latent.mechanisms.registry import register
from grpo_latent.latent.mechanisms.slots import SlotMechanism

SELECTION_ORDERS = ("index", "attention")


@register
@dataclass(frozen=True)
class IVTLR(SlotMechanism):
    """`steps` slots, `top_k_image` chosen image embeddings before each.

    Attributes:
        top_k_image: image embeddings inserted before each slot; a row takes what is left.
        selection_order: how they stand there: `index`, in the order of the image, or `attention`,
            best first. Drawn and recorded ones keep the order in which they were drawn or
            recorded.
    """

    top_k_image: int = 32
    selection_order: str = "index"

    name: ClassVar[str] = "ivt_lr"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("top_k_image", self.top_k_image, 0)
        check_choice("selection_order", self.selection_order, SELECTION_ORDERS)
