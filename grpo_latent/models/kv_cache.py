"""Keys and values of a rollout batch, written in place.

Hugging Face's `DynamicCache` copies all keys and values at every step; this one does so only when
they outgrow their room, by an eighth of it, and it can start from a prompt that was prefilled once
and is shared by the trajectories of its group. Room for all positions from the start would be
simpler, but rows that lie far apart are read more slowly (6 % of a rollout on CPU), and batches
that stop early never need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

MIN_GROWTH = 8  # positions
_CHECKPOINTS = "gradient_checkpointing"


class InPlaceLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, [rows, KV heads, room, head dim].

    The first `length` positions are filled.
    """

    is_sliding = False
    # never None here: `__init__` fills them
    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, row_to_prompt_N: Tensor, capacity: int):
        super().__init__()
        self.length = keys.shape[2]
        self.capacity = capacity
        self.keys = keys[row_to_prompt_N]
        self.values = values[row_to_prompt_N]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("an InPlaceLayer is initialised when it is made")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        if end > self.keys.shape[2]:
            room = min(self.capacity, end + max(MIN_GROWTH, self.length // 8))
            self.keys = _with_room(self.keys, self.length, room)
            self.values = _with_room(self.values, self.length, room)
        # the room behind `end` is never handed out: what an earlier growth left there is garbage
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep_rows(self, rows_M: Tensor) -> None:
        self.keys = self.keys[rows_M]
        self.values = self.values[rows_M]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_cache_shape(self) -> int:
        return self.capacity


def _with_room(old: Tensor, length: int, room: int) -> Tensor:
    """A tensor of `room` positions that begins with the first `length` of `old`."""
    new = old.new_empty(*old.shape[:2], room, old.shape[3])  # what lies behind is never read
    new[:, :, :length] = old[:, :, :length]
    return new


class RolloutCache(Cache):
    """A cache of `InPlaceLayer`s for N rows, filled from prompts that were prefilled once each.

    Args:
        prefilled: the cache of the B prompts.
        row_to_prompt_N: int64 [N], the prompt of each row.
        capacity: positions to hold, prompt included.
    """

    def __init__(self, prefilled: Cache, row_to_prompt_N: Tensor, capacity: int):
        layers: list[CacheLayerMixin | LinearAttentionCacheLayerMixin] = []
        for layer in prefilled.layers:
            # `Backbone` refuses models with a recurrent state, and a prefill has filled all layers
            assert isinstance(layer, CacheLayerMixin)
            assert layer.keys is not None and layer.values is not None
            layers.append(InPlaceLayer(layer.keys, layer.values, row_to_prompt_N, capacity))
        super().__init__(layers=layers)

    def keep_rows(self, rows_M: Tensor) -> None:
        for layer in self.layers:
            assert isinstance(layer, InPlaceLayer)
            layer.keep_rows(rows_M)


@contextmanager
def caching_layers(model: nn.Module) -> Iterator[None]:
    """Switches gradient checkpointing off within the block.

    In training, transformers drops the cache of a checkpointed layer with no more than a warning.
    """
    checkpointed = [module for module in model.modules() if getattr(module, _CHECKPOINTS, False)]
    for module in checkpointed:
        setattr(module, _CHECKPOINTS, False)
    try:
        yield
    finally:
        for module in checkpointed:
            setattr(module, _CHECKPOINTS, True)
