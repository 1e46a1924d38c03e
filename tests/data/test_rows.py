"""Readers of LVR JSON and verl parquet: what they give, and how they refuse.

Each malformed input is a typed, placed error.
"""

import copy
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from grpo_latent.data.embedded import digits
from grpo_latent.data.examples import ImageRef, join_content, split_content
from grpo_latent.data.formats import lvr_json
from grpo_latent.data.formats.lvr_json import read_lvr_json, write_lvr_json
from grpo_latent.data.rows import (
    check_prompt,
    encode_png,
    parse_verl_row,
    read_verl_parquet,
    verl_row,
)
from grpo_latent.errors import DataError

PNG = encode_png(np.full((28, 28, 3), 7, np.uint8))
RECORD = {
    "dataset": "flickr30k",
    "question_id": 31593,
    "image": ["a.png"],
    "conversations": [
        {"from": "human", "value": "<image>\nWhat does the child wear?"},
        {"from": "gpt", "value": "<lvr>\n<answer> Blue denim shorts. </answer>"},
    ],
    "bboxes": [[0.382, 0.456, 0.718, 0.656]],
}
VIRL = {
    "dataset": "ViRL39K",
    "id": "MMK12-0",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "How many pairs?"},
        {"from": "gpt", "value": "<answer>4</answer>"},
    ],
}
ROW = verl_row(
    data_source="digits",
    prompt="read red ?<image>",
    images=[PNG],
    answer="7",
    index=0,
    split="sft",
    bboxes=[(0, 0, 0.5, 0.5)],
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nonsense")
    return tmp_path


def write_json(folder, *records):
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def changed(value, path, new):
    """A deep copy of nested `value` with one item, at `path`, replaced.

    It is removed where `new` is KeyError.
    """
    value = copy.deepcopy(value)
    item = value
    for key in path[:-1]:
        item = item[key]
    if new is KeyError:
        del item[path[-1]]
    else:
        item[path[-1]] = new
    return value


def assert_complete(error, row, field, got):
    """The error names row, field, what was got and expected, and a fix, and survives pickling."""
    assert error.where.endswith(f"row {row}: {field}")
    assert got in str(error) and error.expected and error.fix
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


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


VALUE = ("conversations", 1, "value")
QUESTION = ("conversations", 0, "value")
BAD_RECORDS = {
    "no conversation": (("conversations",), KeyError, "conversations", "expected turns"),
    "conversation of a string": (("conversations",), "Q", "conversations", "got Q"),
    "turn without value": (
        ("conversations", 1),
        {"from": "gpt"},
        "conversations[1]",
        "'from': 'gpt'",
    ),
    "empty value": (VALUE, "  ", "conversations[1]", "'value': '  '"),
    "two questions": (
        ("conversations", 1, "from"),
        "human",
        "conversations",
        "['human', 'human']",
    ),
    "unknown speaker": (("conversations", 0, "from"), "user", "conversations", "['user', 'gpt']"),
    "no image file": (("image",), ["b.png"], "image[0]", "b.png"),
    "image of a number": (("image",), 3, "image", "got 3"),
    "image missing": (("image",), KeyError, "conversations", "1 <image> for 0 images"),
    "placeholder missing": (QUESTION, "What?", "conversations", "0 <image> for 1 images"),
    "placeholder too many": (
        QUESTION,
        "<image><image>",
        "conversations",
        "2 <image> for 1 images",
    ),
    "video": (QUESTION, "<image><video>", "conversations", "<video> is not supported"),
    "box missing": (("bboxes",), [], "conversations[-1].value", "1 <lvr> for 0 boxes"),
    "boxes absent": (("bboxes",), KeyError, "conversations[-1].value", "1 <lvr> for 0 boxes"),
    "box not listed": (("bboxes",), [0.1, 0.1, 0.2, 0.2], "bboxes[0]", "got 0.1"),
    "boxes of a string": (("bboxes",), "0.1 0.1", "bboxes", "got 0.1 0.1"),
    "pixel box": (("bboxes",), [[10, 10, 40, 40]], "bboxes[0]", "[10, 10, 40, 40]"),
    "flat box": (("bboxes",), [[0.1, 0.3, 0.5, 0.3]], "bboxes[0]", "no area"),
    "nan box": (("bboxes",), [[0.1, float("nan"), 0.5, 0.6]], "bboxes[0]", "not finite"),
    "box of three": (("bboxes",), [[0.1, 0.2, 0.5]], "bboxes[0]", "four numbers"),
    "image index too large": (("bbox_images",), [1], "bbox_images", "got [1]"),
    "image index missing": (("bbox_images",), [], "bbox_images", "1 integers in [0, 1)"),
    "no answer tag": (
        VALUE,
        "<lvr> shorts",
        "conversations[-1].value",
        "has_answer True, answer ''",
    ),
    "empty answer": (
        VALUE,
        "<lvr> <answer> </answer>",
        "conversations[-1].value",
        "has_answer True, answer ''",
    ),
    "two answers": (
        VALUE,
        "<lvr> <answer>a</answer> <answer>b</answer>",
        "conversations[-1].value",
        "no single answer",
    ),
    "answer though unknown": (
        ("has_answer",),
        False,
        "conversations[-1].value",
        "has_answer False, answer 'Blue",
    ),
    "has_answer of a string": (("has_answer",), "no", "has_answer", "not a truth value"),
    "span in the question": (QUESTION, "<image><lvr>", "conversations", "outside the last turn"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_malformed_records(name, folder):
    path, new, field, got = BAD_RECORDS[name]
    data = write_json(folder, RECORD, changed(RECORD, path, new))
    with pytest.raises(DataError) as caught:
        list(read_lvr_json(data))
    assert_complete(caught.value, 1, field, got)


def test_several_images_need_to_say_which_a_box_is_in(folder):
    record = changed(RECORD, QUESTION, "<image><image>") | {"image": ["a.png", "a.png"]}
    with pytest.raises(DataError) as caught:
        list(read_lvr_json(write_json(folder, record)))
    assert_complete(caught.value, 0, "bbox_images", "2 images, 1 boxes")
    with pytest.raises(DataError) as caught:
        list(read_lvr_json(write_json(folder, "Q")))
    assert_complete(caught.value, 0, "record", "got Q")


@pytest.mark.parametrize("text", ["{", "[]", "{}", b"\xff\xfe", None], ids=str)
def test_malformed_json_files(text, folder):
    path = folder / "data.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match="a JSON list of records") as caught:
        list(read_lvr_json(path))
    assert caught.value.where == str(path) and caught.value.fix


def test_an_image_that_is_none_stops_the_conversion_and_leaves_no_file(folder, capsys):
    out = folder / "out.parquet"
    path = write_json(folder, VIRL, VIRL | {"image": "bad.png"})
    assert lvr_json.main(["to-parquet", "--json", str(path), "--out", str(out)]) == 2
    assert "row 1: image[0]: not a readable image" in capsys.readouterr().err
    assert not list(folder.glob("*out.parquet*"))


BAD_ROWS = {
    "extra_info of a string": (("extra_info",), "{}", "extra_info", "got {}"),
    "no data source": (("data_source",), None, "data_source", "got None"),
    "empty data source": (("data_source",), "", "data_source", "got ''"),
    "prompt of a string": (("prompt",), "read red ?", "prompt", "got read red ?"),
    "empty prompt": (("prompt",), [], "prompt", "got []"),
    "unknown role": (("prompt", 0, "role"), "human", "prompt[0]", "'role': 'human'"),
    "content null": (("prompt", 0, "content"), None, "prompt[0]", "'content': None"),
    "prompt ends with assistant": (
        ("prompt", 0, "role"),
        "assistant",
        "prompt[0].role",
        "got assistant",
    ),
    "images of bytes": (("images",), b"x", "images", "got b'x'"),
    "image null": (("images",), [None], "images[0]", "verl does not read `path`"),
    "image path only": (
        ("images",),
        [{"bytes": None, "path": "a.png"}],
        "images[0]",
        "'path': 'a.png'",
    ),
    "image not decodable": (
        ("images",),
        [{"bytes": b"nonsense"}],
        "images[0]",
        "8 bytes that start with b'nonsense'",
    ),
    "image missing": (("images",), None, "prompt", "1 <image> for 0 images"),
    "placeholder missing": (("prompt", 0, "content"), "read", "prompt", "0 <image> for 1 images"),
    "no reward model": (("reward_model",), None, "reward_model", "expected {"),
    "no ground truth": (
        ("reward_model",),
        {"style": "rule"},
        "reward_model",
        "got {'style': 'rule'}",
    ),
}
BAD_SFT_ROWS = {
    "several ground truths": (
        ("reward_model", "ground_truth"),
        ["7"],
        "reward_model.ground_truth",
        "['7']",
    ),
    "empty ground truth": (
        ("reward_model", "ground_truth"),
        "",
        "reward_model.ground_truth",
        "answer ''",
    ),
    "box outside": (
        ("extra_info", "bboxes"),
        [[0, 0, 2, 1]],
        "extra_info.bboxes[0]",
        "outside the image",
    ),
    "response without span": (
        ("extra_info", "response"),
        "<answer>7</answer>",
        "extra_info.response",
        "0 <lvr> for 1",
    ),
    "response empty": (("extra_info", "response"), "", "extra_info.response", "no response"),
    "answer in an unlabelled response": (
        ("extra_info", "has_answer"),
        False,
        "reward_model.ground_truth",
        "answer '7'",
    ),
}


@pytest.mark.parametrize("name", [*BAD_ROWS, *BAD_SFT_ROWS])
def test_malformed_rows(name):
    path, new, field, got = (BAD_ROWS | BAD_SFT_ROWS)[name]
    row = changed(ROW, path, new)
    with pytest.raises(DataError) as caught:
        parse_verl_row(row, where="train.parquet row 5")
    assert_complete(caught.value, 5, field, got)
    if name in BAD_ROWS:
        with pytest.raises(DataError):
            check_prompt(row, where="train.parquet row 5")
    else:
        check_prompt(row, where="train.parquet row 5")


def test_an_unlabelled_row_must_not_hold_its_answer():
    row = changed(
        changed(ROW, ("extra_info", "has_answer"), False), ("reward_model", "ground_truth"), ""
    )
    with pytest.raises(DataError, match="an answer where has_answer is false"):
        parse_verl_row(row, where="train.parquet row 5")
    example = parse_verl_row(
        changed(row, ("extra_info", "response"), None), where="train.parquet row 5"
    )
    assert example.response == "<lvr> <answer>"


def test_malformed_parquet_files(folder):
    path = folder / "a.parquet"
    with pytest.raises(DataError, match="not a readable parquet file"):
        list(read_verl_parquet(path))
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a readable parquet file"):
        list(read_verl_parquet(path))
    pq.write_table(pa.table({"data_source": ["digits"], "question": ["Q"]}), path)
    with pytest.raises(
        DataError, match=r"columns \['prompt', 'reward_model'\] are missing.*got columns"
    ):
        list(read_verl_parquet(path))
    digits.write_verl_parquet(path, [])
    with pytest.raises(DataError, match="no rows"):
        list(read_verl_parquet(path))
    digits.write_verl_parquet(
        path, [ROW, changed(ROW, ("extra_info", "bboxes"), [[0.5, 0.5, 0.1, 0.9]])]
    )
    with pytest.raises(
        DataError, match=r"a.parquet row 1: extra_info.bboxes\[0\]: a box has no area"
    ):
        list(read_verl_parquet(path))


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
