"""Attention of a few positions, averaged over all layers and heads, without a T x T map.

IVT-LR chooses image positions by that of the last one (2510.12603 section 3), and a random choice
is scored by that of each slot's. `output_attentions` would build every layer's full map, at every
slot; only these rows are wanted. Within `recording_last_row` or `recording_rows` the decoder's
attention computes its ordinary output, and beside it softmax(q · Kᵀ) of the wanted queries: O(T) a
layer and row, over a cache too.

Legend: B rows, A attention heads, T queries, N of them wanted, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.latent.treatments.values import at_least_float
from grpo_latent.models.attention import shared_sdpa
from grpo_latent.models.shared_rows import SharedRows

RECORDED_SDPA = "grpo_latent_recorded_sdpa"


@dataclass
class RecordedAttention:
    """What the forwards of a recording block leave behind; `take` reads and clears it.

    Attributes:
        rows_BN: int64, the wanted queries of a forward without cache; None for the last one.
        allowed_BNS: bool, what they may look at; None where the forward's own mask says it.
        queries_BATD, keys_BASD: of the last layer only, as its attention read them (after rotary
            embedding), where asked.
    """

    keep_last_layer: bool = False
    rows_BN: Tensor | None = None
    allowed_BNS: Tensor | None = None
    queries_BATD: Tensor | None = None
    keys_BASD: Tensor | None = None
    scaling: float = 1.0
    _sum: Tensor | None = None
    _num_layers: int = 0

    def add(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Adds one layer's attention of the wanted rows; tensors as Hugging Face gives them."""
        if self.rows_BN is None:
            mask = None if mask is None else mask[:, 0, -1:, : key.shape[2]]
            mean = rows_attention(query[:, :, -1:], key, mask, scaling)[:, 0]
        else:
            index_BAND = self.rows_BN[:, None, :, None].expand(
                -1, query.shape[1], -1, query.shape[3]
            )
            mean = rows_attention(query.gather(2, index_BAND), key, self.allowed_BNS, scaling)
        if self.keep_last_layer:
            self.queries_BATD = query
            self.keys_BASD = key
            self.scaling = scaling
        self._sum = mean if self._sum is None else self._sum + mean
        self._num_layers += 1

    def take(self, num_layers: int) -> Tensor:
        """Attention of the forward since the last `take`, its mean over layers and heads.

        float32 [B, S], or [B, N, S] of `rows_BN`; each row sums to 1.

        Raises:
            LatentMismatchError: not each of the `num_layers` layers has run exactly once.
        """
        if self._sum is None or self._num_layers != num_layers:
            raise LatentMismatchError(
                "the recorded attention is not that of one forward",
                where="recorded attention",
                got=f"{self._num_layers} layers",
                expected=f"{num_layers}",
                fix="Call `take` after each forward; gradient checkpointing, which repeats "
                "layers, must be off.",
            )
        mean = self._sum / self._num_layers
        self._sum = None
        self._num_layers = 0
        return mean


_recorder: ContextVar[RecordedAttention | None] = ContextVar(
    "grpo_latent_recorded_attention", default=None
)


def rows_attention(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax(q · Kᵀ · scaling + mask) averaged over the heads, [B, N, S].

    float32; float64 of a model that computes in it.

    Args:
        query: [B, heads, N, D].
        key: [B, KV heads, S, D]; query heads share keys in consecutive groups.
        mask: additive or bool (True: may look), [B or 1, N, S]; None where all is seen.
    """
    batch_size, num_heads, num_rows, head_dim = query.shape
    num_kv_heads = key.shape[1]
    # the heads of a group one after the other: keys are not repeated
    folded = query.reshape(batch_size, num_kv_heads, -1, head_dim)
    scores = at_least_float(folded @ key.transpose(2, 3)) * scaling
    scores = scores.view(batch_size, num_kv_heads, num_heads // num_kv_heads, num_rows, -1)
    if mask is not None:
        mask = mask[:, None, None]
        scores = (
            scores.masked_fill(~mask, -torch.inf)
            if mask.dtype == torch.bool
            else scores + at_least_float(mask)
        )
    return scores.softmax(-1).mean((1, 2))


def _recorded_sdpa(
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
    """Hugging Face attention interface; [B, heads, T, head dim] -> [B, T, heads, head dim]."""
    recorder = _recorder.get()
    if recorder is not None:
        scaling_of_rows = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows = (query, key)
        if shared_rows is not None:
            rows = (shared_rows.spread_heads(query), shared_rows.spread_heads(key))
        # what a rollout chooses has no gradient; only the score of a recorded choice has one
        with torch.no_grad() if recorder.rows_BN is None else nullcontext():
            recorder.add(*rows, attention_mask, scaling_of_rows)
    return shared_sdpa(
        module, query, key, value, attention_mask, dropout, scaling, shared_rows, **kwargs
    )


ALL_ATTENTION_FUNCTIONS.register(RECORDED_SDPA, _recorded_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register(RECORDED_SDPA, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def recording_last_row(
    text_config: PreTrainedConfig, keep_last_layer: bool = False
) -> Iterator[RecordedAttention]:
    """Within the block, each forward of the decoder records its last row's attention.

    Give it an explicit 4-D mask.

    Args:
        text_config: of the decoder; its attention implementation is `sdpa` (or what replaces it)
            again after the block.
        keep_last_layer: also keep the last layer's queries and keys.

    Raises:
        ConfigError: the attention implementation does not compute what `sdpa` computes.
    """
    with _recording(text_config, RecordedAttention(keep_last_layer)) as recorder:
        yield recorder


@contextmanager
def recording_rows(
    text_config: PreTrainedConfig, rows_BN: Tensor, allowed_BNS: Tensor
) -> Iterator[RecordedAttention]:
    """In the block, each forward without cache records the attention of `rows_BN`, with gradient.

    Args:
        rows_BN: int64, queries.
        allowed_BNS: bool, what each may look at; at least itself.
    """
    recording = RecordedAttention(rows_BN=rows_BN, allowed_BNS=allowed_BNS)
    with _recording(text_config, recording) as recorder:
        yield recorder


@contextmanager
def _recording(
    text_config: PreTrainedConfig, recorder: RecordedAttention
) -> Iterator[RecordedAttention]:
    configured = text_config._attn_implementation
    if "sdpa" not in configured and configured != "eager":
        raise ConfigError(
            "selection by attention needs an explicit attention mask",
            where="attn_implementation",
            got=configured,
            expected="sdpa or eager",
            fix="Load the model with attn_implementation=sdpa.",
        )
    token = _recorder.set(recorder)
    text_config._attn_implementation = RECORDED_SDPA
    try:
        yield recorder
    finally:
        text_config._attn_implementation = configured
        _recorder.reset(token)
