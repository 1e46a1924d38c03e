"""Prompts of different lengths, prefilled with little padding: those of about one length together.

Padding costs a forward as much as prompt does, and a prompt's image makes lengths differ by
hundreds. The buckets are put side by side afterwards, padded on the left, so that decoding sees
one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.positions import next_positions
from grpo_latent.models.replay import replay_hidden
from grpo_latent.models.sequences import prompt_sequences
from grpo_latent.trajectory import PositionKind

MIN_POSITIONS = 256  # of a forward: smaller ones cost their overhead
MIN_FILL = 7 / 8  # of the longest prompt's length


class Prefill(NamedTuple):
    """A forward over B prompts of at most P positions, padded on the left.

    Attributes:
        hidden_BH: last hidden states.
        cache: keys and values of P positions.
        kinds_BP, valid_BP: `PositionKind`, and False at padding.
        next_position_B: position id of the first completion position.
    """

    hidden_BH: Tensor
    cache: Cache
    kinds_BP: Tensor
    valid_BP: Tensor
    next_position_B: Tensor


def length_buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the prompts that are prefilled together, buckets of long prompts first.

    A bucket takes shorter and shorter prompts, until it has `MIN_POSITIONS` and the next would be
    padded by more than an eighth.

    >>> length_buckets([300, 20, 290, 30]), length_buckets([30, 20, 30])
    ([[0, 2], [1, 3]], [[0, 1, 2]])
    """
    buckets: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        is_full = bool(buckets) and longest * len(buckets[-1]) >= MIN_POSITIONS
        if not buckets or (is_full and lengths[index] < MIN_FILL * longest):
            buckets.append([])
            longest = lengths[index]
        buckets[-1].append(index)
    return [sorted(bucket) for bucket in buckets]


def prefill_prompts(
    prompts: Sequence[Tensor],
    images: Sequence[ImageInputs | None],
    adapter: ModelAdapter,
    visibility: str,
) -> Prefill:
    """Of B prompts, each ids [P] with its images or None: one forward a bucket."""
    buckets = length_buckets([ids.shape[0] for ids in prompts])
    prefills = []
    for bucket in buckets:
        of_bucket = ([prompts[index] for index in bucket], [images[index] for index in bucket])
        sequences = prompt_sequences(*of_bucket, adapter, visibility)
        cache = DynamicCache(config=adapter.text_config)
        hidden_BTH = replay_hidden(adapter, sequences, cache)
        next_position_B = next_positions(sequences.position_ids)
        # padded on the left, so that each prompt's last hidden state is in the last column
        prefills.append(
            Prefill(
                hidden_BTH[:, -1], cache, sequences.kinds_BT, sequences.valid_BT, next_position_B
            )
        )
    return prefills[0] if len(prefills) == 1 else join_prefills(prefills, buckets)


def join_prefills(prefills: Sequence[Prefill], buckets: Sequence[Sequence[int]]) -> Prefill:
    """One prefill of all prompts, in their own order; the joined caches are emptied on the way.

    Args:
        prefills: one a bucket.
        buckets: of each prefill, the indices of its prompts.
    """
    length = max(prefill.kinds_BP.shape[1] for prefill in prefills)
    order_B = torch.tensor(
        [index for bucket in buckets for index in bucket], device=prefills[0].hidden_BH.device
    )
    place_B = order_B.argsort()

    def join(tensors: Sequence[Tensor], value: int = 0, dim: int | None = None) -> Tensor:
        """Rows in the prompts' order; `dim` is padded on the left to P, with zeros or `value`."""
        if dim is not None:
            later_dims = [0] * 2 * (tensors[0].ndim - 1 - dim)
            tensors = [
                pad(tensor, [*later_dims, length - tensor.shape[dim], 0], value=value)
                for tensor in tensors
            ]
        return torch.cat(list(tensors))[place_B]

    cache = DynamicCache()
    # a layer at a time: its parts are given up before the next is copied
    for layer_idx in range(len(prefills[0].cache.layers)):
        pairs = [_take_layer(prefill.cache, layer_idx) for prefill in prefills]
        keys, values = zip(*pairs, strict=True)
        cache.update(join(keys, dim=2), join(values, dim=2), layer_idx)
    return Prefill(
        join([prefill.hidden_BH for prefill in prefills]),
        cache,
        join([prefill.kinds_BP for prefill in prefills], int(PositionKind.PROMPT), dim=1),
        join([prefill.valid_BP for prefill in prefills], dim=1),
        join([prefill.next_position_B for prefill in prefills]),
    )


def _take_layer(cache: Cache, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, which the cache gives up: the joined copy takes their room."""
    layer = cache.layers[layer_idx]
    assert isinstance(layer, CacheLayerMixin)  # backbones refuse what does not attend in full
    keys = layer.keys
    values = layer.values
    assert keys is not None and values is not None
    layer.keys = layer.values = None
    return keys, values
