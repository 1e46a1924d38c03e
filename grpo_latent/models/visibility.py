"""Who may look at whom: the attention bias of `latent.visibility`, the only one in this package.

`full` is causal attention, as published. `latents_only` makes the latents the only channel from the image to the text:

    row (query)                                   sees image and `start` positions
    image placeholders, `start`                   yes (sighted)
    a latent that another latent follows          yes (it has to predict that one from the image)
    prompt text, sampled text, forced end,        no (blind): the question, the latents and other blind rows only
    the last latent of a span

With one latent a span the channel is closed exactly: swapping the image under recorded latents changes no log-prob.
With more, a sighted latent's keys and values carry image content beyond its input vector, so the channel leaks; the
two-pass form (a fresh context of question and latents) is closed for any length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_latent.errors import ConfigError
from grpo_latent.latent.config import VISIBILITIES
from grpo_latent.trajectory import PositionKind


def sighted_and_hidden(kinds_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that may see the image side, and columns of the image side, both bool [B, T]."""
    hidden_BT = (kinds_BT == PositionKind.VISION) | (kinds_BT == PositionKind.START)
    is_latent = kinds_BT == PositionKind.LATENT
    next_is_latent = torch.nn.functional.pad(is_latent[:, 1:], (0, 1))
    return hidden_BT | (is_latent & next_is_latent), hidden_BT


def attention_bias(
    kinds_BT: Tensor, valid_BT: Tensor, visibility: str, dtype: torch.dtype, query_start: int = 0
) -> Tensor:
    """Additive attention bias: 0 where row t may look at column s, the dtype's minimum elsewhere.

    Args:
        kinds_BT: int [B, T], `PositionKind` of each position.
        valid_BT: bool [B, T], False at padding, which no other row sees. Each row sees itself, so that no row is all minima,
            whose softmax would be uniform.
        visibility: `full` or `latents_only`.
        query_start: rows query_start..T-1 are returned.

    Returns:
        [B, 1, T - query_start, T].
    """
    batch_size, length = kinds_BT.shape
    device = kinds_BT.device
    causal = torch.ones(length - query_start, length, dtype=torch.bool, device=device).tril(diagonal=query_start)
    allowed = causal & valid_BT[:, None, :]
    if visibility == "latents_only":
        sighted_BT, hidden_BT = sighted_and_hidden(kinds_BT)
        allowed &= sighted_BT[:, query_start:, None] | ~hidden_BT[:, None, :]
    elif visibility != "full":
        raise ConfigError("unknown value", where="latent.visibility", got=visibility, expected=f"one of {VISIBILITIES}")
    rows = torch.arange(length - query_start, device=device)
    allowed[:, rows, rows + query_start] = True
    bias = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return bias.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
