"""Replay: a forward that feeds recorded latents.

    LatentSequences ──replay──▶ log_probs [B, T], hidden [B, T, H]

Everything is label-aligned: `log_probs_BT[b, t]` scores the token at position t given those before
it, and the latent at position t is made of the hidden state before it (through the head).
`models.shift` makes the shift.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.injection import LatentInjector
from grpo_latent.models.sequences import LatentSequences, collate
from grpo_latent.models.shared_prompt import SharedPrompt
from grpo_latent.models.shift import token_sources
from grpo_latent.trajectory import PositionKind

__all__ = ["collate", "replay", "replay_hidden", "token_log_probs"]


def replay_hidden(
    adapter: ModelAdapter, sequences: LatentSequences, cache: Cache | None = None
) -> Tensor:
    """Hidden states [B, T, H] of the sequences, latents as recorded.

    Gradients flow, into the latents too. Prompts of one of `sequences.groups` are run once.

    Args:
        cache: takes the keys and values of all T positions.
    """
    latents_NH = sequences.latents_NH
    has_latents = latents_NH.shape[0] > 0
    inject = (
        LatentInjector.install(adapter.model, _feeding(adapter, sequences)).inject
        if has_latents
        else lambda *_: nullcontext()
    )
    assert cache is None or sequences.groups is None, "a cache holds a row's own prompt"
    share = nullcontext if sequences.groups is None else SharedPrompt.install(adapter.model).share
    with inject(sequences.recorded_mask_BT, latents_NH), share(sequences):
        return adapter.forward_hidden(
            sequences.fed_ids_BT,
            sequences.attention_mask(adapter.dtype),
            sequences.position_ids,
            sequences.images,
            cache,
        )


def _feeding(adapter: ModelAdapter, sequences: LatentSequences) -> Mechanism | None:
    """The mechanism, which is asked for where tokens are composed with what was recorded."""
    if not adapter.has_mechanism and not bool((sequences.kinds_BT == PositionKind.MIXED).any()):
        return None
    return adapter.mechanism


def token_log_probs(
    adapter: ModelAdapter,
    sequences: LatentSequences,
    hidden_BTH: Tensor,
    temperature: float,
    mask_BT: Tensor,
) -> Tensor:
    """log softmax(logits / temperature) of tokens where `mask_BT` is True, else 0; float32 [B, T].

    Logits are made at those positions only.

    Raises:
        ConfigError: `temperature` is not finite and positive.
    """
    if not 0 < temperature < math.inf:
        raise ConfigError(
            "not a temperature", where="replay", got=temperature, expected="finite, > 0"
        )
    logits_MV = adapter.logits(hidden_BTH[token_sources(mask_BT)]).float() / temperature
    picked_M = logits_MV.log_softmax(-1).gather(1, sequences.input_ids_BT[mask_BT][:, None])[:, 0]
    return torch.zeros(mask_BT.shape, device=picked_M.device).masked_scatter(mask_BT, picked_M)


def replay(
    adapter: ModelAdapter,
    sequences: LatentSequences,
    visibility: str | None = None,
    temperature: float = 1.0,
    start_is_action: bool = True,
    end_is_action: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probs [B, T] of the actions (0 elsewhere), and hidden states [B, T, H].

    Args:
        visibility: replays under another one than that of the sequences; None for their own.
    """
    if visibility is not None:
        sequences = dataclasses.replace(sequences, visibility=visibility)
    hidden_BTH = replay_hidden(adapter, sequences)
    mask_BT = sequences.action_mask_BT(start_is_action, end_is_action)
    return token_log_probs(adapter, sequences, hidden_BTH, temperature, mask_BT), hidden_BTH
