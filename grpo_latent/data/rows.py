"""Rows on disk and in memory: verl's parquet schema, and `LvrExample`, what SFT reads from any format.

A verl row (what a field means, and what a reader insists on):

    data_source    str, picks the reward
    prompt         [{"role": "user", "content": "read red ?<image>"}], one <image> per image
    images         [{"bytes": ..., "path": null}] or a path; [] or absent for text
    ability        str, unused
    reward_model   {"style": "rule", "ground_truth": "7"}; "" if and only if extra_info.has_answer is false
    extra_info     {"index": 0, "split": "train", "has_answer": true, "bboxes": [[x0, y0, x1, y1]], "bbox_images": [0],
                    "response": "<lvr> <answer> 7 </answer>", ...}; SFT needs bboxes, RL needs none of it
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from grpo_latent.errors import DataError

IMAGE_PLACEHOLDER, LVR_PLACEHOLDER = "<image>", "<lvr>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ImageRef:
    """An image that is decoded when it is wanted. Exactly one of `path` and `data` is set; `where` names the row."""

    where: str
    path: Path | None = None
    data: bytes | None = None

    def open(self) -> Image.Image:
        """The RGB image.

        Raises:
            DataError: missing file, or bytes that are no image.
        """
        source = self.path if self.data is None else io.BytesIO(self.data)
        try:
            return Image.open(source).convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise DataError(
                "not a readable image",
                where=self.where,
                got=str(self.path) if self.data is None else f"{len(self.data)} bytes: {error}",
                expected="a PNG, JPEG or other file that Pillow decodes",
                fix="Write the file's bytes as they are, or drop the row.",
            ) from error

    def check(self) -> None:
        """Raises `DataError` unless the file exists, or the bytes start like an image; decodes no pixels."""
        if self.data is None:
            if not self.path.is_file():
                raise DataError(
                    "no such image file",
                    where=self.where,
                    got=str(self.path),
                    expected="a file below the image folder",
                    fix="Pass the folder that the paths are relative to.",
                )
            return
        try:
            Image.open(io.BytesIO(self.data)).verify()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
            self.open()  # raises with the details


@dataclass(frozen=True)
class LvrExample:
    """One supervised example, whatever file it came from.

    Attributes:
        messages: before the response; contents are lists of {"type": "text", "text"} and {"type": "image"} in order.
        images: in the order of the image parts.
        boxes: normalised, one per `<lvr>` of the response, in order.
        box_images: index into `images`, one per box.
        response: template with `<lvr>` where a span stands. Complete, to be followed by EOS, if `has_answer`;
            otherwise it stops where the answer would begin, and no EOS follows.
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


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of uint8 [height, width, 3]; lossless."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def response_template(num_spans: int, answer: str | None) -> str:
    """The default response: its spans, then the answer, or an open answer tag if the answer is unknown.

    >>> response_template(1, "7"), response_template(2, None)
    ('<lvr> <answer> 7 </answer>', '<lvr> <lvr> <answer>')
    """
    spans = [LVR_PLACEHOLDER] * num_spans
    return " ".join([*spans, ANSWER_OPEN] if answer is None else [*spans, ANSWER_OPEN, answer, ANSWER_CLOSE])


def verl_row(
    *,
    data_source: str,
    prompt: str,
    images: Sequence[bytes],
    answer: str | None,
    index: int,
    split: str,
    bboxes: Sequence[Sequence[float]] = (),
    bbox_images: Sequence[int] | None = None,
    response: str | None = None,
    kind: str | None = None,
    steps: Sequence[str] | None = None,
) -> dict:
    """A row of verl's schema. `answer` None means unknown: the ground truth is empty and `has_answer` False."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": prompt}],
        "images": [{"bytes": data, "path": None} for data in images],
        "ability": "vqa",
        "reward_model": {"style": "rule", "ground_truth": "" if answer is None else answer},
        "extra_info": {
            "index": index,
            "split": split,
            "has_answer": answer is not None,
            "bboxes": [list(box) for box in bboxes],
            "bbox_images": [0] * len(bboxes) if bbox_images is None else list(bbox_images),
            "response": response_template(len(bboxes), answer) if response is None else response,
            "kind": kind,
            "steps": None if steps is None else list(steps),
        },
    }


def _schema():
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    extra_info = pa.struct(
        [
            ("index", pa.int64()),
            ("split", pa.string()),
            ("has_answer", pa.bool_()),
            ("bboxes", pa.list_(pa.list_(pa.float64()))),
            ("bbox_images", pa.list_(pa.int64())),
            ("response", pa.string()),
            ("kind", pa.string()),
            ("steps", pa.list_(pa.string())),
        ]
    )
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
            ("images", pa.list_(image)),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
            ("extra_info", extra_info),
        ]
    )


def write_verl_parquet(path: str | Path, rows: Sequence[dict]) -> Path:
    """Writes rows of `verl_row`; the schema is fixed, so that files concatenate. A failed write leaves no file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=_schema()), part, compression="zstd", row_group_size=1024)
    os.replace(part, path)
    return path
