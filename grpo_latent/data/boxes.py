"""From a box in an image to the visual tokens that it overlaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.protocol import Backbone
from grpo_latent.errors import BadBoxError, ConfigError, DataError

# a coordinate this close to a grid line, in patches, lies on it: 1/49 * 49 < 1 in floating point
GRID_TOLERANCE = 1e-6
# width or height that a clamped box keeps at least: less than the tolerance on any grid
_LEAST_SIDE = 1e-9
REFUSE, CLAMP, DROP = ON_BAD_BOX = ("refuse", "clamp", "drop")


def check_box(box: Sequence[float], where: str) -> tuple[float, float, float, float]:
    """Returns the box as four floats (x0, y0, x1, y1), normalised to the image.

    Raises:
        DataError: not four numbers.
        BadBoxError: not finite, outside [0, 1], or without area.
    """
    expected = "[x0, y0, x1, y1] with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"

    def problem(what: str, fix: str) -> BadBoxError:
        return BadBoxError(what, where=where, got=box, expected=expected, fix=fix)

    try:
        x0, y0, x1, y1 = (float(value) for value in box)
    except (TypeError, ValueError) as error:
        raise DataError(
            "a box needs four numbers",
            where=where,
            got=box,
            expected=expected,
            fix="Write one list of four numbers a box.",
        ) from error
    if not all(math.isfinite(value) for value in (x0, y0, x1, y1)):
        raise problem("a box coordinate is not finite", "Drop the box or correct it.")
    if min(x0, y0, x1, y1) < 0 or max(x0, y0, x1, y1) > 1:
        raise problem(
            "a box lies outside the image",
            "Divide pixel coordinates by the image's width and height; for SFT, "
            "data.on_bad_box=clamp takes the part inside.",
        )
    if x1 <= x0 or y1 <= y0:
        raise problem("a box has no area", "Order the corners: left, top, right, bottom.")
    return x0, y0, x1, y1


def clamp_box(box: Sequence[float], where: str) -> tuple[float, float, float, float]:
    """The part of a box within its image, as the published code takes it.

    A box without width or height, or beside the image, keeps a sliver: the one column or row of
    tokens where it stands. (The published code takes none where such a box lies on a line of the
    tokens' grid.)

    >>> clamp_box((-0.01, 0.5, 1.001, 0.75), "box")
    (0.0, 0.5, 1.0, 0.75)

    Raises:
        BadBoxError: not finite, or the corners are out of order.
    """
    corners = [float(value) for value in box]
    # NaN fails the comparison, too
    is_ordered = corners[0] <= corners[2] and corners[1] <= corners[3]
    if not (is_ordered and all(math.isfinite(value) for value in corners)):
        return check_box(box, where)  # raises
    x0, y0, x1, y1 = (min(max(value, 0.0), 1.0) for value in corners)
    x0, x1 = _with_side(x0, x1)
    y0, y1 = _with_side(y0, y1)
    return check_box((x0, y0, x1, y1), where)


def _with_side(low: float, high: float) -> tuple[float, float]:
    if high - low >= _LEAST_SIDE:
        return low, high
    return (low, low + _LEAST_SIDE) if low + _LEAST_SIDE <= 1 else (low - _LEAST_SIDE, low)


@dataclass
class BadBoxes:
    """What becomes of boxes that no image has; it counts them.

    Attributes:
        rule: `refuse` (an error names the row), `clamp` (`clamp_box`), or `drop` (the row is left
            out by its reader, which counts it here).
        num_clamped: boxes; num_dropped: rows.
        first: where the first one stood.
    """

    rule: str = REFUSE
    num_clamped: int = 0
    num_dropped: int = 0
    first: str = ""

    def __post_init__(self) -> None:
        if self.rule not in ON_BAD_BOX:
            raise ConfigError(
                "unknown value",
                where="data.on_bad_box",
                got=self.rule,
                expected=f"one of {ON_BAD_BOX}",
            )

    def check(self, box: Sequence[float], where: str) -> tuple[float, float, float, float]:
        """The box to train on.

        Raises:
            DataError: as `check_box`, but for what `clamp` mends.
        """
        try:
            return check_box(box, where)
        except BadBoxError:
            if self.rule != CLAMP:
                raise
            clamped = clamp_box(box, where)
        self.num_clamped += 1
        self.first = self.first or where
        return clamped

    def drop(self, error: BadBoxError) -> None:
        """Counts a row with such a box. Raises `error` unless the rule is `drop`."""
        if self.rule != DROP:
            raise error
        self.num_dropped += 1
        self.first = self.first or str(error.where)

    def report(self) -> str:
        """One line on what was found; empty if nothing was."""
        if self.rule == REFUSE or not self.num_clamped + self.num_dropped:
            return ""
        found = (
            f"{self.num_clamped} boxes clamped"
            if self.rule == CLAMP
            else f"{self.num_dropped} rows dropped"
        )
        return f"data.on_bad_box={self.rule}: {found}, the first at {self.first}"


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
