"""The off-by-one of a sequence, in one place: which earlier position's hidden state makes what
stands at a position.

    position    …   t - 2     t - 1       t           t + 1
    kind            TEXT      SELECTED    LATENT      TEXT
    source                                h_{t-2}     h_t

A token is predicted at the position before it. A latent is fed from the last position before it
that is neither padding nor an inserted image embedding (SELECTED, which no hidden state makes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_latent.errors import LatentMismatchError
from grpo_latent.trajectory import PositionKind, made_mask


def token_sources(mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the hidden states that predict the tokens at the True positions of
    `mask_BT`, row-major.

    Raises:
        LatentMismatchError: a token in column 0.
    """
    rows_M, columns_M = mask_BT.nonzero(as_tuple=True)
    if bool((columns_M == 0).any()):
        raise LatentMismatchError(
            "position 0 has no predecessor", where="mask", got="an action at 0", expected=">= 1"
        )
    return rows_M, columns_M - 1


def is_source(kinds: Tensor, valid: Tensor) -> Tensor:
    """bool, same shape: positions whose hidden state may be fed."""
    return (kinds != PositionKind.SELECTED) & valid


def last_sources(kinds_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """int64 [B, T]: the last source at or before each position, -1 where there is none."""
    columns_T = torch.arange(kinds_BT.shape[1], device=kinds_BT.device)
    return columns_T.masked_fill(~is_source(kinds_BT, valid_BT), -1).cummax(-1).values


def latent_sources(kinds_BT: Tensor, valid_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the hidden state that made each recorded vector (`made_mask`), row-major.

    Args:
        valid_BT: bool, None where padding can only follow.
    """
    valid_BT = torch.ones_like(kinds_BT, dtype=torch.bool) if valid_BT is None else valid_BT
    before_BT = torch.nn.functional.pad(last_sources(kinds_BT, valid_BT)[:, :-1], (1, 0), value=-1)
    is_made_BT = made_mask(kinds_BT) & valid_BT
    return is_made_BT.nonzero(as_tuple=True)[0], before_BT[is_made_BT]


def last_hidden(hidden_BLH: Tensor, is_source_BL: Tensor, before_BH: Tensor) -> Tensor:
    """Hidden state [B, H] of each row's last source in a piece of its sequence; `before_BH` where
    the piece has none.
    """
    place_BL = torch.arange(1, is_source_BL.shape[1] + 1, device=hidden_BLH.device) * is_source_BL
    last_B = place_BL.amax(-1)
    found_BH = hidden_BLH.gather(
        1, (last_B - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden_BLH.shape[-1])
    )[:, 0]
    return torch.where((last_B > 0)[:, None], found_BH, before_BH)


def score_columns(mask_L: Tensor) -> Tensor:
    """int64 [M]: where verl's outputs score the True positions of `mask_L`: position t at t - 1
    (verl shifts afterwards).

    Args:
        mask_L: of rows that stand one after the other; each begins with a prompt, so none scores
            the row before.
    """
    return mask_L.nonzero()[:, 0] - 1
