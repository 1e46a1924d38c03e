"""Readers of LVR JSON and verl parquet: what they give; `test_malformed_rows` has what they refuse."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from record_cases import PNG, RECORD, ROW, VIRL, write_json

from grpo_latent.data.embedded import digits
from grpo_latent.data.examples import join_content, split_content
from grpo_latent.data.formats import lvr_json
from grpo_latent.data.formats.lvr_json import read_lvr_json, write_lvr_json
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.data.rows import (
    encode_png,
    parse_verl_row,
    read_verl_parquet,
    verl_row,
)
from grpo_latent.errors import DataError


def test_an_image_is_verified_once(monkeypatch):
    """A checksum over all bytes of each image, which a large data set feels."""
    calls = []
    monkeypatch.setattr(ImageRef, "check", lambda self: calls.append(self.where))
    image = encode_png(np.zeros((4, 4, 3), dtype=np.uint8))
    row = verl_row(
        data_source="d",
        prompt="?<image><image>",
        images=[image] * 2,
        answer="7",
        index=0,
        split="train",
    )
    parse_verl_row(row, "row 0")
    assert calls == ["row 0: images[0]", "row 0: images[1]"]


def test_published_record(folder):
    (example,) = read_lvr_json(write_json(folder, RECORD))
    content = [{"type": "image"}, {"type": "text", "text": "What does the child wear?"}]
    assert example.messages == ({"role": "user", "content": content},)
    assert example.boxes == ((0.382, 0.456, 0.718, 0.656),) and example.box_images == (0,)
    assert example.response == "<lvr>\n<answer> Blue denim shorts. </answer>"
    assert (example.answer, example.has_answer) == ("Blue denim shorts.", True)
    assert (
        example.images[0].open().getpixel((0, 0)) == (7, 7, 7)
        and example.data_source == "flickr30k"
    )


def test_several_images_turns_and_unknown_answers(folder):
    turns = [
        ("system", "Be brief."),
        ("human", "<image> and <image> ?"),
        ("gpt", "Two."),
        ("human", "Which?"),
    ]
    record = {
        "image": ["a.png", "a.png"],
        "conversations": [
            {"from": who, "value": text} for who, text in [*turns, ("gpt", "<lvr> <lvr> <answer>")]
        ],
        "bboxes": [[0, 0, 1, 1], [0.5, 0, 1, 0.25]],
        "bbox_images": [1, 0],
        "has_answer": False,
    }
    path = folder / "data.jsonl"
    path.write_text("\n" + json.dumps(record) + "\n")
    (example,) = read_lvr_json(path)
    assert [message["role"] for message in example.messages] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert example.messages[1]["content"] == split_content("<image> and <image> ?")
    assert example.box_images == (1, 0) and example.response == "<lvr> <lvr> <answer>"
    assert (example.answer, example.has_answer) == ("", False)
    again = parse_verl_row(lvr_json.to_verl_row(example, 0, "sft"), where="row 0")
    assert (again.messages, again.boxes, again.box_images) == (
        example.messages,
        example.boxes,
        (1, 0),
    )


def test_virl_records_become_verl_rows(folder):
    out = folder / "train.parquet"
    text_only = VIRL | {"image": []}
    path = write_json(folder, VIRL, text_only, VIRL | {"image": ["a.png", "a.png"]})
    lvr_json.main(
        [
            "to-parquet",
            "--json",
            str(path),
            "--images",
            str(folder),
            "--out",
            str(out),
            "--split",
            "rl",
        ]
    )
    rows = pq.read_table(out).to_pylist()
    contents = [row["prompt"][0]["content"] for row in rows]
    assert contents == [
        "<image>How many pairs?",
        "How many pairs?",
        "<image><image>How many pairs?",
    ]
    assert rows[0]["images"] == [{"bytes": PNG, "path": None}] and [
        len(row["images"]) for row in rows
    ] == [1, 0, 2]
    assert [row["extra_info"]["index"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["data_source"] == "ViRL39K" and row["reward_model"] == {
            "style": "rule",
            "ground_truth": "4",
        }
        assert row["extra_info"]["split"] == "rl" and row["extra_info"]["bboxes"] == []


def test_digits_survive_both_formats(folder):
    examples = digits.generate(40, stream="sft", seed=0, kinds=("read", "sum"))
    rows = digits.to_rows(examples, "sft", digits.scarce_labels(examples, 1))
    parquet, as_json, again = folder / "a.parquet", folder / "a.json", folder / "b.parquet"
    digits.write_verl_parquet(parquet, rows)
    lvr_json.main(["from-parquet", "--parquet", str(parquet), "--out", str(as_json)])
    lvr_json.main(["to-parquet", "--json", str(as_json), "--out", str(again)])
    first, second, third = (
        list(read_verl_parquet(parquet)),
        list(read_lvr_json(as_json)),
        list(read_verl_parquet(again)),
    )
    assert len(first) == len(second) == len(third) == 40
    assert 0 < sum(example.has_answer for example in first) < 40
    for digit_example, *read in zip(examples, first, second, third, strict=True):
        for example in read:
            assert (
                join_content(example.messages[0]["content"]) == f"{digit_example.question}<image>"
            )
            assert example.boxes == tuple(digit_example.boxes)
            assert np.array_equal(np.asarray(example.images[0].open()), digit_example.image)
            assert example.answer == (digit_example.answer if example.has_answer else "")
            assert (example.response, example.has_answer) == (read[0].response, read[0].has_answer)


def test_transparency_is_over_white_and_images_decode_late(folder):
    Image.new("LA", (3, 2), (0, 0)).save(folder / "la.png")
    assert ImageRef("row", path=folder / "la.png").open().getpixel((0, 0)) == (255, 255, 255)
    (example,) = read_lvr_json(write_json(folder, RECORD | {"image": "bad.png"}))
    with pytest.raises(DataError, match="row 0: image.0.: not a readable image"):
        example.images[0].open()


def test_written_json_keeps_the_images_format(folder):
    Image.new("RGB", (28, 28)).save(folder / "a.jpg")
    (example,) = read_lvr_json(write_json(folder, RECORD | {"image": "a.jpg"}))
    write_lvr_json(folder / "out.json", [example])
    (record,) = json.loads((folder / "out.json").read_text())
    assert record["image"] == ["out_images/000000_0.jpeg"]
    assert (folder / record["image"][0]).read_bytes() == (folder / "a.jpg").read_bytes()


def test_a_file_that_cannot_be_written_is_said(folder):
    (folder / "file").touch()
    with pytest.raises(DataError, match="the file cannot be written"):
        digits.write_verl_parquet(folder / "file" / "out.parquet", [ROW])
