"""Rows of groups laid out with each group's prompt once, and attention over that layout.

    rows [B, T]      prompt 0 | completion 0   packed [S]   prompt 0 | prompt 1 | completion 0 … 3
                     prompt 0 | completion 1      ──pack──▶
                     prompt 1 | completion 2      ◀─spread─     S = 2 prompts + 4 completions
                     prompt 1 | completion 3

Linear layers see S positions. Attention sees two blocks, each one call whatever the number of
groups: prompts among themselves [R, P], and completions [B, C] over keys [its prompt | itself].
What they may look at is the matrix of `models.visibility`, cut into these blocks. On CUDA it is
FlexAttention over the packed row, by the same rule as a `mask_mod`.

Legend: B sequences, T positions, S packed positions, R prompts, P prompt positions, C completion
positions, A attention heads (keys have fewer), D head dim, H hidden.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo_latent.models.groups import first_rows
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.models.visibility import (
    PackedVisibility,
    attention_bias,
    is_image_side,
    sighted_mask,
)
from grpo_latent.trajectory import PositionKind


class SharedRows:
    """The layout of one batch; made on the host, so that a device is waited for once.

    Args:
        sequences: padded, with `groups`; a row's completion follows its prompt without a gap.

    Attributes:
        shape: (B, T).
        index_S: int64, which of the B · T positions stands at each packed place.
        place_BT: int64, where each position is packed; those of a group's prompt are one. 0 at
            padding.
    """

    def __init__(self, sequences: LatentSequences):
        assert sequences.groups is not None and not sequences.is_packed
        self._sequences = sequences
        self._device = sequences.kinds_BT.device
        kinds_BT, valid_BT = sequences.kinds_BT.cpu(), sequences.valid_BT.cpu()
        self.shape = kinds_BT.shape
        num_rows, length = self.shape
        self._first_R, self._row_to_prompt_B = first_rows(sequences.groups)
        is_prompt_BT = valid_BT & (kinds_BT < PositionKind.TEXT)
        num_prompt_B = is_prompt_BT.sum(-1)
        num_completion_B = valid_BT.sum(-1) - num_prompt_B
        start_B = torch.arange(num_rows) * length + valid_BT.int().argmax(-1)
        prompt_RP, self._is_prompt_RP = _ranges(
            start_B[self._first_R], num_prompt_B[self._first_R]
        )
        completion_BC, self._is_completion_BC = _ranges(start_B + num_prompt_B, num_completion_B)
        is_kept = torch.cat([self._is_prompt_RP.flatten(), self._is_completion_BC.flatten()])
        index_S = torch.cat([prompt_RP.flatten(), completion_BC.flatten()])[is_kept]
        place = torch.zeros(num_rows * length, dtype=torch.long)
        place[index_S] = torch.arange(len(index_S))
        prompt_of_BP = place[prompt_RP][self._row_to_prompt_B]
        own_prompt_BP, is_own_BP = _ranges(start_B, num_prompt_B)
        place[own_prompt_BP[is_own_BP]] = prompt_of_BP[is_own_BP]
        self._has_padding = not bool(is_kept.all())
        self._kept = is_kept.nonzero()[:, 0].to(self._device)
        self._places = (
            place[prompt_RP].masked_fill(~self._is_prompt_RP, 0).to(self._device),
            place[completion_BC].masked_fill(~self._is_completion_BC, 0).to(self._device),
        )
        self.index_S = index_S.to(self._device)
        self.place_BT = place.view(self.shape).to(self._device)
        self._block_kinds(kinds_BT, start_B, num_prompt_B, num_completion_B)
        self._biases: dict[torch.dtype, tuple[Tensor | None, Tensor]] = {}

    def _block_kinds(
        self, kinds_BT: Tensor, start_B: Tensor, num_prompt_B: Tensor, num_completion_B: Tensor
    ) -> None:
        """Kinds and validity of each row as [its prompt, padded | its completion, padded]."""
        following_B = self._sequences.following_kinds_B
        if following_B is None:
            following_B = torch.full_like(num_prompt_B, int(PositionKind.PROMPT))
        longer_BT = torch.cat([kinds_BT, following_B.cpu()[:, None]], 1)
        rows_B = torch.arange(len(kinds_BT))
        column_B = start_B - rows_B * kinds_BT.shape[1] + num_prompt_B + num_completion_B
        next_B = longer_BT[rows_B, column_B]
        kinds = kinds_BT.flatten()
        prompt_BP, is_prompt_BP = _ranges(start_B, num_prompt_B)
        completion_BC, is_completion_BC = _ranges(start_B + num_prompt_B, num_completion_B)
        blocks = [
            kinds[prompt_BP].masked_fill(~is_prompt_BP, int(PositionKind.PROMPT)),
            kinds[completion_BC].masked_fill(~is_completion_BC, int(PositionKind.PROMPT)),
            torch.full_like(next_B, int(PositionKind.PROMPT))[:, None],
        ]
        block_BK = torch.cat(blocks, 1)
        # what follows a row's last position, for the rule asks it, wherever the block ends
        block_BK[rows_B, prompt_BP.shape[1] + num_completion_B] = next_B
        self._kinds_BK = block_BK
        self._valid_BK = torch.cat([is_prompt_BP, is_completion_BC], 1)

    # ---- rows in, rows out ----------------------------------------------------------------------

    def pack(self, values: Tensor, dim: int = 0) -> Tensor:
        """[…, 1, S, …] of values [B, T, H], or of what has its B at another `dim`."""
        packed = values.flatten(dim, dim + 1).index_select(dim, self.index_S)
        return packed.unsqueeze(dim)

    def spread(self, packed_1SH: Tensor) -> Tensor:
        """[B, T, H]: the states of a prompt in all rows of its group; any at all at padding."""
        spread_NH = packed_1SH[0].index_select(0, self.place_BT.flatten())
        return spread_NH.unflatten(0, self.shape)

    def spread_heads(self, packed_1ASD: Tensor) -> Tensor:
        """[B, A, T, D] of queries or keys."""
        spread = packed_1ASD[0].index_select(1, self.place_BT.flatten())
        return spread.unflatten(1, self.shape).transpose(0, 1)

    # ---- attention ------------------------------------------------------------------------------

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None
    ) -> Tensor:
        """[1, S, A, D] of queries [1, A, S, D] and keys and values [1, KV heads, S, D]."""
        prompt_bias, completion_bias = self._bias(query.dtype)
        options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": True}
        (prompt_q, own_q), (prompt_k, own_k), (prompt_v, own_v) = (
            self._blocks(packed) for packed in (query, key, value)
        )
        attended = F.scaled_dot_product_attention(
            prompt_q, prompt_k, prompt_v, prompt_bias, is_causal=prompt_bias is None, **options
        )
        outputs = [attended.transpose(1, 2).flatten(0, 1)]
        if own_q.shape[2]:
            attended = F.scaled_dot_product_attention(
                own_q,
                torch.cat([self._of_rows(prompt_k), own_k], 2),
                torch.cat([self._of_rows(prompt_v), own_v], 2),
                completion_bias,
                **options,
            )
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        output = torch.cat(outputs)
        if self._has_padding:
            output = output.index_select(0, self._kept)
        return output[None]

    def _blocks(self, packed_1ASD: Tensor) -> tuple[Tensor, Tensor]:
        """[R, A, P, D] and [B, A, C, D]; without padding views."""
        packed = packed_1ASD[0]
        shapes = [places.shape for places in self._places]
        if self._has_padding:
            flat = [packed.index_select(1, places.flatten()) for places in self._places]
        else:
            flat = list(packed.split([shape.numel() for shape in shapes], 1))
        prompt, own = (
            part.unflatten(1, shape).transpose(0, 1)
            for part, shape in zip(flat, shapes, strict=True)
        )
        return prompt, own

    def _of_rows(self, prompt_RAPD: Tensor) -> Tensor:
        """[B, A, P, D], the block of each row's prompt."""
        num_rows = len(self._row_to_prompt_B)
        if len(prompt_RAPD) == 1:
            return prompt_RAPD.expand(num_rows, -1, -1, -1)
        return prompt_RAPD.index_select(0, self._row_to_prompt_B.to(prompt_RAPD.device))

    def _bias(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """Additive, of prompts [R, 1, P, P] and of completions [B or 1, 1, C, P + C].

        None where the prompts' is causal: padding stands behind them, where no prompt looks.
        """
        if dtype not in self._biases:
            visibility = self._sequences.visibility
            length = self._is_prompt_RP.shape[1]
            # all alike, where there is nothing but a length to tell rows apart
            is_uniform = visibility == "full" and not self._has_padding
            rows = slice(0, 1) if is_uniform else slice(None)
            kinds_BK, valid_BK = self._kinds_BK[rows], self._valid_BK[rows]
            completion = attention_bias(
                kinds_BK[:, :-1], valid_BK, visibility, dtype, length, kinds_BK[:, -1]
            )
            prompt = None
            if visibility != "full":
                firsts = self._first_R
                prompt = attention_bias(
                    kinds_BK[firsts, :length], valid_BK[firsts, :length], visibility, dtype
                ).to(self._device)
            self._biases[dtype] = prompt, completion.to(self._device)
        return self._biases[dtype]

    @cached_property
    def packed_visibility(self) -> PackedVisibility:
        """The rule over the packed row, for kernels that ask about one pair at a time."""
        sequences, (_, length) = self._sequences, self.shape
        kinds_BT = sequences.kinds_BT
        rows_S, columns_S = self.index_S // length, self.index_S % length
        kinds_S = kinds_BT[rows_S, columns_S]
        sighted_BT = torch.ones_like(sequences.valid_BT)
        if sequences.visibility != "full":
            sighted_BT = sighted_mask(kinds_BT, sequences.following_kinds_B)
        return PackedVisibility(
            prompt_S=self._row_to_prompt_B.to(self._device)[rows_S],
            row_S=rows_S,
            is_prompt_S=kinds_S < PositionKind.TEXT,
            column_S=columns_S - sequences.valid_BT.int().argmax(-1)[rows_S],
            sighted_S=sighted_BT[rows_S, columns_S],
            is_image_side_S=is_image_side(kinds_S),
        )


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: SharedRows,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, None]:
    """Hugging Face attention interface, of a packed row; -> [1, S, A, D]."""
    if query.device.type != "cuda":
        return rows.attend(query, key, value, dropout, scaling), None
    from transformers.integrations.flex_attention import flex_attention_forward

    block_mask = rows.packed_visibility.block_mask
    output, _ = flex_attention_forward(
        module, query, key, value, block_mask, scaling, dropout=dropout
    )
    return output, None


def _ranges(start_N: Tensor, length_N: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [N, L], `length` numbers from `start` on, and bool [N, L], where they end; else 0."""
    columns_L = torch.arange(int(length_N.max()))
    is_in_NL = columns_L < length_N[:, None]
    return (start_N[:, None] + columns_L).masked_fill(~is_in_NL, 0), is_in_NL
