"""Images as models take them: pixels, as a family's processor lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageInputs:
    """Pixels of the images of one prompt or batch, as the family's image processor lays them out.

    A family says what a row of either field is (`Backbone.num_pixel_rows`, `num_image_tokens`).
    Both are concatenated along their first dimension when prompts become a batch.

    Attributes:
        pixel_values: float. Qwen-VL: [patches, channels * temporal * patch * patch]; Chameleon:
            [images, channels, height, width]; in general rows of pixels, those of an image next to
            each other.
        image_grid_thw: int64 [images, 3], cells of each image along time (or tiles), height and
            width. Qwen-VL counts patches before the merger, the others tokens.
    """

    pixel_values: Tensor
    image_grid_thw: Tensor

    def to(self, device: torch.device | str) -> ImageInputs:
        return ImageInputs(self.pixel_values.to(device), self.image_grid_thw.to(device))

    @staticmethod
    def concat(images: Sequence[ImageInputs | None]) -> ImageInputs | None:
        """One batch of all images in order; None if there are none."""
        present = [each for each in images if each is not None]
        if not present:
            return None
        return ImageInputs(
            torch.cat([each.pixel_values for each in present]),
            torch.cat([each.image_grid_thw for each in present]),
        )
