"""The two stages of ILVR's SFT as sums over a batch (2512.05665 section 3).

stage 1   teacher's targets as inputs   CE + weight · (1 - cos(h at t - 1, target + noise))
stage 2   own latents as inputs         CE, with back-propagation through the latents
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.recompute import MostOfRanks, recompute_latents
from grpo_latent.models.replay import replay_hidden
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.models.vision_cache import encoding_once
from grpo_latent.sft.common.images import batch_images
from grpo_latent.sft.common.losses import labels_cross_entropy
from grpo_latent.sft.ilvr.distillation import noisy_cosine_distances
from grpo_latent.trajectory import PositionKind


def stage1_loss_sums(
    adapter: ModelAdapter, batch: dict[str, Tensor], mechanism: Mechanism, noise_std: float = 0.01
) -> dict[str, Tensor]:
    """Sums CE over labels (`ce`) and distances over targets (`latent`); float32 scalars.

    Args:
        batch: of `with_targets`.
    """
    sequences = _sequences(
        adapter, batch, batch["targets"].detach().to(adapter.dtype), mechanism.visibility
    )
    hidden_BTH = replay_hidden(adapter, sequences)
    predicted_NH = adapter.make(hidden_BTH[sequences.sources(adapter.mechanism)])
    return {
        "ce": labels_cross_entropy(adapter, hidden_BTH, batch["labels"]),
        "latent": noisy_cosine_distances(predicted_NH, batch["targets"], noise_std).sum(),
    }


def stage2_loss_sums(
    adapter: ModelAdapter,
    batch: dict[str, Tensor],
    mechanism: Mechanism,
    gradient: str = "bptt",
    most_of_ranks: MostOfRanks | None = None,
) -> dict[str, Tensor]:
    """Sums CE over labels (`ce`) of a batch, all latents fed by the model itself.

    Args:
        gradient: through the latents, see `models.recompute`; the published stage 2 is `bptt`.
        most_of_ranks: of a sharded model, whose ranks need one number of forwards.
    """
    num_latents = int(((batch["kinds"] == PositionKind.LATENT) & batch["valid"]).sum())
    nothing_NH = torch.zeros(
        num_latents, adapter.hidden_size, device=adapter.device, dtype=adapter.dtype
    )
    sequences = _sequences(adapter, batch, nothing_NH, mechanism.visibility)
    # the forwards over one batch show the same images
    with encoding_once(adapter.backbone):
        latents_NH = recompute_latents(adapter, sequences, gradient, most_of_ranks)
        hidden_BTH = replay_hidden(adapter, sequences.with_latents(latents_NH))
    return {"ce": labels_cross_entropy(adapter, hidden_BTH, batch["labels"])}


def _sequences(
    adapter: ModelAdapter, batch: dict[str, Tensor], latents_NH: Tensor, visibility: str
) -> LatentSequences:
    return LatentSequences.build(
        adapter,
        batch["input_ids"],
        batch["kinds"],
        batch["valid"],
        latents_NH,
        visibility,
        batch_images(batch),
    )
