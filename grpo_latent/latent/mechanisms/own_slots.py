"""Slots whose input is an embedding of their own (pause tokens, 2310.02226): nothing is fed back.

    [prompt]  slot  slot  …  text
    input     u     u            the same learned vector at each; positions tell them apart

The control for "are latents used": as many further steps of computation as Coconut's slots,
without anything that the model itself has put into them. If this does as well, what Coconut feeds
back is not what helps; under `shuffle` nothing can change, as all prompts have the same vectors.

u is a parameter of `attach`, not the latent token's row of the embeddings: that row is tied to
`lm_head` in small models, where training it would move logits, and optimizers leave it out where
embeddings are frozen. It starts as a new token's embedding does. One vector for all n slots, as
pause tokens have it.

In RL a slot is replayed as it was recorded, as all latents are: with treatment `mask`, and with
`recompute` and gradient `cut`, u stays as SFT left it. `recompute` with `one_hop` or `bptt` trains
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from grpo_latent.errors import CheckpointError
from grpo_latent.latent.mechanisms.hidden_source import HiddenSource
from grpo_latent.latent.mechanisms.registry import register
from grpo_latent.latent.mechanisms.slots import SlotMechanism

SLOT_ATTRIBUTE = "own_slot"


@register
@dataclass(frozen=True)
class OwnSlots(SlotMechanism):
    """`steps` slots of a learned embedding, through the head if there is one."""

    name: ClassVar[str] = "own_slots"
    parameter_prefixes: ClassVar[tuple[str, ...]] = (
        *SlotMechanism.parameter_prefixes,
        SLOT_ATTRIBUTE,
    )

    def new_parameters(
        self, text_config: PretrainedConfig, dtype: torch.dtype, device: torch.device
    ) -> dict[str, nn.Module | nn.Parameter]:
        own_H = torch.empty(text_config.hidden_size, device=device, dtype=dtype)
        nn.init.normal_(own_H, std=text_config.initializer_range)
        return super().new_parameters(text_config, dtype, device) | {
            SLOT_ATTRIBUTE: nn.Parameter(own_H)
        }

    def check_model(self, model: nn.Module) -> None:
        super().check_model(model)
        if not hasattr(model, SLOT_ATTRIBUTE):
            raise CheckpointError(
                "own slots without their embedding", where="model", expected=SLOT_ATTRIBUTE
            )

    def make(self, model: nn.Module, source: HiddenSource) -> Tensor:
        """u, whatever the hidden states are."""
        return getattr(model, SLOT_ATTRIBUTE).expand_as(source.hidden_MH)
