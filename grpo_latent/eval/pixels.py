"""Pixels of an evaluation's prompts: made when asked for, kept only as far as they fit.

A benchmark's images take tens of gigabytes as pixels and a few as files. So a prompt holds its
files, and a store holds pixels: those of the batch in hand, and of others what `max_bytes` allows.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor

from grpo_latent.backbones.images import ImageInputs

DEFAULT_BYTES = 4_000_000_000


class PixelStore:
    """Pixels by key, least recently used ones dropped first.

    Args:
        max_bytes: of all pixels together; exceeded only by those that are held.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        self.max_bytes = max_bytes
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        self._num_bytes = 0
        # one set for each open block; blocks nest, and the innermost ends first
        self._held: list[frozenset[int]] = []
        self._new_key = itertools.count()

    def add(self, images: ImageInputs, make: Callable[[], Tensor]) -> StoredImages:
        """Puts the pixels of `images` into the store; `make` makes equal ones anew."""
        stored = StoredImages(next(self._new_key), images.image_grid_thw, make, self)
        self._keep(stored.key, images.pixel_values)
        return stored

    def get(self, key: int, make: Callable[[], Tensor]) -> Tensor:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        pixels = make()
        self._keep(key, pixels)
        return pixels

    @contextmanager
    def holding(self, keys: Iterable[int]) -> Iterator[None]:
        """Keeps pixels of these keys, once they are there, within the block."""
        self._held.append(frozenset(keys))
        try:
            yield
        finally:
            self._held.pop()
            self._drop()

    def _keep(self, key: int, pixels: Tensor) -> None:
        self._kept[key] = pixels
        self._num_bytes += num_bytes(pixels)
        self._drop()

    def _drop(self) -> None:
        held = frozenset().union(*self._held)
        # least recently used ones stand first: `get` moves what it finds to the end
        for key in list(self._kept):
            if self._num_bytes <= self.max_bytes:
                return
            if key not in held:
                self._num_bytes -= num_bytes(self._kept.pop(key))


class StoredImages(ImageInputs):
    """Images whose pixels are in a store, or made anew."""

    key: int
    store: PixelStore
    _make: Callable[[], Tensor]

    def __init__(
        self, key: int, image_grid_thw: Tensor, make: Callable[[], Tensor], store: PixelStore
    ):
        for name, value in (
            ("key", key),
            ("image_grid_thw", image_grid_thw),
            ("_make", make),
            ("store", store),
        ):
            object.__setattr__(self, name, value)  # the base is frozen

    @property
    def pixel_values(self) -> Tensor:
        return self.store.get(self.key, self._make)


def num_bytes(pixels: Tensor) -> int:
    return pixels.numel() * pixels.element_size()


@contextmanager
def held(images: Iterable[ImageInputs | None]) -> Iterator[None]:
    """Keeps the pixels of these images within the block: none are made twice."""
    keys: dict[PixelStore, list[int]] = {}
    for one in images:
        if isinstance(one, StoredImages):
            keys.setdefault(one.store, []).append(one.key)
    with ExitStack() as stack:
        for store, of_store in keys.items():
            stack.enter_context(store.holding(of_store))
        yield
