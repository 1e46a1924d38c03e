"""Attention functions of the decoder, under names that Hugging Face's configs may have.

`folded_sdpa` is that of one new position, with query heads folded so that keys are never repeated.
Hugging Face's `sdpa` repeats keys and values to the number of query heads at each step and layer
whenever a mask is given. For a single query position the heads of a group can stand in the query
dimension instead: the same products, no copy.

`shared_sdpa` is `sdpa`, but where a forward brings `SharedRows`, of a row in which groups have
their prompt once. It stands in the config for good: a checkpointed layer runs again in the
backward, when the forward that would have set it is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_latent.models.shared_rows import SharedRows, shared_attention

FOLDED_SDPA = "grpo_latent_folded_sdpa"
SHARED_SDPA = "grpo_latent_shared_sdpa"
SDPA_NAMES = ("sdpa", SHARED_SDPA)  # what a model that computes `sdpa` may have in its config


def folded_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Hugging Face attention interface; [B, heads, T, head dim] -> [B, T, heads, head dim]."""
    num_groups = getattr(module, "num_key_value_groups", 1)
    batch_size, num_heads, length, head_dim = query.shape
    # with more queries, the mask's rows would have to be repeated for the folded heads
    if length != 1 or num_groups == 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    folded = query.reshape(batch_size, num_heads // num_groups, num_groups, head_dim)
    if query.device.type == "cpu" and query.dtype == torch.float32 and attention_mask is not None:
        output = _as_products(folded, key, value, attention_mask, scaling)
    else:
        output = F.scaled_dot_product_attention(
            folded, key, value, attn_mask=attention_mask, scale=scaling
        )
    return output.reshape(batch_size, 1, num_heads, head_dim), None


def _as_products(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float | None
) -> Tensor:
    """The same by two batched products.

    Torch's CPU kernel is made for long queries, and slower on many short ones.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = bias.expand(-1, key.shape[1], -1, -1).flatten(0, 1)
    scores = torch.baddbmm(
        bias, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scaling
    )
    return torch.bmm(scores.softmax(-1), value.flatten(0, 1))


def shared_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    shared_rows: SharedRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Hugging Face attention interface; [B, heads, T, head dim] -> [B, T, heads, head dim].

    Args:
        shared_rows: of the forward, which hands it through all layers; None for ordinary rows.
    """
    if shared_rows is not None:
        return shared_attention(module, query, key, value, shared_rows, dropout, scaling)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )


ALL_ATTENTION_FUNCTIONS.register(FOLDED_SDPA, folded_sdpa)
ALL_ATTENTION_FUNCTIONS.register(SHARED_SDPA, shared_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register(SHARED_SDPA, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def chosen_kernels(device: torch.device) -> AbstractContextManager[None]:
    """Within the block `folded_sdpa` runs on kernels that need no plan for each number of keys.

    With a mask, torch 2.11 gives the work on an H100 to cuDNN, which makes a new plan for every
    new length: 640 us of CPU time a call.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


@contextmanager
def folded_attention(text_config: PreTrainedConfig) -> Iterator[None]:
    """Decodes with `folded_sdpa` within the block, where the model is configured for `sdpa`."""
    configured = text_config._attn_implementation
    if configured in SDPA_NAMES:
        text_config._attn_implementation = FOLDED_SDPA
    try:
        yield
    finally:
        text_config._attn_implementation = configured
