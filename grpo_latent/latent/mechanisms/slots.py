"""Slots of the prompt (IVT-LR, Coconut): a completion begins with latent steps, then is text.

Sources: IVT-LR 2510.12603, Coconut 2412.06769.

    [prompt] [K image embeddings, chosen by attention] slot  [K more] slot  …  text

`models.slots` runs them; the latent tokens of the tokenizer are placeholders, and none is ever
sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from grpo_latent.latent.mechanisms.fed_back import FedBack
from grpo_latent.latent.mechanisms.protocol import Refusal
from grpo_latent.latent.mechanisms.row_states import RowStates

# Coconut's three; only the middle one stands anywhere
SLOT_TOKENS = {"start": "<|start-latent|>", "latent": "<|latent|>", "end": "<|end-latent|>"}


@dataclass(frozen=True)
class SlotMechanism(FedBack):
    """`steps` slots at the beginning of every completion.

    Slots have a fixed number, no delimiters, and see the image; images are numbered as text is.
    """

    steps: int = 3

    published_tokens = SLOT_TOKENS
    has_slots: ClassVar[bool] = True
    min_steps: ClassVar[int] = 0
    positions = "1d"
    exit = "steps"

    def num_slots(self, steps: int | None) -> int:
        return self.steps if steps is None else steps

    def begin(
        self, model: nn.Module, steps_N: Tensor, max_spans_N: Tensor | None = None
    ) -> SlotRows:
        return SlotRows(steps_N)

    def requests_without_latents(self) -> dict:
        return {"steps": 0}

    def refusals(self, engine: str) -> list[Refusal]:
        refusals = super().refusals(engine)
        if refusals and self.top_k_image:
            why = "vLLM gives no attention to select image positions by"
            refusals.append(Refusal("top_k_image", self.top_k_image, 0, why))
        return refusals


class SlotRows(RowStates):
    """Rows of text: all latents stand before it."""

    @property
    def is_after_span_N(self) -> Tensor:
        return torch.ones_like(self._text_N, dtype=torch.bool)
