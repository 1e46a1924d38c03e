"""The data set of SFT: it holds paths or encoded bytes, and decodes a row when it is asked.

Pixels as a model reads them take tens of times the bytes of the file: all rows at once fit no
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.errors import DataError


class SFTDataset(torch.utils.data.Dataset):
    """Encodes a row when it is asked for, and keeps rows up to `cache_bytes` of pixels.

    Args:
        examples: with images as `ImageRef`s, which are opened anew each time that a row is
            encoded.
        encoder: from an example to a row, whose image fields are `ImageInputs`.
        cache_bytes: 0 keeps nothing; a small data set that is read many times saves the time of
            decoding. Each worker of the data loader has a cache of its own.

    Raises:
        DataError: there are no examples.
    """

    def __init__(self, examples: Sequence, encoder: Callable[[Any], object], cache_bytes: int = 0):
        if len(examples) == 0:
            raise DataError(
                "no examples", where="data.train_files", got="0 rows", expected="at least one"
            )
        self.examples = examples
        self.encoder = encoder
        self._cache: dict[int, object] = {}
        self._bytes_left = cache_bytes

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int):
        row = self._cache.get(index)
        if row is None:
            row = self.encoder(self.examples[index])
            # what is kept stays: evicting hits less often where an epoch reads each row once
            num_bytes = pixel_bytes(row)
            if num_bytes <= self._bytes_left:
                self._bytes_left -= num_bytes
                self._cache[index] = row
        return row

    @property
    def has_answer(self) -> list[bool]:
        """Whether each row's answer is known."""
        return [example.has_answer for example in self.examples]


def pixel_bytes(row: object) -> int:
    """Counts the bytes of all pixels of a row: of its prompt's images, and of helper images."""
    return sum(
        value.pixel_values.nbytes for value in vars(row).values() if isinstance(value, ImageInputs)
    )
