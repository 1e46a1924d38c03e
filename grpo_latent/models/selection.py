"""Attention of the last position, averaged over all layers and heads, without a T x T map.

IVT-LR chooses image positions by it (2510.12603 section 3). `output_attentions` would build every layer's full map, at
every slot; only its last row is wanted. Within `recording_last_row` the decoder's attention computes its ordinary output,
and beside it softmax(q_last · Kᵀ) of the last query position: O(T) a layer, over a cache too.

Legend: B rows, A attention heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_latent.errors import ConfigError, LatentMismatchError

LAST_ROW_SDPA = "grpo_latent_last_row_sdpa"


@dataclass
class LastRowAttention:
    """What the forwards of a `recording_last_row` block leave behind; `take` reads and clears it.

    Attributes:
        queries_BATD, keys_BASD: of the last layer only, as its attention read them (after rotary embedding), where asked.
    """

    keep_last_layer: bool = False
    queries_BATD: Tensor | None = None
    keys_BASD: Tensor | None = None
    scaling: float = 1.0
    _sum_BS: Tensor | None = None
    _num_layers: int = 0

    def add(self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        row_BS = last_row_attention(query, key, mask, scaling)
        if self.keep_last_layer:
            self.queries_BATD, self.keys_BASD, self.scaling = query, key, scaling
        self._sum_BS = row_BS if self._sum_BS is None else self._sum_BS + row_BS
        self._num_layers += 1

    def take(self, num_layers: int) -> Tensor:
        """float32 [B, S], rows sum to 1: the mean over layers and heads of the forward since the last `take`.

        Raises:
            LatentMismatchError: not each of the `num_layers` layers has run exactly once.
        """
        if self._num_layers != num_layers:
            raise LatentMismatchError(
                "the recorded attention is not that of one forward",
                where="recording_last_row",
                got=f"{self._num_layers} layers",
                expected=f"{num_layers}",
                fix="Call `take` after each forward; gradient checkpointing, which repeats layers, must be off.",
            )
        mean_BS = self._sum_BS / self._num_layers
        self._sum_BS, self._num_layers = None, 0
        return mean_BS


_recorder: ContextVar[LastRowAttention | None] = ContextVar("grpo_latent_last_row", default=None)


def last_row_attention(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax(q_last · Kᵀ · scaling + mask) averaged over the heads; float32 [B, S].

    Args:
        query: [B, heads, T, D].
        key: [B, KV heads, S, D]; query heads share keys in consecutive groups.
        mask: additive or bool (True: may look), [B or 1, 1, T, S or more]; None where the last row sees everything.
    """
    batch_size, num_heads, _, head_dim = query.shape
    num_kv_heads, length = key.shape[1], key.shape[2]
    folded = query[:, :, -1].reshape(batch_size, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = (folded @ key.transpose(2, 3)).float() * scaling
    if mask is not None:
        row = mask[:, :, -1:, :length]
        scores = scores.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else scores + row.float()
    return scores.softmax(-1).mean((1, 2))


def _last_row_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Hugging Face attention interface; [B, heads, T, head dim] -> [B, T, heads, head dim]."""
    recorder = _recorder.get()
    if recorder is not None:
        with torch.no_grad():  # a choice has no gradient; its log-probability is `algo.selection`'s
            recorder.add(module, query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(LAST_ROW_SDPA, _last_row_sdpa)


@contextmanager
def recording_last_row(text_config, keep_last_layer: bool = False) -> Iterator[LastRowAttention]:
    """Within the block, each forward of the decoder records its last row's attention. Give it an explicit 4-D mask.

    Args:
        text_config: of the decoder; its attention implementation is `sdpa` (or what replaces it) again after the block.
        keep_last_layer: also keep the last layer's queries and keys.

    Raises:
        ConfigError: the attention implementation does not compute what `sdpa` computes.
    """
    configured = text_config._attn_implementation
    if "sdpa" not in configured and configured != "eager":
        raise ConfigError(
            "selection by attention needs an explicit attention mask",
            where="attn_implementation",
            got=configured,
            expected="sdpa or eager",
            fix="Load the model with attn_implementation=sdpa.",
        )
    recorder = LastRowAttention(keep_last_layer)
    token = _recorder.set(recorder)
    text_config._attn_implementation = LAST_ROW_SDPA
    try:
        yield recorder
    finally:
        text_config._attn_implementation = configured
        _recorder.reset(token)
