"""Malformed LVR JSON and verl parquet: typed, placed errors."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from record_cases import RECORD, ROW, VIRL, assert_complete, write_json
from row_cases import changed

from grpo_latent.data.embedded import digits
from grpo_latent.data.formats import lvr_json
from grpo_latent.data.formats.lvr_json import read_lvr_json
from grpo_latent.data.rows import check_prompt, parse_verl_row, read_verl_parquet
from grpo_latent.errors import DataError

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
