"""`LvrExample`: what SFT reads from any format, with the checks that all formats share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_latent.data.boxes import BadBoxes
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import DataError

IMAGE_PLACEHOLDER = "<image>"
LVR_PLACEHOLDER = "<lvr>"  # a span of a response, whatever tokens spell it out
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
_ANSWER = re.compile(re.escape(ANSWER_OPEN) + r"(.*?)" + re.escape(ANSWER_CLOSE), re.DOTALL)


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
