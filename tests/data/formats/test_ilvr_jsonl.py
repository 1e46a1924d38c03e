"""The ILVR reader: what a good record becomes, and one typed error for each way to break it."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from grpo_latent.data.formats.ilvr_jsonl import main, parse_ilvr_record, read_ilvr_jsonl
from grpo_latent.data.rows import check_prompt, iter_verl_rows
from grpo_latent.errors import DataError

RECORD = {
    "text_input": "Which digit is red?",
    "image_input": ["q.png"],
    "sequence_plan": [
        {"type": "text", "content": "Look at it."},
        {"type": "latent", "helper_image": "h1.png"},
        {"type": "text", "content": "And then there."},
        {"type": "latent", "helper_image": "h2.png"},
        {"type": "text", "content": "The answer is 7."},
    ],
    "original_final_answer": " 7 ",
}


@pytest.fixture
def folder(tmp_path):
    for name in ("q.png", "h1.png", "h2.png"):
        Image.fromarray(np.full((14, 14, 3), len(name), np.uint8)).save(tmp_path / name)
    return tmp_path


def test_reads_published_records(folder):
    path = folder / "train.jsonl"
    path.write_text(
        "\n".join([json.dumps(RECORD), "", json.dumps(RECORD | {"text_input": "<image>Q"})]) + "\n"
    )
    first, second = read_ilvr_jsonl(path)
    assert first.messages[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "Which digit is red?"},
    ]
    assert second.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Q"}]
    assert [segment.text for segment in first.segments] == [
        "Look at it.",
        None,
        "And then there.",
        None,
        "The answer is 7.",
    ]
    assert [s.helper_image.path.name for s in first.segments if s.helper_image] == [
        "h1.png",
        "h2.png",
    ]
    assert first.segments[1].helper_image.open().size == (14, 14)
    assert first.answer == "7" and "line 1" in first.where and "line 3" in second.where


def without(field):
    return {name: value for name, value in RECORD.items() if name != field}


def plan(*items):
    return RECORD | {"sequence_plan": list(items)}


def unlabelled(*items, **changes):
    return (
        without("original_final_answer")
        | {"has_answer": False, "sequence_plan": list(items)}
        | changes
    )


def test_a_record_may_leave_its_answer_open(folder):
    example = parse_ilvr_record(
        unlabelled(TEXT, LATENT, UNKNOWN, LATENT, UNKNOWN), "row 3", folder
    )
    assert (example.has_answer, example.answer) == (False, "")
    assert [segment.is_unknown for segment in example.segments] == [
        False,
        False,
        True,
        False,
        True,
    ]
    assert parse_ilvr_record(RECORD, "row 3", folder).has_answer


UNKNOWN = {"type": "text", "content": None}
TEXT, LATENT = RECORD["sequence_plan"][:2]
BROKEN = {
    "a list": ([1], "record: not a record"),
    "no question": (without("text_input"), "text_input: not a text"),
    "no answer": (RECORD | {"original_final_answer": ""}, "original_final_answer: not a text"),
    "answer no text": (
        RECORD | {"original_final_answer": 7},
        "original_final_answer: not a text; got 7",
    ),
    "image as a string": (RECORD | {"image_input": "q.png"}, "image_input: no images"),
    "no image": (RECORD | {"image_input": []}, "image_input: no images"),
    "missing image file": (
        RECORD | {"image_input": ["gone.png"]},
        r"image_input\[0\]: no such image file",
    ),
    "two placeholders": (
        RECORD | {"text_input": "<image><image>Q"},
        "text_input: placeholders do not match",
    ),
    "no plan": (without("sequence_plan"), "sequence_plan: no plan"),
    "empty plan": (plan(), "sequence_plan: no plan"),
    "unknown type": (plan({"type": "video"}), r"sequence_plan\[0\]: unknown item"),
    "item no object": (plan("text"), r"sequence_plan\[0\]: unknown item"),
    "empty text": (
        plan({"type": "text", "content": " "}),
        r"sequence_plan\[0\].content: not a text",
    ),
    "no helper": (
        plan(TEXT, {"type": "latent"}, TEXT),
        r"sequence_plan\[1\].helper_image: a latent span without",
    ),
    "missing helper file": (
        plan(TEXT, {"type": "latent", "helper_image": "gone.png"}, TEXT),
        r"sequence_plan\[1\].helper_image: no such image file",
    ),
    "unknown text of a known answer": (
        plan(TEXT, LATENT, UNKNOWN),
        r"sequence_plan\[2\].content: not a text",
    ),
    "unknown text left out": (
        unlabelled(LATENT, {"type": "text"}),
        r"sequence_plan\[1\].content: not a text",
    ),
    "has_answer no truth value": (RECORD | {"has_answer": "no"}, "has_answer: not a truth value"),
    "an answer without one": (
        unlabelled(LATENT, UNKNOWN, original_final_answer="7"),
        "original_final_answer: an answer of a record without one",
    ),
    "neither answer nor span": (
        unlabelled(TEXT, UNKNOWN),
        "sequence_plan: neither an answer nor a span",
    ),
    "ends with a span": (plan(TEXT, LATENT), r"sequence_plan\[1\]: no text after the last span"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_malformed_records_name_row_and_field(folder, name):
    record, message = BROKEN[name]
    with pytest.raises(DataError, match=f"^row 3: {message}"):
        parse_ilvr_record(record, "row 3", folder)


@pytest.mark.parametrize(
    "content, message",
    [("", "no records"), ("{", "not a readable JSONL file"), (None, "not a read")],
)
def test_unreadable_files(tmp_path, content, message):
    path = tmp_path / "train.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_ilvr_jsonl(path))


def test_rows_for_rl_need_no_plan(folder, capsys):
    path, out = folder / "train.jsonl", folder / "rl.parquet"
    path.write_text(json.dumps(without("sequence_plan")) + "\n" + json.dumps(RECORD) + "\n")
    main(["--in", str(path), "--out", str(out), "--split", "val"])
    rows = list(iter_verl_rows(out))
    assert "2 rows" in capsys.readouterr().out and [
        row["extra_info"]["index"] for row, _ in rows
    ] == [0, 1]
    for (row, where), example in zip(rows, read_ilvr_jsonl(path, reads_plan=False), strict=True):
        messages, images = check_prompt(row, where)
        assert messages == list(example.messages), "the prompt of SFT"
        assert images[0].read_bytes() == (folder / "q.png").read_bytes() and len(images) == 1
        assert row["reward_model"]["ground_truth"] == "7" and row["data_source"] == "ilvr"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"has_answer": False, "original_final_answer": None},
            "line 1: has_answer: nothing to reward",
        ),
        ({"image_input": ["train.jsonl"]}, r"line 1: image_input\[0\]: not a readable image"),
    ],
)
def test_what_rl_cannot_use_leaves_no_file(folder, change, message, capsys):
    path, out = folder / "train.jsonl", folder / "rl.parquet"
    path.write_text(json.dumps(RECORD | change))
    assert main(["--in", str(path), "--out", str(out)]) == 2
    assert re.search(f"^DataError: .*{message}", capsys.readouterr().err)
    assert not out.exists()
