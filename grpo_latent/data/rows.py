"""Rows in verl's parquet schema: writing, checking, reading.

A verl row (what a field means, and what a reader insists on):

    data_source    str, picks the reward
    prompt         [{"role": "user", "content": "read red ?<image>"}], one <image> per image
    images         [{"bytes": ..., "path": null}] or a path; [] or absent for text
    ability        str, unused
    reward_model   {"style": "rule", "ground_truth": "7"}; "" if and only if has_answer is false
    extra_info     {"index": 0, "split": "train", "has_answer": true, "bboxes": [[x0, y0, x1, y1]],
                    "bbox_images": [0], "response": "<lvr> <answer> 7 </answer>", ...};
                    SFT needs bboxes, RL needs none of it
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from grpo_latent.common.files import replacing_file
from grpo_latent.data.boxes import BadBoxes
from grpo_latent.data.examples import (
    LvrExample,
    build_example,
    check_images,
    check_placeholders,
    response_template,
    split_content,
)
from grpo_latent.data.files import ROWS_PER_GROUP, iter_verl_rows
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import BadBoxError, DataError

_FIELDS = {
    "messages": "prompt",
    "bboxes": "extra_info.bboxes",
    "bbox_images": "extra_info.bbox_images",
    "response": "extra_info.response",
    "has_answer": "extra_info.has_answer",
    "answer": "reward_model.ground_truth",
}


def encode_png(image: np.ndarray) -> bytes:
    """Encodes an image, uint8 [height, width, 3], as PNG, which loses nothing."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


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
    marks: Mapping[str, bool] | None = None,
) -> dict:
    """Makes a row of verl's schema.

    `answer` None means unknown: the ground truth is empty and `has_answer` False.

    Args:
        marks: further switches of `extra_info`, which `write_verl_parquet` is told of.
    """
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
            **(marks or {}),
        },
    }


def _schema(marks: Sequence[str]):
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
            *((name, pa.bool_()) for name in marks),
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


def write_verl_parquet(path: str | Path, rows: Iterable[dict], marks: Sequence[str] = ()) -> int:
    """Writes rows of `verl_row`, streaming, and returns their number.

    The schema is fixed but for the marks, so that files concatenate.

    A failed write leaves no file.

    Args:
        marks: names of the rows' `marks`.

    Raises:
        DataError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    num_rows = 0
    rows = iter(rows)
    schema = _schema(marks)
    try:
        with (
            replacing_file(path) as part,
            pq.ParquetWriter(part, schema, compression="zstd") as writer,
        ):
            while group := list(itertools.islice(rows, ROWS_PER_GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                num_rows += len(group)
    except OSError as error:
        raise DataError(
            "the file cannot be written",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            expected="a place with room, where this user may write",
            fix="Write to another place.",
        ) from error
    return num_rows


def read_verl_parquet(path: str | Path, bad_boxes: BadBoxes | None = None) -> Iterator[LvrExample]:
    """Yields checked examples of a file, row by row.

    Args:
        bad_boxes: what becomes of them, and where they are counted; None refuses.

    Raises:
        DataError: as `iter_verl_rows`, or a malformed row (see `parse_verl_row`).
    """
    bad_boxes = bad_boxes or BadBoxes()
    for row, where in iter_verl_rows(path):
        try:
            example = parse_verl_row(row, where, bad_boxes)
        except BadBoxError as error:
            bad_boxes.drop(error)
        else:
            yield example


def check_prompt(row: dict, where: str) -> tuple[list[dict], list[ImageRef]]:
    """Checks a row as far as RL needs it, where any ground truth will do.

    Returns:
        messages with split contents, images.

    Raises:
        DataError: names row, field, what was got and expected, and a fix.
    """
    messages, images = _parse_prompt(row, where)
    check_images(messages, images, f"{where}: prompt")
    return messages, images


def parse_prompt(row: dict, where: str) -> tuple[list[dict], list[ImageRef]]:
    """As `check_prompt`, without a look at the images themselves."""
    messages, images = _parse_prompt(row, where)
    check_placeholders(messages, images, f"{where}: prompt")
    return messages, images


def _parse_prompt(row: dict, where: str) -> tuple[list[dict], list[ImageRef]]:
    problem = _problem(where)
    data_source = row.get("data_source")
    if not isinstance(data_source, str) or not data_source:
        raise problem(
            "data_source",
            repr(data_source),
            "a non-empty string",
            "It picks the reward; name the data set.",
        )
    reward_model = row.get("reward_model")
    if not isinstance(reward_model, dict) or reward_model.get("ground_truth") is None:
        raise problem(
            "reward_model",
            reward_model,
            '{"style": "rule", "ground_truth": ...}',
            "Store what the reward compares to.",
        )
    if not isinstance(row.get("extra_info"), dict | None):
        raise problem(
            "extra_info",
            row["extra_info"],
            "a struct",
            "Store extra_info as a struct, not as text.",
        )
    return _messages(row.get("prompt"), problem), _images(row.get("images"), where, problem)


def parse_verl_row(row: dict, where: str, bad_boxes: BadBoxes | None = None) -> LvrExample:
    """Checks one row as SFT needs it, and makes an example of it.

    Args:
        bad_boxes: what becomes of them; None refuses.

    Raises:
        DataError: names row, field, what was got and expected, and a fix.
    """
    problem = _problem(where)
    messages, images = _parse_prompt(
        row, where
    )  # `build_example` checks the images: once, which takes a checksum each
    ground_truth = row["reward_model"]["ground_truth"]
    if not isinstance(ground_truth, str | int | float):
        raise problem(
            "reward_model.ground_truth", ground_truth, "the answer's text", "SFT needs one answer."
        )
    extra_info = row.get("extra_info") or {}
    return build_example(
        messages=messages,
        images=images,
        bboxes=extra_info.get("bboxes"),
        bbox_images=extra_info.get("bbox_images"),
        response=extra_info.get("response"),
        has_answer=True if extra_info.get("has_answer") is None else extra_info["has_answer"],
        answer=str(ground_truth),
        data_source=row["data_source"],
        where=where,
        fields=_FIELDS,
        bad_boxes=bad_boxes,
    )


def _problem(where: str):
    def problem(field: str, got: object, expected: str, fix: str) -> DataError:
        shown = "None" if got is None else got  # the message would leave None out
        return DataError(
            "malformed row", where=f"{where}: {field}", got=shown, expected=expected, fix=fix
        )

    return problem


def _messages(prompt: object, problem) -> list[dict]:
    expected = (
        'a list of {"role", "content"}, content a string with <image> placeholders, '
        'the last role "user"'
    )
    if not isinstance(prompt, list) or not prompt:
        raise problem("prompt", prompt, expected, "Store chat messages, not a string.")
    messages = []
    for index, message in enumerate(prompt):
        valid = isinstance(message, dict) and message.get("role") in (
            "system",
            "user",
            "assistant",
        )
        if not valid or not isinstance(message.get("content"), str):
            raise problem(
                f"prompt[{index}]", message, expected, "Use the roles system, user and assistant."
            )
        messages.append({"role": message["role"], "content": split_content(message["content"])})
    if messages[-1]["role"] != "user":
        raise problem(
            f"prompt[{len(prompt) - 1}].role",
            messages[-1]["role"],
            expected,
            "End the prompt with the user.",
        )
    return messages


def _images(images: object, where: str, problem) -> list[ImageRef]:
    expected = 'a list of {"bytes": <file content>, "path": null} or of paths'
    if not isinstance(images, list | None):
        raise problem("images", images, expected, "Store a list, also for one image.")
    refs = []
    for index, image in enumerate(images or []):
        ref_where = f"{where}: images[{index}]"
        if isinstance(image, str):
            refs.append(ImageRef(ref_where, path=Path(image)))
        elif isinstance(image, dict) and isinstance(image.get("bytes"), bytes) and image["bytes"]:
            refs.append(ImageRef(ref_where, data=image["bytes"]))
        else:
            raise problem(
                f"images[{index}]",
                image,
                expected,
                "Store the file's bytes; verl does not read `path`.",
            )
    return refs
