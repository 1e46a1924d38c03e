"""The published LVR JSON, read, written, and converted to verl parquet.

Stage 1 (SFT):

    {"dataset": "flickr30k", "image": ["a.jpg"], "bboxes": [[0.38, 0.45, 0.71, 0.65]],
     "conversations": [{"from": "human", "value": "<image>\\nQ"},
                       {"from": "gpt", "value": "<lvr>\\n<answer> A </answer>"}]}

Stage 2 (RL, ViRL-39K style) has `image` as a string, no `<image>`, no boxes, and
"<answer>4</answer>" as the gpt value. Fields of ours: `has_answer` (default true) and
`bbox_images` (which image a box belongs to; needed with several).

    python -m grpo_latent.data.formats.lvr_json to-parquet \\
        --json virl39k.json --images images/ --out train.parquet
    python -m grpo_latent.data.formats.lvr_json from-parquet \\
        --parquet train_sft.parquet --out train_sft.json
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from grpo_latent.common.command import command
from grpo_latent.common.files import write_text
from grpo_latent.data.boxes import BadBoxes
from grpo_latent.data.examples import (
    IMAGE_PLACEHOLDER,
    LVR_PLACEHOLDER,
    LvrExample,
    build_example,
    find_answers,
    join_content,
    split_content,
)
from grpo_latent.data.formats.json_records import read_json_records
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.data.rows import read_verl_parquet, verl_row, write_verl_parquet
from grpo_latent.errors import BadBoxError, DataError

_FIELDS = {
    "messages": "conversations",
    "bboxes": "bboxes",
    "bbox_images": "bbox_images",
    "response": "conversations[-1].value",
    "answer": "conversations[-1].value",
    "has_answer": "has_answer",
}


def read_lvr_json(
    path: str | Path,
    image_folder: str | Path | None = None,
    prepend_images: bool = False,
    bad_boxes: BadBoxes | None = None,
) -> Iterator[LvrExample]:
    """Yields checked examples of a `.json` (one list) or `.jsonl` file, row by row.

    Args:
        image_folder: what image paths are relative to; by default the file's folder.
        prepend_images: put `<image>` placeholders in front of the first message of records that
            have none (stage 2).
        bad_boxes: what becomes of them, and where they are counted; None refuses.

    Raises:
        DataError: not JSON, no records, or a malformed record.
    """
    path = Path(path)
    image_folder = path.parent if image_folder is None else Path(image_folder)
    bad_boxes = bad_boxes or BadBoxes()
    for index, record in enumerate(read_json_records(path, "records")):
        where = f"{path} row {index}"
        try:
            example = parse_record(record, where, image_folder, prepend_images, bad_boxes)
        except BadBoxError as error:
            bad_boxes.drop(error)
        else:
            yield example


def parse_record(
    record: object,
    where: str,
    image_folder: Path,
    prepend_images: bool = False,
    bad_boxes: BadBoxes | None = None,
) -> LvrExample:
    """Checks one published record and makes an example of it.

    Raises:
        DataError: names row, field, what was got and expected, and a fix.
    """

    def problem(field: str, what: str, got: object, expected: str, fix: str) -> DataError:
        return DataError(what, where=f"{where}: {field}", got=got, expected=expected, fix=fix)

    if not isinstance(record, dict):
        raise problem("record", "not a record", record, "a JSON object", "One object per example.")
    turns = _check_conversations(record.get("conversations"), problem)
    image = record.get("image", [])
    paths = [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(isinstance(item, str) and item for item in paths):
        raise problem(
            "image",
            "not an image path",
            image,
            "a path, or a list of paths",
            "Name the image file(s).",
        )
    images = [
        ImageRef(f"{where}: image[{i}]", path=image_folder / item) for i, item in enumerate(paths)
    ]

    *history, (_, response) = turns
    if any(LVR_PLACEHOLDER in value for _, value in history):
        raise problem(
            "conversations",
            f"{LVR_PLACEHOLDER} outside the last turn",
            [value for _, value in history],
            f"{LVR_PLACEHOLDER} in the last gpt turn only",
            "Split the conversation into several records.",
        )
    texts = [
        re.sub(rf"\n?{re.escape(IMAGE_PLACEHOLDER)}\n?", IMAGE_PLACEHOLDER, value)
        for _, value in history
    ]
    if prepend_images and not any(IMAGE_PLACEHOLDER in text for text in texts):
        texts[0] = IMAGE_PLACEHOLDER * len(images) + texts[0]
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = [
        {"role": roles[speaker], "content": split_content(text)}
        for (speaker, _), text in zip(history, texts, strict=True)
    ]
    answers = find_answers(response)
    return build_example(
        messages=messages,
        images=images,
        bboxes=record.get("bboxes"),
        bbox_images=record.get("bbox_images"),
        response=response,
        has_answer=record.get("has_answer", True),
        answer=answers[0] if answers else "",
        data_source=str(record.get("dataset") or "lvr"),
        where=where,
        fields=_FIELDS,
        bad_boxes=bad_boxes,
    )


def _check_conversations(conversations: object, problem) -> list[tuple[str, str]]:
    """Returns (speaker, value) of each turn."""
    expected = (
        'turns {"from", "value"} that alternate human and gpt and end with gpt, '
        "after an optional system turn"
    )
    if not isinstance(conversations, list) or not conversations:
        raise problem(
            "conversations",
            "no conversation",
            conversations,
            expected,
            "Add question and response.",
        )
    turns = []
    for index, turn in enumerate(conversations):
        valid = (
            isinstance(turn, dict)
            and isinstance(turn.get("from"), str)
            and isinstance(turn.get("value"), str)
        )
        if not valid or not turn["value"].strip():
            raise problem(
                f"conversations[{index}]",
                "not a turn",
                turn,
                expected,
                "Give it a speaker and a text.",
            )
        turns.append((turn["from"], turn["value"]))
    speakers = [speaker for speaker, _ in turns]
    dialogue = speakers[1:] if speakers[0] == "system" else speakers
    if not dialogue or dialogue != ["human", "gpt"] * (len(dialogue) // 2):
        raise problem(
            "conversations",
            "turns out of order",
            speakers,
            expected,
            "Reorder or split the conversation.",
        )
    return turns


def to_verl_row(
    example: LvrExample, index: int, split: str, data_source: str | None = None
) -> dict:
    """Makes a row of verl's schema of an example, image files included byte for byte.

    Raises:
        DataError: an image file that is no image.
    """
    row = verl_row(
        data_source=data_source or example.data_source,
        prompt="",
        images=[image.checked_bytes() for image in example.images],
        answer=example.answer if example.has_answer else None,
        index=index,
        split=split,
        bboxes=example.boxes,
        bbox_images=example.box_images,
        response=example.response,
    )
    prompt = [
        {"role": message["role"], "content": join_content(message["content"])}
        for message in example.messages
    ]
    return row | {"prompt": prompt}


def write_lvr_json(path: str | Path, examples: Iterable[LvrExample]) -> int:
    """Writes the published form, images in `<stem>_images/` beside it; returns their number."""
    path = Path(path)
    folder = path.parent / f"{path.stem}_images"
    folder.mkdir(parents=True, exist_ok=True)
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    records = []
    for index, example in enumerate(examples):
        names = []
        for image_idx, image in enumerate(example.images):
            data = image.read_bytes()
            image_format = Image.open(io.BytesIO(data)).format
            assert image_format is not None, "Pillow names the format of what it has opened"
            name = f"{folder.name}/{index:06d}_{image_idx}.{image_format.lower()}"
            (path.parent / name).write_bytes(data)
            names.append(name)
        turns = [
            (speakers[message["role"]], join_content(message["content"]))
            for message in example.messages
        ]
        turns.append(("gpt", example.response))
        records.append(
            {
                "dataset": example.data_source,
                "image": names,
                "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
                "bboxes": [list(box) for box in example.boxes],
                "bbox_images": list(example.box_images),
                "has_answer": example.has_answer,
            }
        )
    write_text(path, json.dumps(records, ensure_ascii=False) + "\n")
    return len(records)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_latent.data.formats.lvr_json", description="Converts LVR JSON."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_parquet = commands.add_parser(
        "to-parquet", help="published JSON -> verl parquet, for SFT or RL"
    )
    to_parquet.add_argument("--json", type=Path, required=True)
    to_parquet.add_argument(
        "--images", type=Path, help="what image paths are relative to (default: the JSON's folder)"
    )
    to_parquet.add_argument(
        "--data-source", help="picks the reward (default: each record's `dataset`)"
    )
    to_parquet.add_argument("--split", default="train")
    from_parquet = commands.add_parser(
        "from-parquet", help="verl parquet with boxes -> published JSON, for SFT"
    )
    from_parquet.add_argument("--parquet", type=Path, required=True)
    for parser_of in (to_parquet, from_parquet):
        parser_of.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.command == "to-parquet":
        examples = read_lvr_json(options.json, options.images, prepend_images=True)
        rows = (
            to_verl_row(item, index, options.split, options.data_source)
            for index, item in enumerate(examples)
        )
        num_rows = write_verl_parquet(options.out, rows)
    else:
        num_rows = write_lvr_json(options.out, read_verl_parquet(options.parquet))
    print(f"{options.out}: {num_rows} rows")


if __name__ == "__main__":
    sys.exit(main())
