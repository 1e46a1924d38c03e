"""What `Mechanism.make` gets of the position before a latent.

Legend: M positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HiddenSource:
    """What a recorded vector is made of: the hidden state of the position before it.

    Attributes:
        hidden_MH: last hidden states after the final norm; leading dimensions may be any.
        logits: makes the logits [M, V] of the same hidden states, nothing masked, temperature 1.
        embed: token embeddings of ids of any shape.
    """

    hidden_MH: Tensor
    logits: Callable[[], Tensor]
    embed: Callable[[Tensor], Tensor]

    def mix(self, weights_MV: Tensor) -> Tensor:
        """Sum of the embeddings of all V tokens with these weights, [M, H].

        The embedding module is asked for its rows, not for its weight, of which FSDP may hold
        shards.
        """
        embeds_VH = self.embed(torch.arange(weights_MV.shape[-1], device=weights_MV.device))
        return weights_MV.to(embeds_VH.dtype) @ embeds_VH
