"""The published ILVR records (2512.05665): text and helper images in turn, one JSON object a line.

    {"text_input": "Q", "image_input": ["q.png"],
     "sequence_plan": [{"type": "text", "content": "Look at the sign."},
                       {"type": "latent", "helper_image": "h1.png"},
                       {"type": "text", "content": "The answer is B."}],
     "original_final_answer": "B"}

Each helper image becomes one latent span; the momentum teacher picks its targets from that image's
visual tokens. RL reads the question and `original_final_answer` only, from rows that have no need
of a plan:

    python -m grpo_latent.data.formats.ilvr_jsonl --in TRAIN.jsonl --out rl.parquet

Beyond the published format, a record may say `"has_answer": false`: its helper images are known,
its answer is not. `original_final_answer` is then left out, and `"content": null` stands where a
text is unknown; nothing is fed there, and what follows it, a token of another text or the end, is
not scored.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_latent.common.command import command
from grpo_latent.data.examples import (
    IMAGE_PLACEHOLDER,
    check_images,
    join_content,
    split_content,
)
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.data.rows import verl_row, write_verl_parquet
from grpo_latent.errors import DataError

DATA_SOURCE = "ilvr"


@dataclass(frozen=True)
class Segment:
    """A piece of the response: a text, a span's helper image, or an unknown text (both None)."""

    text: str | None = None
    helper_image: ImageRef | None = None

    @property
    def is_unknown(self) -> bool:
        return self.text is None and self.helper_image is None


@dataclass(frozen=True)
class InterleavedExample:
    """One example of ILVR.

    Attributes:
        messages: before the response; contents are lists of {"type": "text", "text"} and {"type":
            "image"} in order.
        images: in the order of the image parts.
        segments: of the response; the last one is a text, known if `has_answer`. () where the plan
            was not read.
        answer: the final answer, as a reward compares it; "" if unknown.
        has_answer: whether the answer is known.
        where: file and row, for messages.
    """

    messages: tuple[dict, ...]
    images: tuple[ImageRef, ...]
    segments: tuple[Segment, ...]
    answer: str
    has_answer: bool
    where: str


def read_ilvr_jsonl(
    path: str | Path, image_folder: str | Path | None = None, reads_plan: bool = True
) -> Iterator[InterleavedExample]:
    """Yields checked examples of a file, line by line.

    The file is never held in memory as a whole.

    Args:
        image_folder: what image paths are relative to; by default the file's folder.
        reads_plan: False for RL, which needs neither `sequence_plan` nor the helper images.

    Raises:
        DataError: not JSON lines, no records, or a malformed record.
    """
    path = Path(path)
    image_folder = path.parent if image_folder is None else Path(image_folder)
    expected = "one JSON object a line"
    num_records = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line_idx, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                num_records += 1
                yield parse_ilvr_record(
                    json.loads(line), f"{path} line {line_idx}", image_folder, reads_plan
                )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        where = f"{path} after {num_records} records"
        raise DataError(
            "not a readable JSONL file",
            where=where,
            got=str(error),
            expected=expected,
            fix="Check path and syntax.",
        ) from error
    if num_records == 0:
        raise DataError("no records", where=str(path), got="an empty file", expected=expected)


def parse_ilvr_record(
    record: object, where: str, image_folder: Path, reads_plan: bool = True
) -> InterleavedExample:
    """Checks one published record and makes an example of it, see `read_ilvr_jsonl`.

    Raises:
        DataError: names row, field, what was got and expected, and a fix.
    """

    def problem(field: str, what: str, got: object, expected: str, fix: str) -> DataError:
        return DataError(what, where=f"{where}: {field}", got=got, expected=expected, fix=fix)

    if not isinstance(record, dict):
        raise problem("record", "not a record", record, "a JSON object", "One object a line.")
    has_answer = record.get("has_answer", True)
    if not isinstance(has_answer, bool):
        raise problem(
            "has_answer",
            "not a truth value",
            has_answer,
            "true, false or absent",
            "Leave it out if known.",
        )
    texts = {"original_final_answer": ""}
    if not has_answer and record.get("original_final_answer"):
        answer = record["original_final_answer"]
        raise problem(
            "original_final_answer",
            "an answer of a record without one",
            answer,
            "none",
            "Set has_answer.",
        )
    for field in ("text_input", *(["original_final_answer"] if has_answer else [])):
        text = record.get(field)
        if not isinstance(text, str) or not text.strip():
            raise problem(
                field, "not a text", text, "a non-empty string", "Fill it in, or drop the row."
            )
        texts[field] = text
    paths = record.get("image_input")
    if (
        not isinstance(paths, list)
        or not paths
        or not all(isinstance(item, str) and item for item in paths)
    ):
        raise problem(
            "image_input",
            "no images",
            paths,
            "a list of image paths",
            "Name the question's image files.",
        )
    images = [
        ImageRef(f"{where}: image_input[{i}]", path=image_folder / item)
        for i, item in enumerate(paths)
    ]
    question = texts["text_input"]
    if IMAGE_PLACEHOLDER not in question:
        question = IMAGE_PLACEHOLDER * len(images) + question
    messages = [{"role": "user", "content": split_content(question)}]
    check_images(messages, images, f"{where}: text_input")
    segments: tuple[Segment, ...] = ()
    if reads_plan:
        segments = _segments(record.get("sequence_plan"), has_answer, image_folder, problem, where)
    return InterleavedExample(
        messages=tuple(messages),
        images=tuple(images),
        segments=segments,
        answer=texts["original_final_answer"].strip(),
        has_answer=has_answer,
        where=where,
    )


def _segments(
    plan: object, has_answer: bool, image_folder: Path, problem, where: str
) -> tuple[Segment, ...]:
    if not isinstance(plan, list) or not plan:
        raise problem(
            "sequence_plan",
            "no plan",
            plan,
            "a list of text and latent items",
            "Add the response.",
        )
    segments = []
    for index, item in enumerate(plan):
        field = f"sequence_plan[{index}]"
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text":
            content = item.get("content")
            if content is None and "content" in item and not has_answer:
                segments.append(Segment())
                continue
            if not isinstance(content, str) or not content.strip():
                raise problem(
                    f"{field}.content",
                    "not a text",
                    content,
                    "a non-empty string",
                    "Drop empty items.",
                )
            segments.append(Segment(text=content))
        elif kind == "latent":
            helper = item.get("helper_image")
            if not isinstance(helper, str) or not helper:
                raise problem(
                    f"{field}.helper_image",
                    "a latent span without a helper image",
                    helper,
                    "an image path",
                    "Name the image that the span stands for, or drop the item.",
                )
            image = ImageRef(f"{where}: {field}.helper_image", path=image_folder / helper)
            image.check()
            segments.append(Segment(helper_image=image))
        else:
            raise problem(
                field,
                "unknown item",
                item,
                'type "text" or "latent"',
                "Use the published item types.",
            )
    if segments[-1].helper_image is not None:
        raise problem(
            f"sequence_plan[{len(plan) - 1}]",
            "no text after the last span",
            "latent",
            "text",
            "Add the answer's text.",
        )
    if not has_answer and all(segment.helper_image is None for segment in segments):
        raise problem(
            "sequence_plan",
            "neither an answer nor a span",
            plan,
            "a latent item",
            "Drop the record.",
        )
    return tuple(segments)


def to_verl_rows(examples: Iterator[InterleavedExample], split: str) -> Iterator[dict]:
    """Makes verl rows with the prompts of SFT, image files included byte for byte.

    Raises:
        DataError: an image file that is no image, or a record without its answer.
    """
    for index, example in enumerate(examples):
        if not example.has_answer:
            raise DataError(
                "nothing to reward",
                where=f"{example.where}: has_answer",
                got=False,
                expected="a record with its answer",
                fix="Leave such records to SFT.",
            )
        yield verl_row(
            data_source=DATA_SOURCE,
            prompt=join_content(example.messages[0]["content"]),
            images=[image.checked_bytes() for image in example.images],
            answer=example.answer,
            index=index,
            split=split,
            response="",  # these rows are for RL; SFT reads the JSONL
        )


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_latent.data.formats.ilvr_jsonl", description="Writes rows for RL."
    )
    parser.add_argument("--in", dest="source", type=Path, required=True, help="ILVR JSONL")
    parser.add_argument(
        "--images",
        type=Path,
        help="what image paths are relative to (default: the JSONL's folder)",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", default="train")
    options = parser.parse_args(arguments)
    examples = read_ilvr_jsonl(options.source, options.images, reads_plan=False)
    num_rows = write_verl_parquet(options.out, to_verl_rows(examples, options.split))
    print(f"{options.out}: {num_rows} rows")


if __name__ == "__main__":
    sys.exit(main())
