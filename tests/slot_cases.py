"""Recorded choices of image positions, scored by one forward of the plain model."""

from __future__ import annotations

from torch import Tensor

from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.attention_rows import recording_rows
from grpo_latent.models.replay import replay_hidden
from grpo_latent.models.sequences import LatentSequences
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
