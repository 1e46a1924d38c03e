"""How near latents are to the visual tokens of their boxes: alignment, not quality or use."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from grpo_latent.trajectory import Trajectory


def nearest_token_hits(
    trajectory: Trajectory, roi: Sequence[int], visual_MH: Tensor
) -> list[bool]:
    """Says of the first latents whether the nearest visual token (L2) is the ideal one.

    Says how well latents are *aligned* with the boxes, not whether they are used.
    """
    pairs = zip(trajectory.latents, roi, strict=False)
    return [
        int((visual_MH - latent).square().sum(-1).argmin()) == token for latent, token in pairs
    ]
