"""Measures how far latents collapse, from the recorded vectors alone.

Legend: G groups, N latent steps, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

MAX_VECTORS = 256  # of the singular values


def geometry(groups: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """Measures norm, cosines and effective rank of the latents of one training step.

    Args:
        groups: for each group its trajectories' latents [N, H].

    Returns:
        norm_mean, norm_std: of all latents.
        cosine_step_to_step: between consecutive latents of a trajectory.
        cosine_across_groups: between first latents of groups (1: collapsed, every prompt gets one
            latent).
        cosine_within_group: between the first latents of a group's trajectories (1: deterministic,
            the group explores text only).
        effective_rank: of the first latents, exp of the entropy of the normalised singular values
            (Roy & Vetterli 2007).
        What cannot be computed is left out.
    """
    groups = [[latents.float() for latents in group if len(latents)] for group in groups]
    groups = [group for group in groups if group]
    if not groups:
        return {}
    norms_N = torch.cat([latents for group in groups for latents in group]).norm(dim=-1)
    result = {"norm_mean": float(norms_N.mean()), "norm_std": float(norms_N.std(correction=0))}
    consecutive = [
        (normalize(z[1:], dim=-1) * normalize(z[:-1], dim=-1)).sum(-1)
        for g in groups
        for z in g
        if len(z) > 1
    ]
    if consecutive:
        result["cosine_step_to_step"] = float(torch.cat(consecutive).mean())
    within = [
        _mean_cosine(torch.stack([z[0] for z in group])) for group in groups if len(group) > 1
    ]
    if within:
        result["cosine_within_group"] = sum(within) / len(within)
    first_GH = torch.stack([group[0][0] for group in groups])
    if len(groups) > 1:
        result["cosine_across_groups"] = _mean_cosine(first_GH)
        shares = torch.linalg.svdvals(normalize(first_GH[:MAX_VECTORS], dim=-1))
        shares = shares / shares.sum()
        result["effective_rank"] = float(
            torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum())
        )
    return result


def _mean_cosine(vectors_NH: Tensor) -> float:
    """Averages the cosine over the pairs of different rows.

    It is (|sum of directions|² - sum of |direction|²) / (N (N - 1)).
    """
    # in float64: for latents that point everywhere the two sums nearly cancel
    directions = normalize(vectors_NH.double(), dim=-1)
    num = len(vectors_NH)
    return float(
        (directions.sum(0).square().sum() - directions.square().sum()) / (num * (num - 1))
    )
