"""Keys and values of a rollout batch, allocated once and written in place.

Hugging Face's `DynamicCache` copies all keys and values at every step; this one does not, and it can start from a prompt
that was prefilled once and is shared by the trajectories of its group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class InPlaceLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, [rows, KV heads, capacity, head dim], of which `length` are filled."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, row_to_prompt_N: Tensor, capacity: int):
        super().__init__()
        num_rows, (_, num_heads, self.length, head_dim) = row_to_prompt_N.shape[0], keys.shape
        self.keys = keys.new_empty(num_rows, num_heads, capacity, head_dim)
        self.values = torch.empty_like(self.keys)
        self.keys[:, :, : self.length] = keys[row_to_prompt_N]
        self.values[:, :, : self.length] = values[row_to_prompt_N]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("an InPlaceLayer is initialised when it is made")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep_rows(self, rows_M: Tensor) -> None:
        self.keys, self.values = self.keys[rows_M], self.values[rows_M]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_cache_shape(self) -> int:
        return self.keys.shape[-2]


class RolloutCache(Cache):
    """A cache of `InPlaceLayer`s for N rows, filled from prompts that were prefilled once each.

    Args:
        prefilled: the cache of the B prompts.
        row_to_prompt_N: int64 [N], the prompt of each row.
        capacity: positions to hold, prompt included.
    """

    def __init__(self, prefilled: Cache, row_to_prompt_N: Tensor, capacity: int):
        layers = [InPlaceLayer(layer.keys, layer.values, row_to_prompt_N, capacity) for layer in prefilled.layers]
        super().__init__(layers=layers)

    def keep_rows(self, rows_M: Tensor) -> None:
        for layer in self.layers:
            layer.keep_rows(rows_M)
