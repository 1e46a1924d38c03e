"""`RowStates`: where the rows of a batch stand while they are decoded; made by `Mechanism.begin`.

    plan ─▶ kinds ─▶ the engine puts a token or a vector there ─▶ advance ─▶ plan …

Legend: N rows of a batch, M of them, V vocabulary, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_latent.trajectory import PositionKind


class RowStates:
    """Where each of N rows stands. By itself: rows that hold sampled text and nothing else.

    It decides and runs no model: `plan` says what each next position is, `advance` is told what
    was put there. Nothing here waits for the device.
    """

    is_bounded = False  # whether `may_open_N` is ever False

    def __init__(self, like_N: Tensor):
        """`like_N`: a tensor [N] on the rows' device."""
        self._text_N = torch.full_like(like_N, int(PositionKind.TEXT), dtype=torch.long)

    def plan(self, logits_NV: Tensor | None) -> Tensor:
        """Kind of each row's next position, int64 [N].

        TEXT (a token is to be sampled), MIXED (a token is to be sampled, and a vector recorded
        beside it), LATENT (a vector is to be made), or FORCED (the mechanism's own token).

        Args:
            logits_NV: of the last position; None unless the mechanism `reads_logits`.
        """
        return self._text_N

    def advance(self, kinds_N: Tensor, token_ids_N: Tensor, latents_NH: Tensor | None) -> Tensor:
        """Takes note of what stands at the position that `plan` announced.

        Returns its final kinds, int64 [N]: TEXT may become START.

        Args:
            kinds_N: as planned, except that rows which have stopped hold TEXT.
            token_ids_N: sampled ids; meaningful at TEXT and MIXED only.
            latents_NH: recorded vectors, meaningful at LATENT and MIXED; None unless the mechanism
                `reads_latents`.
        """
        return kinds_N

    @property
    def may_open_N(self) -> Tensor:
        """bool [N], rows that may still open a span; elsewhere `opening_ids` are banned."""
        return torch.ones_like(self._text_N, dtype=torch.bool)

    @property
    def span_N(self) -> Tensor:
        """int64 [N], number of the span that each row is in or was in last, from 0."""
        return torch.zeros_like(self._text_N)

    @property
    def is_last_latent_N(self) -> Tensor:
        """bool [N], asked after `advance`: what was put is the last latent of its span."""
        return torch.zeros_like(self._text_N, dtype=torch.bool)

    @property
    def is_after_span_N(self) -> Tensor:
        """bool [N], asked after `advance`: latents came before, and the row is in no span now."""
        return torch.zeros_like(self._text_N, dtype=torch.bool)

    def keep_rows(self, rows_M: Tensor) -> None:
        """Goes on with the rows `rows_M` only."""
        self._text_N = self._text_N[rows_M]

    def pack(self) -> tuple[Tensor, ...]:
        """What `advance` changes, as `Mechanism.state_size` integer columns [N].

        An engine may keep them for each position.
        """
        return ()

    def unpack(self, columns: tuple[Tensor, ...]) -> None:
        """Takes over what `pack` gave, int64 columns [N]."""
