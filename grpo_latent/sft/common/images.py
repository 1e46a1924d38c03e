"""Images of SFT's rows and batches: how large the processor makes them, and what the model makes of them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import ProcessorMixin

from grpo_latent.errors import ConfigError
from grpo_latent.models.adapter import ImageInputs, ModelAdapter


def set_image_tokens(processor: ProcessorMixin, minimum: int | None, maximum: int | None) -> None:
    """Bounds the merged visual tokens of an image; the processor is saved with the model, so RL sees the same images.

    Raises:
        ConfigError: the bounds cross.
    """
    image_processor = processor.image_processor
    token_pixels = (image_processor.patch_size * image_processor.merge_size) ** 2
    size = dict(image_processor.size)
    for name, count in (("shortest_edge", minimum), ("longest_edge", maximum)):
        if count is not None:
            size[name] = count * token_pixels
    if size["shortest_edge"] > size["longest_edge"]:
        raise ConfigError(
            "no image size fits",
            where="data.min_image_tokens, data.max_image_tokens",
            got=(size["shortest_edge"] // token_pixels, size["longest_edge"] // token_pixels),
            expected="minimum <= maximum",
        )
    image_processor.size = type(image_processor.size)(**size)


def image_columns(images: ImageInputs | None, prefix: str = "") -> dict[str, Tensor]:
    """The two tensors of a batch that carry its images; none where there are no images."""
    if images is None:
        return {}
    return {f"{prefix}pixel_values": images.pixel_values, f"{prefix}image_grid_thw": images.image_grid_thw}


def batch_images(batch: dict[str, Tensor], prefix: str = "") -> ImageInputs | None:
    """The inverse of `image_columns`."""
    if f"{prefix}pixel_values" not in batch:
        return None
    return ImageInputs(batch[f"{prefix}pixel_values"], batch[f"{prefix}image_grid_thw"])


def visual_embeddings(adapter: ModelAdapter, images: ImageInputs | None) -> Tensor:
    """Image embeddings after the merger, [M, H], of all images in order."""
    if images is None:
        return torch.zeros(0, adapter.hidden_size, device=adapter.device, dtype=adapter.dtype)
    return adapter.encode_images(images)
