"""Slots of the prompt: their rollout against replay; recorded choices scored by one forward."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.attention_rows import recording_rows
from grpo_latent.models.recompute import recompute_latents
from grpo_latent.models.replay import replay, replay_hidden
from grpo_latent.models.sequences import LatentSequences, collate
from grpo_latent.models.slot_choice_scores import SlotChoices, choice_log_probs, slot_choices
from grpo_latent.trajectory import PositionKind as K


def scored(
    adapter: ModelAdapter, batch: LatentSequences, temperature: float
) -> tuple[SlotChoices, Tensor]:
    """(choices, log-probs) of a batch by one forward that records the slots' rows."""
    is_image_BT = (
        (batch.input_ids_BT == adapter.image_token_id)
        & (batch.kinds_BT == K.VISION)
        & batch.valid_BT
    )
    choices = slot_choices(batch.kinds_BT, batch.valid_BT, is_image_BT, batch.selected_idx_M)
    with recording_rows(
        adapter.text_config, choices.sources_BN, choices.allowed_BNT(batch.valid_BT)
    ) as recorder:
        replay_hidden(adapter, batch)
        attention_BNT = recorder.take(adapter.text_config.num_hidden_layers)
    return choices, choice_log_probs(choices, attention_BNT, temperature)


def check_replay(requests, groups, engine, temperature: float) -> LatentSequences:
    """Rollout's log-probs are the replay's, and its latents what recomputing makes.

    Returns the trajectories with their completions in one column.
    """
    trajectories = [trajectory for group in groups for trajectory in group]
    images = [
        request.images for request, group in zip(requests, groups, strict=True) for _ in group
    ]
    for padding_side in ("left", "right", "both"):
        batch = collate(trajectories, images, engine.adapter, "full", padding_side)
        log_probs_BT, _ = replay(engine.adapter, batch, temperature=temperature)
        for row, t in enumerate(trajectories):
            values = log_probs_BT[row][batch.valid_BT[row]][len(t.prompt_ids) :]
            torch.testing.assert_close(values, t.rollout_log_probs, rtol=0, atol=1e-4)
    made_NH = recompute_latents(engine.adapter, batch)
    torch.testing.assert_close(made_NH, batch.latents_NH, rtol=0, atol=1e-4)
    return batch
