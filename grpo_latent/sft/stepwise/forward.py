"""One SFT forward with prompt slots: prompt, slots, then the text that the stage still writes out.

    prompt ──prefill──▶ slots, one after the other ──▶ cache ──one forward over the response──▶ CE

Slots run as in a rollout (`models.slots`): what is trained is what is rolled out. CE on the text
only; through the slots' h the gradient is cut (IVT-LR, 2510.12603) or flows (Coconut, 2412.06769).

Legend: B rows, P prompt positions, S positions before the response (prompt, slots and what they
insert), R response positions, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.kv_cache import caching_layers
from grpo_latent.models.positions import count_on, with_components
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.models.slots import prefill_with_slots
from grpo_latent.models.visibility import attention_bias
from grpo_latent.sft.common.images import batch_images
from grpo_latent.sft.common.losses import cross_entropy_sum
from grpo_latent.trajectory import PositionKind


def loss_sums(
    adapter: ModelAdapter, batch: dict[str, Tensor], num_slots: int, cut: bool
) -> dict[str, Tensor]:
    """Sums the cross-entropy of the responses after `num_slots` slots: `ce`, a float32 scalar.

    Args:
        cut: whether the slots' h are constants.
    """
    prompt_ids_BP = batch["prompt_ids"]
    prompts = LatentSequences.build(
        adapter,
        prompt_ids_BP,
        adapter.prompt_kinds(prompt_ids_BP),
        batch["prompt_valid"],
        torch.zeros(0, adapter.hidden_size, dtype=adapter.dtype, device=adapter.device),
        "full",
        batch_images(batch),
    )
    num_slots_B = torch.full((prompt_ids_BP.shape[0],), num_slots, device=adapter.device)
    prefill = prefill_with_slots(adapter, prompts, num_slots_B, adapter.mechanism.top_k_image, cut)
    response_ids_BR, valid_BR = batch["response_ids"], batch["response_valid"]
    # the last response position scores nothing
    fed_ids_BR = response_ids_BR[:, :-1]
    num_before = prefill.kinds_BS.shape[1]
    kinds = torch.cat([prefill.kinds_BS, torch.full_like(fed_ids_BR, int(PositionKind.TEXT))], 1)
    valid = torch.cat([prefill.valid_BS, valid_BR[:, :-1]], 1)
    positions_BR = count_on(prefill.next_position_B, valid_BR[:, :-1])
    with caching_layers(adapter.model):
        hidden_BRH = adapter.decoder(
            inputs_embeds=adapter.embed(fed_ids_BR),
            attention_mask=attention_bias(kinds, valid, "full", adapter.dtype, num_before),
            position_ids=with_components(positions_BR, adapter.has_mrope),
            past_key_values=prefill.cache,
            use_cache=True,
        ).last_hidden_state
    hidden_BRH = torch.cat([prefill.hidden_BH[:, None], hidden_BRH], 1)
    return {
        "ce": cross_entropy_sum(adapter.logits(hidden_BRH[valid_BR]), response_ids_BR[valid_BR])
    }
