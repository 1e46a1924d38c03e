"""Feeds a row's latent positions other vectors than the model's own, while a batch decodes.

Legend: B prompts, N rows, M some of them, L positions fed at once, K vectors of an override, H
hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_latent.common.row_tensors import RowTensors
from grpo_latent.rollout.protocol import RolloutRequest, part_kinds, part_number
from grpo_latent.trajectory import PositionKind, made_mask


@dataclass
class FedRows(RowTensors):
    """Where each row of a batch is in its override; int64 [N].

    Attributes:
        prompt_N: its request.
        num_fed_N: positions of the override's part that it has been fed.
        num_latents_N: latents that it has been fed, of the part or not.
    """

    prompt_N: Tensor
    num_fed_N: Tensor
    num_latents_N: Tensor


class OverrideTable:
    """Holds the `LatentOverride`s of a batch, and how far each row is in its own.

    All of them as tensors by prompt, so that a step indexes and never loops over rows.

    Args:
        row_to_prompt_N: int64, the request of each row.
    """

    def __init__(self, requests: list[RolloutRequest], row_to_prompt_N: Tensor, hidden_size: int):
        device = row_to_prompt_N.device
        num_prompts = len(requests)
        overrides = [request.latent_override for request in requests]
        self.sizes_B = torch.zeros(num_prompts, dtype=torch.long, device=device)
        # the span or the latent that the part names; -1 where it names none, and takes all
        self.span_B = torch.full_like(self.sizes_B, -1)
        self.latent_B = torch.full_like(self.sizes_B, -1)
        self.has_kind_BK = torch.zeros(
            num_prompts, len(PositionKind), dtype=torch.bool, device=device
        )
        longest = max((len(o.vectors) for o in overrides if o is not None), default=0)
        self.vectors_BKH = torch.zeros(num_prompts, longest, hidden_size, device=device)
        for prompt_idx, override in enumerate(overrides):
            if override is None:
                continue
            self.sizes_B[prompt_idx] = len(override.vectors)
            self.vectors_BKH[prompt_idx, : len(override.vectors)] = override.vectors
            self.has_kind_BK[prompt_idx, part_kinds(override.part)] = True
            for unit, number_B in (("span", self.span_B), ("latent", self.latent_B)):
                number = part_number(override.part, unit)
                number_B[prompt_idx] = -1 if number is None else number
        self.is_empty = longest == 0
        self.rows = FedRows(
            row_to_prompt_N, torch.zeros_like(row_to_prompt_N), torch.zeros_like(row_to_prompt_N)
        )

    def feed(
        self, rows_M: Tensor, own_MLH: Tensor, kinds_ML: Tensor, used_ML: Tensor, span_M: Tensor
    ) -> Tensor:
        """What is fed, [M, L, H]: an override's vectors at its part's positions, else `own_MLH`.

        Args:
            rows_M: int64, the rows that feed L positions now.
            own_MLH: what the model made for them.
            kinds_ML: int64, `PositionKind`.
            used_ML: bool, False at padding.
            span_M: int64, the span that each row is in, from 0.
        """
        if self.is_empty:
            return own_MLH
        prompt_M = self.rows.prompt_N[rows_M]
        is_part_ML = used_ML & self.has_kind_BK[prompt_M].gather(1, kinds_ML)
        is_part_ML &= ((self.span_B[prompt_M] < 0) | (self.span_B[prompt_M] == span_M))[:, None]
        is_latent_ML = used_ML & made_mask(kinds_ML)
        # the number of the latent that a position belongs to: a chosen image embedding stands in
        # front of its latent, so the count excludes the position itself
        latent_ML = (
            self.rows.num_latents_N[rows_M][:, None]
            + is_latent_ML.long().cumsum(-1)
            - is_latent_ML.long()
        )
        self.rows.num_latents_N[rows_M] += is_latent_ML.sum(-1)
        is_part_ML &= (self.latent_B[prompt_M][:, None] < 0) | (
            self.latent_B[prompt_M][:, None] == latent_ML
        )
        # number i of a part gets vector i mod K; clamps keep rows without an override in range
        rank_ML = self.rows.num_fed_N[rows_M][:, None] + is_part_ML.long().cumsum(-1) - 1
        self.rows.num_fed_N[rows_M] += is_part_ML.sum(-1)
        vector_idx_ML = rank_ML.clamp(min=0) % self.sizes_B[prompt_M].clamp(min=1)[:, None]
        given_MLH = self.vectors_BKH[prompt_M[:, None], vector_idx_ML]
        return torch.where(is_part_ML[..., None], given_MLH.to(own_MLH.dtype), own_MLH)

    def keep_rows(self, rows_M: Tensor) -> None:
        """Goes on with the rows `rows_M` only."""
        self.rows = self.rows.keep(rows_M)
