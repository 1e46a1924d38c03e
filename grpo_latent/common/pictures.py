"""Pictures as every model is given them: RGB, upright, on white; one rule for all readers."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image

from grpo_latent.errors import DataError

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WITH_ALPHA = ("RGBA", "LA", "PA")
_CONVERTED = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", *_WITH_ALPHA)
_DEEP = "I;16"  # 16 bits grey, in any byte order


def to_rgb(image: Image.Image, where: str = "image") -> Image.Image:
    """Makes the picture that every model is given: RGB, upright, on white.

    Upright is what the EXIF orientation says, as vLLM, `datasets` and transformers' loader read
    it. What is transparent shows white, as in verl's loader and vLLM's. 16 bits of grey keep their
    upper eight, as Pillow reads 16 bits of colour. A picture that this has made stays as it is.

    Raises:
        DataError: pixels without a known range (32 bits, floats), or premultiplied ones.
    """
    check_pixels(image, where)
    turn = _TURNS.get(_orientation(image) or 1)
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # it would be turned again by whoever asks its EXIF
    if image.mode.startswith(_DEEP):
        return _scaled(image)
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")  # a palette's transparency becomes a channel
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def check_pixels(image: Image.Image, where: str = "image") -> None:
    """Decodes the image's pixels; raises `DataError` where `to_rgb` refuses what they mean."""
    image.load()  # a TIFF file is turned by this already, and says so no longer
    if image.mode not in _CONVERTED and not image.mode.startswith(_DEEP):
        raise DataError(
            "pixels without a range that is known",
            where=where,
            got=f"an image of mode {image.mode}",
            expected="8 or 16 bits a channel",
            fix="Scale its values to 0..255 and save it as PNG, or drop the row.",
        )


def is_turned(image: Image.Image) -> bool:
    """Whether `to_rgb` swaps the sides of a decoded image."""
    return _orientation(image) in (5, 6, 7, 8)


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    # a block that cannot be parsed says no orientation, and viewers show such files as they lie;
    # Pillow raises SyntaxError, struct.error and others for it
    except Exception:
        return None


def _scaled(image: Image.Image) -> Image.Image:
    """The upper eight of 16 bits of grey; the one value that a PNG calls transparent is white.

    Pillow's own conversion clips at 255, which leaves white.
    """
    deep_HW = np.asarray(image).astype(np.uint16)
    grey_HW = (deep_HW >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey_HW[deep_HW == transparent] = 255
    return Image.fromarray(grey_HW).convert("RGB")
