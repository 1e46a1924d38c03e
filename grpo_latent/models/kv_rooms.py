"""Keys and values of a rollout batch in rooms of a few fixed lengths, at addresses that stay.

What a captured CUDA graph reads and writes: a step's shapes depend on (rows, room) alone, and a
bias hides the part of the room that is not filled yet. One stretch of memory a layer serves all
shapes, one after the other.

Legend: N rows, M of them that are kept, B prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

MIN_ROOM = 128
Pair = tuple[Tensor, Tensor]  # keys and values


def room_for(length: int) -> int:
    """The room that holds so many positions: 128, 192, 256, 384, 512, …

    >>> [room_for(length) for length in (1, 128, 129, 200, 300, 500)]
    [128, 128, 192, 256, 384, 512]
    """
    room = MIN_ROOM
    while room < length:
        if room * 3 // 2 >= length:
            return room * 3 // 2
        room *= 2
    return room


class RoomLayer(CacheLayerMixin):
    """One layer's keys and values, [rows, KV heads, room, head dim], all of which is handed out.

    Args:
        column_1: int64 [1], where the next position is written; of all layers.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, column_1: Tensor):
        super().__init__()
        self.column_1 = column_1
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a RoomLayer is filled by its RoomCache")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.column_1, key_states)
        self.values.index_copy_(2, self.column_1, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        return self.keys.shape[2]

    get_max_length = get_max_cache_shape  # as transformers names it from 5.11 on


class RoomCache(Cache):
    """A cache of `RoomLayer`s, which outlives the batches that it serves.

    Attributes:
        num_moves: how often its memory has moved; what was captured before holds no longer.
    """

    def __init__(self, num_layers: int, device: torch.device):
        with torch.inference_mode(False):  # a tensor of inference mode could not be filled outside
            self.column_1 = torch.zeros(1, dtype=torch.long, device=device)
        super().__init__(layers=[RoomLayer(self.column_1) for _ in range(num_layers)])
        self.num_moves = 0
        self._stretches: list[Pair] = []

    def fill(
        self, prefilled: Cache, row_to_prompt_N: Tensor, room: int, largest_room: int
    ) -> None:
        """Begins with the keys and values of B prompts, one prompt a row.

        Memory for the largest room that the batch may come to is taken at once: growing would move
        it, and with it all that was captured.
        """
        pairs = []
        for layer in prefilled.layers:
            assert isinstance(layer, CacheLayerMixin)
            assert layer.keys is not None and layer.values is not None
            pairs.append((layer.keys, layer.values))
        self._reserve(pairs, len(row_to_prompt_N) * largest_room)
        self._lay_out(pairs, row_to_prompt_N, room)

    def keep(self, rows_M: Tensor, length: int, room: int) -> None:
        """Goes on with the rows `rows_M` and their first `length` positions, in another room."""
        pairs = [(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in self._rooms]
        self._lay_out(pairs, rows_M, room)

    @property
    def _rooms(self) -> list[RoomLayer]:
        return [layer for layer in self.layers if isinstance(layer, RoomLayer)]

    def _lay_out(self, pairs: list[Pair], rows_M: Tensor, room: int) -> None:
        for layer, pair, stretch in zip(self._rooms, pairs, self._stretches, strict=True):
            layer.keys, layer.values = (
                _laid_out(part, rows_M, room, flat)
                for part, flat in zip(pair, stretch, strict=True)
            )

    def _reserve(self, pairs: list[Pair], num_positions: int) -> None:
        """Memory for so many positions a layer; kept where it is enough."""
        sizes = [
            [num_positions * part.shape[1] * part.shape[3] for part in pair] for pair in pairs
        ]
        like = pairs[0][0]
        if self._stretches and all(
            flat.numel() >= size and flat.dtype == like.dtype
            for stretch, pair in zip(self._stretches, sizes, strict=True)
            for flat, size in zip(stretch, pair, strict=True)
        ):
            return
        self.num_moves += 1
        self._stretches = []  # given up first
        with torch.inference_mode(False):
            self._stretches = [
                (like.new_empty(num_keys), like.new_empty(num_values))
                for num_keys, num_values in sizes
            ]


def _laid_out(part: Tensor, rows_M: Tensor, room: int, flat: Tensor) -> Tensor:
    """`flat` as [rows, heads, room, dim], filled with `part`'s rows; zeros behind them.

    A weight of 0 makes nothing of what is hidden, but NaN of a NaN that an earlier batch left.
    """
    _, num_heads, length, dim = part.shape
    kept = part[rows_M]  # a copy: `part` may lie in the same memory
    laid_out = flat[: len(rows_M) * num_heads * room * dim].view(-1, num_heads, room, dim)
    laid_out[:, :, :length] = kept
    laid_out[:, :, length:] = 0
    return laid_out
