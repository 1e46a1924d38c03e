"""Rows to one right-padded batch, a dict of tensors as the Hugging Face Trainer moves it between devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo_latent.models.adapter import ImageInputs
from grpo_latent.sft.lvr.rows import IGNORED, SFTRow
from grpo_latent.trajectory import PositionKind


def collate(rows: Sequence[SFTRow]) -> dict[str, Tensor]:
    """B rows of at most T positions, N latents and M merged visual tokens in all.

    Returns:
        input_ids, kinds, labels: int64 [B, T]; valid: bool [B, T], False at padding.
        roi: int64 [N], row-major over the latent positions: index among the M visual tokens, or `END_VECTOR`.
        num_visual_tokens: int64 [B].
        pixel_values, image_grid_thw: of all rows in order; absent if no row has an image.
    """
    valid = pad_sequence([torch.ones_like(row.input_ids, dtype=torch.bool) for row in rows], batch_first=True)
    counts_B = torch.tensor([row.num_visual_tokens for row in rows])
    offsets = (counts_B.cumsum(0) - counts_B).tolist()
    roi = [
        torch.where(row.roi_N >= 0, row.roi_N + offset, row.roi_N) for row, offset in zip(rows, offsets, strict=True)
    ]
    batch = {
        "input_ids": pad_sequence([row.input_ids for row in rows], batch_first=True),
        "kinds": pad_sequence([row.kinds for row in rows], batch_first=True, padding_value=int(PositionKind.PROMPT)),
        "labels": pad_sequence([row.labels for row in rows], batch_first=True, padding_value=IGNORED),
        "valid": valid,
        "roi": torch.cat(roi),
        "num_visual_tokens": counts_B,
    }
    images = ImageInputs.concat([row.images for row in rows])
    if images is not None:
        batch |= {"pixel_values": images.pixel_values, "image_grid_thw": images.image_grid_thw}
    return batch
