"""Images of SFT: their size in tokens, their two tensors in a batch, their embeddings."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import ProcessorMixin

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.registry import backbone_of_processor
from grpo_latent.models.adapter import ModelAdapter


def set_image_tokens(processor: ProcessorMixin, minimum: int | None, maximum: int | None) -> None:
    """Bounds the merged visual tokens of an image.

    The processor is saved with the model, so that RL sees the same images.

    Raises:
        ConfigError: the bounds cross, or the family's images have one size.
    """
    if (minimum, maximum) != (None, None):
        backbone_of_processor(processor).bound_image_tokens(processor, minimum, maximum)


def image_columns(images: ImageInputs | None, prefix: str = "") -> dict[str, Tensor]:
    """Returns the two tensors of a batch that carry its images; none where there are no images."""
    if images is None:
        return {}
    return {
        f"{prefix}pixel_values": images.pixel_values,
        f"{prefix}image_grid_thw": images.image_grid_thw,
    }


def batch_images(batch: dict[str, Tensor], prefix: str = "") -> ImageInputs | None:
    """Inverts `image_columns`."""
    if f"{prefix}pixel_values" not in batch:
        return None
    return ImageInputs(batch[f"{prefix}pixel_values"], batch[f"{prefix}image_grid_thw"])


def visual_embeddings(adapter: ModelAdapter, images: ImageInputs | None) -> Tensor:
    """Embeds all images in order, after the merger: [M, H], M merged visual tokens."""
    if images is None:
        return torch.zeros(0, adapter.hidden_size, device=adapter.device, dtype=adapter.dtype)
    return adapter.encode_images(images)
