"""`ImageRef`: an image of a row, decoded when it is wanted; file and row name a damaged one."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from grpo_latent.common.pictures import check_pixels, is_turned, to_rgb
from grpo_latent.errors import DataError


@dataclass(frozen=True)
class ImageRef:
    """An image that is decoded when it is wanted, and by nobody before.

    Attributes:
        where: file and row, for messages.
        path, data: exactly one of them is set: the file, or its encoded bytes.
        size: (width, height) that the picture is scaled to, whatever its shape; None for its own.
    """

    where: str
    path: Path | None = None
    data: bytes | None = None
    size: tuple[int, int] | None = None

    def read_bytes(self) -> bytes:
        """Reads the file's content, undecoded. Raises `DataError` if there is no such file."""
        if self.data is not None:
            return self.data
        return self._existing_path().read_bytes()

    def scaled_bytes(self) -> bytes:
        """The content as it is where the picture keeps its size, else a PNG of the scaled one.

        Raises:
            DataError: as `open`.
        """
        if self.size is None:
            return self.read_bytes()
        buffer = io.BytesIO()
        self.open().save(buffer, format="PNG")
        return buffer.getvalue()

    def checked_bytes(self) -> bytes:
        """Reads a file that is an image by header and checksums. Raises `DataError`."""
        data = self.read_bytes()
        ImageRef(self.where, data=data).check()
        return data

    def _existing_path(self) -> Path:
        assert self.path is not None, "path or data is set"
        if not self.path.is_file():
            raise DataError(
                "no such image file",
                where=self.where,
                got=str(self.path),
                expected="a file below the image folder",
                fix="Pass the folder that the paths are relative to, or drop the row.",
            )
        return self.path

    def open(self) -> Image.Image:
        """Decodes the picture as `to_rgb` makes it.

        Raises:
            DataError: missing file, bytes that are no image, or one that `to_rgb` refuses.
        """
        data = self.read_bytes()
        with self._reading(data):
            picture = to_rgb(Image.open(io.BytesIO(data)), self.where)
            return picture if self.size is None else picture.resize(self.size)

    def check(self) -> None:
        """Raises `DataError` unless the file exists, or the bytes in memory are an image.

        By header and checksums: it decodes no pixels and reads no file, which would take hours
        over a large data set, and misses a JPEG, GIF, BMP or TIFF that was cut.
        """
        if self.data is None:
            self._existing_path()
            return
        with self._reading(self.data):
            Image.open(io.BytesIO(self.data)).verify()

    def decoded_size(self) -> tuple[int, int]:
        """(height, width) of the upright picture, after decoding all of it once.

        Raises:
            DataError: as `open`.
        """
        data = self.read_bytes()
        with self._reading(data):
            Image.open(io.BytesIO(data)).verify()  # which decoding leaves out for PNG
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            image.draft(
                None, (1, 1)
            )  # a JPEG at an eighth: all of it is read, few pixels are made
            check_pixels(image, self.where)
        if self.size is not None:
            return self.size[1], self.size[0]
        return (width, height) if is_turned(image) else (height, width)

    @contextmanager
    def _reading(self, data: bytes) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Image.DecompressionBombError as error:
            raise DataError(
                "an image of too many pixels",
                where=self.where,
                got=str(error).partition(",")[0],
                expected=f"at most {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels",
                fix="Scale the image down (the model's processor would anyway), or drop the row.",
            ) from error
        # a damaged header makes Pillow's readers raise whatever their arithmetic does: KeyError,
        # struct.error, ZeroDivisionError, …
        except Exception as error:
            # Pillow's own word for a file of no kind that it knows names an object by its address
            is_unknown = isinstance(error, UnidentifiedImageError)
            said = "" if is_unknown else f": {error}"
            raise DataError(
                "not a readable image",
                where=self.where,
                got=f"{self.path or ''} {len(data)} bytes that start with {data[:8]!r}: "
                f"{type(error).__name__}{said}".strip(),
                expected="a PNG, JPEG or other file that Pillow decodes to its end",
                fix="Write the file's bytes as they are, or drop the row.",
            ) from error
