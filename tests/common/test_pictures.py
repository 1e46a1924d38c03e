"""Pictures as every model is given them: upright, on white, 16 bits by their range; one rule."""

import io

import numpy as np
import pytest
from PIL import Image

from grpo_latent.common.pictures import to_rgb
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import DataError
from grpo_latent.inspect.payload import image_entry

STORED = np.arange(6, dtype=np.uint8).reshape(2, 3)
# what EXIF's numbers 1 to 8 say of a picture that is stored like that
UPRIGHT = {
    1: STORED,
    2: STORED[:, ::-1],
    3: STORED[::-1, ::-1],
    4: STORED[::-1],
    5: STORED.T,
    6: np.rot90(STORED, -1),
    7: np.rot90(STORED, 2).T,
    8: np.rot90(STORED, 1),
}


def reopened(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation, format):
    """Pillow turns TIFF files itself, and no others."""
    exif = Image.Exif()
    exif[0x112] = orientation
    image = reopened(Image.fromarray(STORED), format, exif=exif, lossless=True)
    once = to_rgb(image)
    assert np.array_equal(np.asarray(once)[:, :, 0], UPRIGHT[orientation])
    assert np.array_equal(np.asarray(to_rgb(once)), np.asarray(once)), "a picture is turned once"


def test_a_broken_exif_block_says_nothing():
    image = reopened(Image.fromarray(STORED), "JPEG", exif=b"Exif\0\0nonsense")
    assert to_rgb(image).size == (3, 2)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_is_white(mode):
    assert to_rgb(Image.new(mode, (2, 2))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_a_colour_that_is_called_transparent_is_white(mode):
    clear = {"RGB": (0, 0, 0)}.get(mode, 0)
    image = reopened(Image.new(mode, (2, 2), 0), "PNG", transparency=clear)
    assert to_rgb(image).getpixel((1, 1)) == (255, 255, 255)


def test_half_transparent_is_half_way_to_white():
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_eight(format):
    """Pillow's own conversion makes all of them but the first white."""
    deep = np.array([[0, 255, 256, 0x1234, 0x8000, 65535]], dtype=np.uint16)
    picture = to_rgb(reopened(Image.fromarray(deep), format))
    assert np.asarray(picture)[0, :, 1].tolist() == [0, 0, 1, 0x12, 0x80, 255]
    big_endian = Image.new("I;16B", (1, 1))
    big_endian.putpixel((0, 0), 0x1234)
    assert to_rgb(big_endian).getpixel((0, 0)) == (0x12,) * 3


def test_a_deep_grey_that_is_called_transparent_is_white():
    deep = Image.fromarray(np.array([[0x1234, 0x1235]], dtype=np.uint16))
    picture = to_rgb(reopened(deep, "PNG", transparency=0x1234))
    assert np.asarray(picture)[0, :, 0].tolist() == [255, 0x12]


@pytest.mark.parametrize("mode", ["I", "F", "RGBa", "La"])
def test_pixels_without_a_known_range_are_refused(mode):
    with pytest.raises(DataError, match=f"row 3: pixels without a range.*mode {mode}"):
        to_rgb(Image.new(mode, (2, 2)), "row 3")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_pillows(mode):
    image = Image.new(mode, (2, 2))
    assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()


def test_files_and_the_inspectors_page_follow_the_same_rule(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGBA", (30, 20)).save(tmp_path / "a.png", exif=exif)
    picture = ImageRef("row", path=tmp_path / "a.png").open()
    assert picture.size == (20, 30) and picture.getpixel((0, 0)) == (255, 255, 255)
    entry = image_entry(Image.open(tmp_path / "a.png"), (2, 3))
    assert (entry["width"], entry["height"]) == (20, 30)
