"""Latents of the current model at recorded positions, with three ways for a gradient to pass through them.

    cut       z is a constant:                     loss(θ, z₀)
    one_hop   z is made by one forward over z₀:    loss(θ, z(θ, z₀))      Monet's depth (2511.21395)
    bptt      z is made by the whole chain:        loss(θ, z(θ))          ILVR's stage 2, Coconut

z₀ are the current model's own latents as constants, so that all three have the same value and differ in gradient only.
"""

from __future__ import annotations

from torch import Tensor

from grpo_latent.errors import ConfigError
from grpo_latent.latent.treatments import GRADIENTS
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.head import feedback
from grpo_latent.models.replay import ReplayBatch, recompute_latents, replay_hidden, with_latents
from grpo_latent.models.shift import latent_sources
from grpo_latent.trajectory import PositionKind


def own_latents(adapter: ModelAdapter, batch: ReplayBatch, visibility: str, gradient: str) -> Tensor:
    """Latents [N, H] as the current model makes them for the recorded tokens; what `batch` holds at latent steps is not
    read.

    Args:
        gradient: `cut`, `one_hop` or `bptt`.
    """
    if gradient not in GRADIENTS:
        raise ConfigError("unknown value", where="latent gradient", got=gradient, expected=f"one of {GRADIENTS}")
    latents_NH = recompute_latents(adapter, batch, visibility, gradient=gradient == "bptt")
    if gradient != "one_hop" or latents_NH.shape[0] == 0:
        return latents_NH
    hidden_BTH = replay_hidden(adapter, with_latents(batch, latents_NH), visibility)
    own_N = (batch.kinds_BT == PositionKind.LATENT)[batch.latent_mask_BT]
    rows, columns = latent_sources(batch.kinds_BT, batch.valid_BT)
    made_NH = latents_NH.clone()
    made_NH[own_N] = feedback(adapter.model, hidden_BTH[rows, columns])
    return made_NH
