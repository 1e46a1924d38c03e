"""The off-by-one of tokens, in one place: which hidden state predicts what stands at a position.

    position    …   t - 2     t - 1       t           t + 1
    kind            TEXT      SELECTED    LATENT      TEXT
    predicted by                                      h_t
    chosen by                 h_{t-2}

What makes a latent is the mechanism's matter (`Mechanism.sources`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_latent.errors import LatentMismatchError
from grpo_latent.trajectory import PositionKind


def token_sources(mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the hidden states that predict the tokens at `mask_BT`, row-major.

    Args:
        mask_BT: bool, True at tokens.

    Raises:
        LatentMismatchError: a token in column 0.
    """
    rows_M, columns_M = mask_BT.nonzero(as_tuple=True)
    if bool((columns_M == 0).any()):
        raise LatentMismatchError(
            "position 0 has no predecessor", where="mask", got="an action at 0", expected=">= 1"
        )
    return rows_M, columns_M - 1


def last_sources(kinds_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """int64 [B, T]: the last position, at or before each, whose attention may choose an image's.

    Padding and SELECTED positions choose nothing; -1 where there is no other.
    """
    columns_T = torch.arange(kinds_BT.shape[1], device=kinds_BT.device)
    chooses_BT = (kinds_BT != PositionKind.SELECTED) & valid_BT
    return columns_T.masked_fill(~chooses_BT, -1).cummax(-1).values


def score_columns(mask_L: Tensor) -> Tensor:
    """int64 [M]: where verl's outputs score the True positions of `mask_L`, position t at t - 1.

    verl shifts afterwards.

    Args:
        mask_L: of rows that stand one after the other; each begins with a prompt, so that none
            scores the row before.
    """
    return mask_L.nonzero()[:, 0] - 1
