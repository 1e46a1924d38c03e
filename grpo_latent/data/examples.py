"""`LvrExample`: what SFT reads from any format, with the checks that all formats share."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from grpo_latent.backbones.images import check_pixels, is_turned, to_rgb
from grpo_latent.data.boxes import BadBoxes
from grpo_latent.errors import DataError

IMAGE_PLACEHOLDER = "<image>"
LVR_PLACEHOLDER = "<lvr>"  # a span of a response, whatever tokens spell it out
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
_ANSWER = re.compile(re.escape(ANSWER_OPEN) + r"(.*?)" + re.escape(ANSWER_CLOSE), re.DOTALL)


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


@dataclass(frozen=True)
class LvrExample:
    """One supervised example, whatever file it came from.

    Attributes:
        messages: before the response; contents are lists of {"type": "text", "text"} and {"type":
            "image"} in order.
        images: in the order of the image parts.
        boxes: normalised, one per `<lvr>` of the response, in order.
        box_images: index into `images`, one per box.
        response: template with `<lvr>` where a span stands. Complete, to be followed by EOS, if
            `has_answer`; otherwise it stops where the answer would begin, and no EOS follows.
        has_answer: whether the answer is known.
        answer: its text, "" if unknown.
        where: file and row, for messages.
    """

    messages: tuple[dict, ...]
    images: tuple[ImageRef, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    box_images: tuple[int, ...]
    response: str
    has_answer: bool
    answer: str
    data_source: str
    where: str


def response_template(num_spans: int, answer: str | None) -> str:
    """Writes the default response: its spans, then the answer, or an open tag for an unknown one.

    >>> response_template(1, "7"), response_template(2, None)
    ('<lvr> <answer> 7 </answer>', '<lvr> <lvr> <answer>')
    """
    spans = [LVR_PLACEHOLDER] * num_spans
    return " ".join(
        [*spans, ANSWER_OPEN] if answer is None else [*spans, ANSWER_OPEN, answer, ANSWER_CLOSE]
    )


def split_content(text: str) -> list[dict]:
    """Splits a text with `<image>` placeholders into content parts, as verl's data set does.

    >>> split_content("read red ?<image>")
    [{'type': 'text', 'text': 'read red ?'}, {'type': 'image'}]
    """
    segments = re.split(f"({re.escape(IMAGE_PLACEHOLDER)})", text)
    return [
        {"type": "image"} if segment == IMAGE_PLACEHOLDER else {"type": "text", "text": segment}
        for segment in segments
        if segment  # re.split gives empty texts between two images and at the ends
    ]


def join_content(content: Sequence[dict]) -> str:
    """Inverts `split_content`."""
    return "".join(
        IMAGE_PLACEHOLDER if part["type"] == "image" else part["text"] for part in content
    )


def find_answers(response: str) -> list[str]:
    """Finds the texts between answer tags, stripped."""
    return [text.strip() for text in _ANSWER.findall(response)]


def check_images(messages: Sequence[dict], images: Sequence[ImageRef], where: str) -> None:
    """Checks that the messages have one placeholder per image, and `ImageRef.check`s the images.

    Raises:
        DataError: they do not match, an image is missing or malformed, or there is video or audio.
    """
    check_placeholders(messages, images, where)
    for image in images:
        image.check()


def check_placeholders(messages: Sequence[dict], images: Sequence[ImageRef], where: str) -> None:
    """Checks that the messages have one placeholder per image, and no video or audio.

    Raises:
        DataError: they have not.
    """

    def problem(what: str, got: str, expected: str, fix: str) -> DataError:
        return DataError(what, where=where, got=got, expected=expected, fix=fix)

    texts = [
        part["text"]
        for message in messages
        for part in message["content"]
        if part["type"] == "text"
    ]
    for placeholder in ("<video>", "<audio>"):
        if any(placeholder in text for text in texts):
            raise problem(
                f"{placeholder} is not supported",
                " ".join(texts),
                "text and images",
                "Drop the row.",
            )
    num_placeholders = sum(
        part["type"] == "image" for message in messages for part in message["content"]
    )
    if num_placeholders != len(images):
        raise problem(
            "placeholders do not match the images",
            f"{num_placeholders} {IMAGE_PLACEHOLDER} for {len(images)} images",
            f"one {IMAGE_PLACEHOLDER} per image",
            "Put one where each image belongs.",
        )


def build_example(
    *,
    messages: list[dict],
    images: list[ImageRef],
    bboxes: object,
    bbox_images: object,
    response: object,
    has_answer: object,
    answer: str,
    data_source: str,
    where: str,
    fields: dict[str, str],
    bad_boxes: BadBoxes | None = None,
) -> LvrExample:
    """Checks what all formats share, and builds the example.

    Args:
        messages: with split contents.
        bboxes, bbox_images, response, has_answer: as read; None means absent, and gives no boxes,
            image 0, the default response.
        answer: "" if unknown.
        fields: how the format calls messages, bboxes, bbox_images, response, has_answer and
            answer.
        bad_boxes: what becomes of them; None refuses.

    Raises:
        DataError: see the messages.
    """

    def problem(field: str, what: str, got: object, expected: str, fix: str) -> DataError:
        return DataError(
            what, where=f"{where}: {fields[field]}", got=got, expected=expected, fix=fix
        )

    check_images(messages, images, f"{where}: {fields['messages']}")
    boxes = _check_boxes(bboxes, f"{where}: {fields['bboxes']}", bad_boxes or BadBoxes(), problem)
    box_images = _check_box_images(bbox_images, len(boxes), len(images), problem)
    if not isinstance(has_answer, bool):
        raise problem(
            "has_answer",
            "not a truth value",
            has_answer,
            "true or false",
            "Leave it out if all are known.",
        )
    if has_answer != (answer != ""):
        raise problem(
            "answer",
            "the answer contradicts has_answer",
            f"has_answer {has_answer}, answer {answer!r}",
            "an answer if and only if has_answer is true",
            "Fill in the answer, or empty it and set has_answer to false.",
        )
    if response is None:
        response = response_template(len(boxes), answer if has_answer else None)
    response = _checked_response(response, len(boxes), has_answer, problem)
    return LvrExample(
        messages=tuple(messages),
        images=tuple(images),
        boxes=boxes,
        box_images=box_images,
        response=response,
        has_answer=has_answer,
        answer=answer,
        data_source=data_source,
        where=where,
    )


def _check_boxes(
    bboxes: object, where: str, bad_boxes: BadBoxes, problem
) -> tuple[tuple[float, float, float, float], ...]:
    if bboxes is None:
        return ()
    if not isinstance(bboxes, list | tuple):
        raise problem(
            "bboxes",
            "not a list of boxes",
            bboxes,
            "[[x0, y0, x1, y1], ...]",
            "Write a list of lists.",
        )
    return tuple(bad_boxes.check(box, f"{where}[{index}]") for index, box in enumerate(bboxes))


def _check_box_images(
    bbox_images: object, num_boxes: int, num_images: int, problem
) -> tuple[int, ...]:
    if num_boxes and not num_images:
        raise problem(
            "bboxes", "boxes without an image", f"{num_boxes} boxes", "an image", "Add the image."
        )
    if bbox_images is None and num_boxes and num_images > 1:
        raise problem(
            "bbox_images",
            "several images, and it is not said which a box belongs to",
            f"{num_images} images, {num_boxes} boxes",
            "one image index per box",
            "Add the field, for example [0, 1].",
        )
    indices = (0,) * num_boxes if bbox_images is None else bbox_images
    if (
        not isinstance(indices, list | tuple)
        or len(indices) != num_boxes
        # not isinstance: True is an int
        or not all(type(index) is int and 0 <= index < num_images for index in indices)
    ):
        raise problem(
            "bbox_images",
            "not one image index per box",
            bbox_images,
            f"{num_boxes} integers in [0, {num_images})",
            "Count images from 0.",
        )
    return tuple(indices)


def _checked_response(response: object, num_boxes: int, has_answer: bool, problem) -> str:
    if not isinstance(response, str) or not response.strip():
        raise problem(
            "response",
            "no response",
            response,
            "a non-empty text",
            "Add the response that SFT imitates.",
        )
    num_spans = response.count(LVR_PLACEHOLDER)
    if num_spans != num_boxes:
        raise problem(
            "response",
            "spans do not match the boxes",
            f"{num_spans} {LVR_PLACEHOLDER} for {num_boxes} boxes in {response!r}",
            f"one {LVR_PLACEHOLDER} per box",
            "Add the missing boxes or placeholders.",
        )
    # an answer that the reward would not find teaches a format that is never rewarded
    num_answers = len(find_answers(response))
    closed_tags = response.count(ANSWER_CLOSE)
    if has_answer and (num_answers, closed_tags) != (1, 1):
        raise problem(
            "response",
            "no single answer",
            response,
            f"one {ANSWER_OPEN} ... {ANSWER_CLOSE}",
            "Tag the final answer; where it is unknown, set has_answer to false.",
        )
    if not has_answer and closed_tags:
        raise problem(
            "response",
            "an answer where has_answer is false",
            response,
            f"a response that stops at or before {ANSWER_OPEN}",
            "Cut the response there, or set has_answer to true.",
        )
    return response
