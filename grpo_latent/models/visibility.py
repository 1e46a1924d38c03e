"""Who may look at whom: the attention bias of `latent.visibility`, the only one in this package.

One rule, `is_sighted` and `is_image_side`, in three forms: a matrix over whole sequences
(`attention_bias`), a row at a time for sequences that grow (`GrowingVisibility`), and a pair at a
time for groups that share their prompt in one packed row (`PackedVisibility`).

`full` is causal attention, as published. `latents_only` makes the latents the only channel from
the image to the text:

    row (query)                              sees the image side: image and `start` positions
    image placeholders, `start`              yes (sighted)
    a latent that another latent follows     yes (it has to predict that one from the image)
    prompt text, sampled text, forced end,   no (blind): the question, the latents and other
    the last latent of a span                blind rows only

With one latent a span the channel is closed exactly: swapping the image under recorded latents
changes no log-prob. With more, a sighted latent's keys and values carry image content beyond its
input vector, so the channel leaks; the two-pass form (a fresh context of question and latents) is
closed for any length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from grpo_latent.common.settings import check_choice
from grpo_latent.latent.mechanisms import VISIBILITIES
from grpo_latent.trajectory import PositionKind


def is_image_side(kinds: Tensor) -> Tensor:
    """bool, same shape: positions of the image side, which blind positions do not see."""
    return (kinds == PositionKind.VISION) | (kinds == PositionKind.START)


def is_sighted(kinds: Tensor, is_before_latent: Tensor) -> Tensor:
    """bool, same shape: positions that see the image side.

    Args:
        is_before_latent: bool, a LATENT position follows.
    """
    return is_image_side(kinds) | ((kinds == PositionKind.LATENT) & is_before_latent)


def sighted_mask(kinds_BT: Tensor, following_kinds_B: Tensor | None = None) -> Tensor:
    """bool [B, T], `is_sighted` of whole sequences; arguments as `attention_bias`."""
    before_latent_BT = torch.nn.functional.pad((kinds_BT == PositionKind.LATENT)[:, 1:], (0, 1))
    if following_kinds_B is not None:
        before_latent_BT[:, -1] = following_kinds_B == PositionKind.LATENT
    return is_sighted(kinds_BT, before_latent_BT)


def check_visibility(visibility: str) -> None:
    """Raises `ConfigError` unless it is one of `VISIBILITIES`."""
    check_choice(visibility, VISIBILITIES, "latent.visibility")


def attention_bias(
    kinds_BT: Tensor,
    valid_BT: Tensor,
    visibility: str,
    dtype: torch.dtype,
    query_start: int = 0,
    following_kinds_B: Tensor | None = None,
) -> Tensor:
    """Additive attention bias: 0 where row t may look at column s, the dtype's minimum elsewhere.

    Args:
        kinds_BT: int [B, T], `PositionKind` of each position.
        valid_BT: bool [B, T], False at padding, which no other row sees. Each row sees itself, so
            that no row is all minima, whose softmax would be uniform.
        visibility: `full` or `latents_only`.
        query_start: rows query_start..T-1 are returned.
        following_kinds_B: int [B], of the position after the last, which the rule asks for; None
            where none follows.

    Returns:
        [B, 1, T - query_start, T].
    """
    check_visibility(visibility)
    length = kinds_BT.shape[1]
    device = kinds_BT.device
    causal = torch.ones(length - query_start, length, dtype=torch.bool, device=device).tril(
        diagonal=query_start
    )
    allowed = causal & valid_BT[:, None, :]
    if visibility == "latents_only":
        sighted_BT = sighted_mask(kinds_BT, following_kinds_B)
        allowed &= sighted_BT[:, query_start:, None] | ~is_image_side(kinds_BT)[:, None, :]
    rows = torch.arange(length - query_start, device=device)
    allowed[:, rows, rows + query_start] = True
    bias = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return bias.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


class GrowingVisibility:
    """The rule for N sequences that grow by a position at a time: `see` is the matrix's next row.

    It keeps the bias of the coming rows over all columns, once for sighted and once for blind
    positions, so that a step costs a view, or one choice between the two.

    Legend: N sequences, P positions of the prompts, S positions so far, M sequences that are kept.

    Args:
        kinds_NP, valid_NP: of what the sequences begin with.
        capacity: positions to hold in all.
        may_blind: whether `see` may be told to hide images from positions that `full` lets see
            them (causal ablations).
    """

    def __init__(
        self,
        kinds_NP: Tensor,
        valid_NP: Tensor,
        capacity: int,
        visibility: str,
        dtype: torch.dtype,
        may_blind: bool = False,
    ):
        check_visibility(visibility)
        self.has_sighted = visibility == "latents_only"
        self._minimum = torch.finfo(dtype).min
        num_rows, self.length = kinds_NP.shape
        self._sighted_NS = torch.zeros(num_rows, capacity, dtype=dtype, device=kinds_NP.device)
        self._sighted_NS[:, : self.length].masked_fill_(~valid_NP, self._minimum)
        self._blind_NS: Tensor | None = None
        if self.has_sighted or may_blind:
            self._blind_NS = self._sighted_NS.clone()
            self._blind_NS[:, : self.length].masked_fill_(is_image_side(kinds_NP), self._minimum)

    def see(
        self,
        kinds_N: Tensor,
        is_before_latent_N: Tensor | None = None,
        is_blind_N: Tensor | None = None,
    ) -> Tensor:
        """Additive bias [N, S] of each sequence's next position over all so far and itself.

        Args:
            kinds_N: int64, its kind.
            is_before_latent_N: bool, a LATENT position will follow; read where `has_sighted`.
            is_blind_N: bool, `full` hides images from it; None from no one. With `latents_only`,
                which hides them from all text anyway, it is not read.
        """
        column = self.length
        self.length += 1
        sighted_NS = self._sighted_NS[:, : self.length]
        if self.has_sighted:
            assert self._blind_NS is not None and is_before_latent_N is not None
            self._blind_NS[:, column].masked_fill_(is_image_side(kinds_N), self._minimum)
            sees_N1 = is_sighted(kinds_N, is_before_latent_N)[:, None]
            return torch.where(sees_N1, sighted_NS, self._blind_NS[:, : self.length])
        if is_blind_N is not None:
            assert self._blind_NS is not None, "made without `may_blind`"
            return torch.where(is_blind_N[:, None], self._blind_NS[:, : self.length], sighted_NS)
        return sighted_NS

    def keep_rows(self, rows_M: Tensor) -> None:
        """Goes on with the sequences `rows_M` only."""
        self._sighted_NS = self._sighted_NS[rows_M]
        if self._blind_NS is not None:
            self._blind_NS = self._blind_NS[rows_M]


@dataclass(frozen=True)
class PackedVisibility:
    """The rule for one packed row of prompts and of the completions that share them.

    Legend: S packed positions.

    Attributes:
        prompt_S: int64, the prompt that a position is in, or stands behind.
        row_S: int64, the sequence of a completion's position; any at all in a prompt.
        is_prompt_S: bool, all sequences behind the prompt share it.
        column_S: int64, the place in the sequence, prompt and completion counted through.
        sighted_S: bool, sees the image side.
        is_image_side_S: bool.
    """

    prompt_S: Tensor
    row_S: Tensor
    is_prompt_S: Tensor
    column_S: Tensor
    sighted_S: Tensor
    is_image_side_S: Tensor

    @property
    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Whether a query's position may look at a key's, as FlexAttention asks it."""
        # tensors of its own: with those of an object it failed (torch 2.13; cause not found)
        prompt_S, row_S, is_prompt_S = self.prompt_S, self.row_S, self.is_prompt_S
        column_S, sighted_S, is_image_side_S = self.column_S, self.sighted_S, self.is_image_side_S

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            is_of_sequence = is_prompt_S[key] | (row_S[key] == row_S[query])
            is_before = column_S[key] <= column_S[query]
            is_shown = sighted_S[query] | ~is_image_side_S[key]
            is_seen = (prompt_S[key] == prompt_S[query]) & is_of_sequence & is_before & is_shown
            return is_seen | (query == key)

        return sees

    @cached_property
    def block_mask(self) -> BlockMask:
        """The rule as FlexAttention takes it, of one head for all."""
        length, device = len(self.row_S), self.row_S.device
        # compiled, so that no S x S matrix is made
        return create_block_mask(
            self.mask_mod, None, None, length, length, device, _compile=device.type == "cuda"
        )
