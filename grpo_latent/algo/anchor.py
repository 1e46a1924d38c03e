"""The latent anchor: how far the prediction of a latent has moved from the reference's."""

from __future__ import annotations

from torch import Tensor

_LEAST_VARIANCE = 1e-8


def anchor_distances(means_MH: Tensor, ref_means_MH: Tensor) -> Tensor:
    """mean_H (mu - mu_ref)² / var_H(mu_ref), float32 [M] with gradient to `means_MH`.

    The variance is that of the reference's own vector over its dimensions: scale-free, and
    independent of the batch.

    Args:
        means_MH: float, of the current model.
        ref_means_MH: float, of the reference; no gradient flows there.

    >>> import torch
    >>> anchor_distances(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, -1.0]]))
    tensor([1.])
    """
    reference_MH = ref_means_MH.detach().float()
    variance_M = reference_MH.var(-1, correction=0).clamp(min=_LEAST_VARIANCE)
    return (means_MH.float() - reference_MH).square().mean(-1) / variance_M
