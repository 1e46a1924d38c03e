"""Encodes an image once: within a call, a block of calls, or, for a frozen tower, across steps.

    visual(pixels of I images) ──split──▶ images ──known?──▶ features of each ──cat──▶ one output

A group's rows all show one image, an SFT step needs its features twice (as inputs and as targets),
and a frozen tower gives the same features in every epoch. The cache stands between callers and the
tower's own `forward`; it changes no weight, no `state_dict` entry, and nothing for callers that
pass precomputed positions or ask for attentions.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from grpo_latent.backbones.protocol import Backbone
from grpo_latent.backbones.registry import backbone_of
from grpo_latent.errors import ConfigError

_ATTRIBUTE = "_grpo_latent_vision_cache"
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Encoded:
    """One image: merged tokens [n, H], deepstack features (each [n, H]), and patch states.

    The latter, [patches, D], only where they are kept.
    """

    merged: Tensor
    deepstack: tuple[Tensor, ...]
    patches: Tensor | None

    @property
    def num_bytes(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size() for tensor in (self.merged, *self.deepstack)
        )


class VisionCache:
    """The cache of one vision tower (of a backbone that `caches_tower`).

    Three scopes. Always: equal images of a call are encoded once, together with the others. In
    `reuse()`: also over the calls of the block, with gradients. With `max_bytes` and a frozen
    tower: over all calls, least recently used images dropped first; then each image is encoded *on
    its own*, so that its features cannot depend on the batch that it came in, and a resumed run
    computes what an uninterrupted one does, to the bit.

    Under FSDP all ranks must call the blocks of the tower equally often: leave `max_bytes` at 0
    there.
    """

    def __init__(self, visual: nn.Module, merge_size: int):
        self.max_bytes = 0
        self.num_requested = 0
        self.num_encoded = 0
        self._visual = visual
        self._forward_of_tower = visual.forward
        self._merge_area = merge_size**2
        self._output_type: type[ModelOutput] | None = None
        self._entries: OrderedDict[bytes, _Encoded] = OrderedDict()
        self._num_bytes = 0
        self._state_of_entries: tuple | None = None
        self._block: list[tuple[tuple, Tensor, _Encoded]] | None = None
        self._last_call: tuple[Tensor, tuple, list[_Encoded]] | None = None

    @classmethod
    def install(cls, model: PreTrainedModel, max_bytes: int | None = None) -> VisionCache:
        """The cache of the model's vision tower, put in place the first time.

        Args:
            max_bytes: bound of what is kept across calls; None leaves it (0 at first: nothing is
                kept).

        Raises:
            ConfigError: no vision tower that it knows to wrap, or `max_bytes` for a tower that
                trains.
        """
        backbone = backbone_of(model)
        if not backbone.caches_tower:
            raise ConfigError(
                "no vision tower whose images can be cached",
                where="model",
                got=type(model).__name__,
                expected="a backbone with caches_tower (Qwen-VL)",
            )
        visual = backbone.vision_modules[0]
        cache = getattr(visual, _ATTRIBUTE, None)
        if cache is None:
            cache = cls(visual, backbone.merge_size)
            visual.forward = cache._forward
            object.__setattr__(visual, _ATTRIBUTE, cache)
        if max_bytes is not None:
            cache.max_bytes = max_bytes
            cache.clear()
        if cache.max_bytes:
            cache._check_frozen()
        return cache

    @contextmanager
    def reuse(self) -> Iterator[VisionCache]:
        """Within the block, an image is encoded once while weights and autocast stay.

        A block within a block goes on with what the outer one has.
        """
        if self._block is not None:
            yield self
            return
        self._block = []
        self._last_call = None
        try:
            yield self
        finally:
            self._block = self._last_call = None

    def clear(self) -> None:
        """Drops what is kept across calls."""
        self._entries.clear()
        self._num_bytes = 0

    def _check_frozen(self) -> None:
        if any(parameter.requires_grad for parameter in self._visual.parameters()):
            raise ConfigError(
                "features of a tower that trains cannot be kept across steps",
                where="vision cache",
                got="parameters that require gradients",
                expected="a frozen vision tower and merger",
                fix="Freeze both, or set the cache's size to 0.",
            )

    def _state(self) -> tuple:
        """What features depend on besides the image: autocast, and the parameters' versions.

        In-place updates of a parameter raise its version.
        """
        device = next(self._visual.parameters()).device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # under FSDP a parameter may be a DTensor, whose data lie in its local tensor
        local = (
            getattr(parameter, "_local_tensor", parameter)
            for parameter in self._visual.parameters()
        )
        return autocast, tuple((tensor.data_ptr(), tensor._version) for tensor in local)

    def _forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> ModelOutput:
        asks_for_more = any(isinstance(value, Tensor) for value in kwargs.values()) or any(
            kwargs.get(name) for name in ("output_attentions", "output_hidden_states")
        )
        if asks_for_more or kwargs.get("return_dict") is False:
            return self._forward_of_tower(hidden_states, grid_thw, **kwargs)
        encoded = self._encode(hidden_states, grid_thw, kwargs)
        deepstack = [
            torch.cat(features)
            for features in zip(*(image.deepstack for image in encoded), strict=True)
        ]
        # all images have their patch states, or none: kept entries go without
        patches = [image.patches for image in encoded if image.patches is not None]
        assert self._output_type is not None, "some `_run` made what was encoded"
        # a new object every time: transformers splits `pooler_output` in place
        return self._output_type(
            last_hidden_state=torch.cat(patches) if patches else None,
            pooler_output=torch.cat([image.merged for image in encoded]),
            **({"deepstack_features": deepstack} if deepstack else {}),
        )

    def _encode(self, pixel_values: Tensor, grid: Tensor, kwargs: dict) -> list[_Encoded]:
        remembers = self.max_bytes > 0 or self._block is not None
        state = (torch.is_grad_enabled(), *self._state()) if remembers else ()
        if self._last_call is not None:
            pixels, last_state, encoded = self._last_call
            if pixels is pixel_values and last_state == state:
                return encoded
        parts = list(pixel_values.split(grid.prod(-1).tolist()))
        self.num_requested += len(parts)
        look_up = self._encode_kept if self.max_bytes else self._encode_distinct
        encoded = look_up(parts, grid, kwargs, state)
        if self._block is not None:
            self._last_call = (pixel_values, state, encoded)
        return encoded

    def _encode_kept(
        self, parts: list[Tensor], grid: Tensor, kwargs: dict, state: tuple
    ) -> list[_Encoded]:
        """Each image from the entries, or encoded on its own."""
        self._check_frozen()
        # without the first, whether gradients are on: kept features have none
        if state[1:] != self._state_of_entries:
            self.clear()
            self._state_of_entries = state[1:]
        encoded = []
        for image_idx, (part, size) in enumerate(zip(parts, grid.tolist(), strict=True)):
            key = image_digest(part, size)
            image = self._entries.get(key)
            if image is None:
                (image,) = self._run(part, grid[image_idx : image_idx + 1], kwargs)
                image = _Encoded(
                    image.merged.detach(), tuple(f.detach() for f in image.deepstack), None
                )
                self._entries[key] = image
                self._num_bytes += image.num_bytes
            self._entries.move_to_end(key)
            encoded.append(image)
        while self._num_bytes > self.max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._num_bytes -= dropped.num_bytes
        return encoded

    def _encode_distinct(
        self, parts: list[Tensor], grid: Tensor, kwargs: dict, state: tuple
    ) -> list[_Encoded]:
        """One call of the tower over the images that are not known yet."""
        known = [] if self._block is None else self._block
        candidates: dict[tuple, list[tuple[Tensor, int]]] = {}
        for index, (key, part, _) in enumerate(known):
            candidates.setdefault(key, []).append((part, index))
        indices: list[int] = []
        new: list[tuple[tuple, Tensor, int]] = []
        for image_idx, (part, size, total) in enumerate(
            zip(parts, grid.tolist(), _bit_sums(parts), strict=True)
        ):
            key = (state, *size, total)
            same = [index for other, index in candidates.get(key, []) if torch.equal(other, part)]
            if not same:
                same = [len(known) + len(new)]
                new.append((key, part, image_idx))
                candidates.setdefault(key, []).append((part, same[0]))
            indices.append(same[0])
        images = [image for _, _, image in known]
        if new:
            pixels = torch.cat([part for _, part, _ in new])
            fresh = self._run(pixels, grid[[image_idx for _, _, image_idx in new]], kwargs)
            images += fresh
            if self._block is not None:
                self._block += [
                    (key, part, image) for (key, part, _), image in zip(new, fresh, strict=True)
                ]
        return [images[index] for index in indices]

    def _run(self, pixel_values: Tensor, grid: Tensor, kwargs: dict) -> list[_Encoded]:
        output = self._forward_of_tower(pixel_values, grid, **kwargs)
        self.num_encoded += grid.shape[0]
        self._output_type = type(output)
        num_patches = grid.prod(-1).tolist()
        num_tokens = [count // self._merge_area for count in num_patches]
        merged = output.pooler_output.split(num_tokens)
        layers = [
            features.split(num_tokens)
            for features in getattr(output, "deepstack_features", None) or []
        ]
        patches = output.last_hidden_state.split(num_patches)
        return [
            _Encoded(merged[i], tuple(layer[i] for layer in layers), patches[i])
            for i in range(len(num_patches))
        ]


def encoding_once(backbone: Backbone) -> AbstractContextManager:
    """Within the block an image is encoded once, where the backbone's tower can be cached."""
    return VisionCache.install(backbone.model).reuse() if backbone.caches_tower else nullcontext()


def image_digest(pixels: Tensor, size: list[int]) -> bytes:
    """Digest of an image's pixels and grid."""
    content = pixels.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(
        content.data, digest_size=16, salt=repr((size, pixels.dtype)).encode()[:16]
    ).digest()


def _bit_sums(parts: list[Tensor]) -> list[int]:
    """Exact sums of bit patterns: equal for equal images, so that few pairs need comparing."""
    integer = _INTEGERS[parts[0].element_size()]
    return torch.stack(
        [part.detach().view(integer).sum(dtype=torch.int64) for part in parts]
    ).tolist()
