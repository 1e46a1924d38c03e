"""Slots of the prompt (IVT-LR, Coconut): a completion begins with latent steps, then is text.

Sources: IVT-LR 2510.12603, Coconut 2412.06769.

    [prompt] [K image embeddings, chosen by attention] slot  [K more] slot  …  text

Engine `hf` runs them with the prompt (`models.slots`), engine `vllm` as the first positions that a
row decodes; the latent tokens of the tokenizer are placeholders, and none is ever sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from grpo_latent.latent.mechanisms.fed_back import FedBack
from grpo_latent.latent.mechanisms.protocol import Refusal
from grpo_latent.latent.mechanisms.row_states import RowStates
from grpo_latent.trajectory import PositionKind

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
    state_size: ClassVar[int] = 1
    min_steps: ClassVar[int] = 0
    positions = "1d"
    exit = "steps"

    def num_slots(self, steps: int | None) -> int:
        return self.steps if steps is None else steps

    def begin(
        self, model: nn.Module, steps_N: Tensor, max_spans_N: Tensor | None = None
    ) -> SlotRows:
        return SlotRows(torch.zeros_like(steps_N))

    def begin_at_prompt(self, model: nn.Module, steps_N: Tensor) -> SlotRows:
        return SlotRows(steps_N)

    def requests_without_latents(self) -> dict:
        return {"steps": 0}

    def refusals(self, engine: str) -> list[Refusal]:
        if engine == "hf" or not self.top_k_image:
            return []
        why = "vLLM gives no attention to select image positions by"
        return [Refusal("top_k_image", self.top_k_image, 0, why)]


class SlotRows(RowStates):
    """Rows of text behind slots.

    Args:
        slots_N: int64 [N], slots that still stand before the text; none where they have run with
            the prompt.
    """

    def __init__(self, slots_N: Tensor):
        super().__init__(slots_N)
        self.slots_N = slots_N
        self.num_fed_N = torch.zeros_like(slots_N)

    def plan(self, logits_NV: Tensor | None) -> Tensor:
        return self._text_N.masked_fill(~self.is_after_span_N, int(PositionKind.LATENT))

    def advance(self, kinds_N: Tensor, token_ids_N: Tensor, latents_NH: Tensor | None) -> Tensor:
        self.num_fed_N = self.num_fed_N + (kinds_N == PositionKind.LATENT)
        return kinds_N

    @property
    def is_after_span_N(self) -> Tensor:
        return self.num_fed_N >= self.slots_N

    def keep_rows(self, rows_M: Tensor) -> None:
        super().keep_rows(rows_M)
        self.slots_N = self.slots_N[rows_M]
        self.num_fed_N = self.num_fed_N[rows_M]

    def pack(self) -> tuple[Tensor, ...]:
        return (self.num_fed_N,)

    def unpack(self, columns: tuple[Tensor, ...]) -> None:
        (self.num_fed_N,) = columns
