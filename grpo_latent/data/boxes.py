"""From a box in an image to the visual tokens that it overlaps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.protocol import Backbone
from grpo_latent.errors import DataError

# a coordinate this close to a grid line, in patches, lies on it: 1/49 * 49 < 1 in floating point
GRID_TOLERANCE = 1e-6


def check_box(box: Sequence[float], where: str) -> tuple[float, float, float, float]:
    """Returns the box as four floats (x0, y0, x1, y1), normalised to the image.

    Raises:
        DataError: not four finite numbers, outside [0, 1], or without area.
    """
    expected = "[x0, y0, x1, y1] with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"

    def problem(what: str, fix: str) -> DataError:
        return DataError(what, where=where, got=box, expected=expected, fix=fix)

    try:
        x0, y0, x1, y1 = (float(value) for value in box)
    except (TypeError, ValueError) as error:
        raise problem(
            "a box needs four numbers", "Write one list of four numbers a box."
        ) from error
    if not all(math.isfinite(value) for value in (x0, y0, x1, y1)):
        raise problem("a box coordinate is not finite", "Drop the box or correct it.")
    if min(x0, y0, x1, y1) < 0 or max(x0, y0, x1, y1) > 1:
        raise problem(
            "a box lies outside the image",
            "Divide pixel coordinates by the image's width and height.",
        )
    if x1 <= x0 or y1 <= y0:
        raise problem("a box has no area", "Order the corners: left, top, right, bottom.")
    return x0, y0, x1, y1


def box_to_visual_tokens(
    box_normalised: Sequence[float], grid_thw: Sequence[int], merge_size: int
) -> list[int]:
    """Finds the merged visual tokens that a box overlaps: ascending, row-major in the image.

    LVR's rule: floor and ceil on the patch grid, then the merge; a token counts if any of its
    patches does. The caller adds the offset of the image among the visual tokens of a prompt.

    Args:
        box_normalised: (x0, y0, x1, y1), fractions of width and height.
        grid_thw: patches along time, height and width of the image, as the image processor gives
            them.
        merge_size: patches a side of one token, 2 in the Qwen models.

    Raises:
        DataError: a bad box, a video grid, or a grid that `merge_size` does not divide.

    >>> box_to_visual_tokens((0.25, 0.0, 0.5, 0.3), grid_thw=(1, 8, 8), merge_size=2)
    [1, 5]
    """
    x0, y0, x1, y1 = check_box(box_normalised, where="box")
    time, height, width = (int(size) for size in grid_thw)
    if time != 1 or min(height, width) < merge_size or height % merge_size or width % merge_size:
        raise DataError(
            "not the grid of an image",
            where="grid_thw",
            got=(time, height, width),
            expected=f"(1, rows, columns), rows and columns multiples of merge_size {merge_size}",
        )
    rows = _covered(y0, y1, height, merge_size)
    columns = _covered(x0, x1, width, merge_size)
    return [row * (width // merge_size) + column for row in rows for column in columns]


def box_to_prompt_tokens(
    box_normalised: Sequence[float], image_idx: int, images: ImageInputs, backbone: Backbone
) -> list[int]:
    """As `box_to_visual_tokens`, as indices among the tokens of all images of a prompt.

    Args:
        image_idx: of the image that the box lies in.
    """
    num_before = int(backbone.num_image_tokens(images)[:image_idx].sum())
    first, grid_thw = backbone.box_view(images.image_grid_thw[image_idx].tolist())
    own_tokens = box_to_visual_tokens(box_normalised, grid_thw, backbone.merge_size)
    return [num_before + first + token for token in own_tokens]


def _covered(low: float, high: float, num_patches: int, merge_size: int) -> range:
    """Returns the indices along one axis that the interval [low, high] overlaps; at least one."""
    # at least one: a box on the far edge still gets a latent
    first_patch = min(math.floor(low * num_patches + GRID_TOLERANCE), num_patches - 1)
    end_patch = max(math.ceil(high * num_patches - GRID_TOLERANCE), first_patch + 1)
    return range(first_patch // merge_size, math.ceil(end_patch / merge_size))
