"""The forward of the one-process loop: recorded trajectories scored by a model, prompts once.

Legend: B trajectories, T positions, P prompts, M latents or actions, H hidden, S statistics of a
latent, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.errors import ConfigError
from grpo_latent.latent.treatments import LatentSource, Treatment
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.kv_cache import caching_layers
from grpo_latent.models.replay import replay_hidden
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.models.shift import token_sources
from grpo_latent.trajectory import PositionKind


@dataclass
class Forward:
    """One forward over a batch: nats, 0 where the policy did not act.

    Attributes:
        log_probs_BT, entropies_BT: of text, at the sampling temperature.
        density_M: log-densities of latents, where they act.
        statistics_MS: `Treatment.statistics`, where the loss reads them.
    """

    log_probs_BT: Tensor
    entropies_BT: Tensor
    density_M: Tensor | None = None
    statistics_MS: Tensor | None = None


def run_forward(
    adapter: ModelAdapter,
    sequences: LatentSequences,
    recorded_MH: Tensor,
    treatment: Treatment,
    reads_statistics: bool,
    temperature: float,
    group_size: int,
) -> Forward:
    """Scores recorded trajectories by the adapter's model.

    Args:
        sequences: latents as they are fed: recorded, or made anew.
        recorded_MH: what the rollout recorded where a hidden state made it.
    """
    hidden_BTH = hidden_states(adapter, sequences, group_size)
    mask_BT = sequences.action_mask_BT(adapter.mechanism.start_is_action)
    logits_MV = adapter.logits(hidden_BTH[token_sources(mask_BT)]).float() / temperature
    log_probs_MV = logits_MV.log_softmax(-1)
    picked_M = log_probs_MV.gather(1, sequences.input_ids_BT[mask_BT][:, None])[:, 0]
    entropies_M = -(log_probs_MV.exp() * log_probs_MV).sum(-1)
    blank_BT = torch.zeros(mask_BT.shape)
    forward = Forward(
        blank_BT.masked_scatter(mask_BT, picked_M), blank_BT.masked_scatter(mask_BT, entropies_M)
    )
    if not (treatment.is_action or reads_statistics):
        return forward
    hidden_MH = hidden_BTH[sequences.sources(adapter.mechanism)]
    source = LatentSource(
        adapter.make(hidden_MH),
        lambda: adapter.logits(hidden_MH).float() / temperature,
        treatment.features(adapter.model, hidden_MH),
    )
    if treatment.is_action:
        forward.density_M = treatment.log_density(source, recorded_MH, sequences.latent_aux_MA)
    if reads_statistics:
        forward.statistics_MS = treatment.statistics(source).float()
    return forward


def hidden_states(adapter: ModelAdapter, sequences: LatentSequences, group_size: int) -> Tensor:
    """`replay_hidden` [B, T, H] of whole groups, each group's prompt once.

    Args:
        sequences: `padding_side="both"`, the rows of a group one after the other, images of each
            prompt once.
    """
    first = int((sequences.kinds_BT >= PositionKind.TEXT).any(0).nonzero()[0])
    if adapter.mechanism.composes:  # each token's input is composed: the injector knows how
        return replay_hidden(adapter, sequences)
    bias, position_ids = sequences.attention_bias(adapter.dtype), sequences.position_ids
    cache = DynamicCache(config=adapter.text_config)
    with caching_layers(adapter.model):
        prompt_PTH = adapter.forward_hidden(
            sequences.fed_ids_BT[::group_size, :first],
            bias[::group_size, :, :first, :first],
            position_ids[..., ::group_size, :first],
            images_of_prompts(sequences, group_size),
            cache,
        )
        cache.batch_repeat_interleave(group_size)
        recorded_BT = sequences.recorded_mask_BT[:, first:]
        embeds_BTH = adapter.embed(sequences.fed_ids_BT[:, first:])
        embeds_BTH = embeds_BTH.masked_scatter(recorded_BT[..., None], sequences.latents_NH)
        completion_BTH = adapter.decoder(
            inputs_embeds=embeds_BTH,
            attention_mask=bias[:, :, first:],
            position_ids=position_ids[..., first:],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    return torch.cat([prompt_PTH.repeat_interleave(group_size, 0), completion_BTH], 1)


def images_of_prompts(sequences: LatentSequences, group_size: int) -> ImageInputs | None:
    """Those of the first row of each group: one image a row, as the embedded tasks have."""
    images = sequences.images
    if images is None:
        return None
    num_rows = sequences.kinds_BT.shape[0]
    num_images = len(images.image_grid_thw)
    if num_images != num_rows:
        raise ConfigError(
            "not in the one-process loop",
            where="data.train_files",
            got=f"{num_images} images in {num_rows} rows",
            expected="one image a row, or none",
        )
    patches = images.pixel_values.split(images.image_grid_thw.prod(-1).tolist())[::group_size]
    return ImageInputs(torch.cat(patches), images.image_grid_thw[::group_size])
