"""The pass over all rows: each malformed row and image is named by file and row.

Data as others write it is read; a file that has passed is not read again.
"""

import json
import os
import pickle
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from row_cases import (
    GOOD,
    PNG,
    ROW,
    changed,
    encoded,
    half,
    write_like_geo3k,
    write_lines,
)

from grpo_latent.data import checks
from grpo_latent.data.checks import check_files
from grpo_latent.data.files import RowKeys, iter_verl_rows
from grpo_latent.data.rows import write_verl_parquet
from grpo_latent.errors import DataError
from grpo_latent.models import tiny
from grpo_latent.models.prompts import PromptLength, encode_prompt


def png_of(width, height):
    """The header of a PNG of any size, and hardly any data."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


BAD_IMAGES = {
    **{
        f"{name} cut": half(encoded(format=name)) for name in ("PNG", "JPEG", "GIF", "BMP", "WEBP")
    },
    "TIFF cut": half(encoded(format="TIFF")),
    "progressive JPEG cut": half(encoded(format="JPEG", progressive=True)),
    "JPEG cut near its end": encoded(format="JPEG")[:-200],
    "compressed TIFF cut": half(encoded(format="TIFF", compression="tiff_lzw")),
    "PNG with a flipped byte": flipped(PNG, len(PNG) // 2),
    "no bytes of pixels": png_of(10, 10),
    "no width": png_of(0, 10),
    "no image": b"nonsense",
    "a page of HTML": b"<html><body>404 Not Found</body></html>",
    "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
    "zeros": bytes(1000),
    "a PNG's signature": b"\x89PNG\r\n\x1a\n",
    "196 megapixels": encoded(Image.new("1", (14000, 14000))),
    "a header of 10 gigapixels": png_of(100_000, 100_000),
    "300 : 1": encoded(Image.new("L", (300, 1))),
    "1 : 300": encoded(Image.new("L", (1, 300))),
    "32-bit integers": encoded(Image.fromarray(np.full((28, 28), 70_000, np.int32)), "TIFF"),
    "floats": encoded(Image.fromarray(np.full((28, 28), 0.5, np.float32)), "TIFF"),
}
# (path in the row, new value, field of the message)
PROMPT, CONTENT = ("prompt",), ("prompt", 0, "content")
BAD_FIELDS = {
    "no data source": (("data_source",), None, "data_source"),
    "a data source of a number": (("data_source",), 7, "data_source"),
    "no prompt": (PROMPT, None, "prompt"),
    "a prompt of text": (PROMPT, "read red ?", "prompt"),
    "an empty prompt": (PROMPT, [], "prompt"),
    "a message of text": (PROMPT, ["read red ?"], "prompt[0]"),
    "a message without role": (PROMPT, [{"content": "<image>"}], "prompt[0]"),
    "an unknown role": (("prompt", 0, "role"), "human", "prompt[0]"),
    "content of null": (CONTENT, None, "prompt[0]"),
    "content of parts": (CONTENT, [{"type": "text", "text": "read"}], "prompt[0]"),
    "the assistant last": (("prompt", 0, "role"), "assistant", "prompt[0].role"),
    "a placeholder too many": (CONTENT, "<image><image>", "prompt"),
    "a placeholder missing": (CONTENT, "read red ?", "prompt"),
    "a video": (CONTENT, "<image><video>", "prompt"),
    "sound": (CONTENT, "<image><audio>", "prompt"),
    "a token of images": (CONTENT, "<image> <|image_pad|> ?", ""),
    "a token of videos": (CONTENT, "<image> <|video_pad|> ?", ""),
    "images of text": (("images",), "a.png", "images"),
    "an image of null": (("images",), [None], "images[0]"),
    "an image of a number": (("images",), [3], "images[0]"),
    "an image file that is not there": (("images",), ["not/there.png"], "images[0]"),
    "an image by URL in a struct": (("images",), [{"path": "http://x/a.png"}], "images[0]"),
    "no reward model": (("reward_model",), None, "reward_model"),
    "a reward model of a list": (("reward_model",), ["7"], "reward_model"),
    "no ground truth": (("reward_model",), {"style": "rule"}, "reward_model"),
    "a ground truth of null": (("reward_model", "ground_truth"), None, "reward_model"),
    "a reward model of half JSON": (("reward_model",), '{"ground_truth": ', "reward_model"),
    "no extra_info": (("extra_info",), None, "extra_info.index"),
    "extra_info of half JSON": (("extra_info",), '{"index": 1', "extra_info"),
    "extra_info of a JSON list": (("extra_info",), "[1]", "extra_info"),
    "extra_info of a list": (("extra_info",), [1], "extra_info"),
    "no index": (("extra_info",), {"split": "rl"}, "extra_info.index"),
    "an index of null": (("extra_info", "index"), None, "extra_info.index"),
    "an index of a fraction": (("extra_info", "index"), 1.5, "extra_info.index"),
    "an index of a truth value": (("extra_info", "index"), True, "extra_info.index"),
    "an index of the row before": (("extra_info", "index"), 0, "extra_info.index"),
    "the same index as text": (("extra_info", "index"), "0", "extra_info.index"),
}


@pytest.fixture(scope="module")
def length():
    _, tokenizer, processor = tiny.tiny_qwen2_5_vl(("read", "red", "?"))
    return PromptLength(tokenizer, processor)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refusal(path, length, field):
    """The typed error of row 1 of a file, complete and picklable."""
    with pytest.raises(DataError) as caught:
        check_files([path], length)
    error = caught.value
    assert error.where.startswith(f"{path} row 1"), error
    assert error.where.endswith(f": {field}" if field else "row 1")
    assert error.got and error.expected and error.fix
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return error


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_malformed_images(name, length, tmp_path):
    path = tmp_path / "rows.parquet"
    bad = ROW | {"images": [{"bytes": BAD_IMAGES[name], "path": None}]}
    write_verl_parquet(path, [GOOD, bad])
    of_processor = name in ("300 : 1", "1 : 300")
    refusal(path, length, "" if of_processor else "images[0]")


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_malformed_fields(name, length, tmp_path):
    """As JSON lines, where a cell may be anything; its images are files."""
    (tmp_path / "a.png").write_bytes(PNG)
    images = {"images": [str(tmp_path / "a.png")]}
    place, value, field = BAD_FIELDS[name]
    path = tmp_path / "rows.jsonl"
    write_lines(path, GOOD | images, changed(ROW | images, place, value))
    refusal(path, length, field)


def test_there_are_at_least_sixty_of_them():
    assert len(BAD_IMAGES) + len(BAD_FIELDS) >= 60


@pytest.mark.parametrize(
    ("suffix", "content", "where"),
    [
        (".jsonl", '{"data_source": "d"}\n', "row 0"),
        (".jsonl", "[1]\n", "row 0"),
        (".jsonl", "3\n", "row 0"),
        (".jsonl", '{"a": 1\n', "row 0"),
        (".jsonl", "", ""),
        (".json", "[]", ""),
        (".json", '[{"a": 1}, ', ""),
        (".json", b"\xff\xfe", ""),
        (".parquet", b"PAR1", ""),
        (".parquet", "", ""),
        (".csv", "a,b\n", ""),
        (".jsonl", None, ""),
    ],
)
def test_files_that_are_none(suffix, content, where, length, tmp_path):
    path = tmp_path / f"rows{suffix}"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        check_files([path], length)
    assert caught.value.where == f"{path} {where}".strip() and caught.value.expected


def test_a_parquet_that_is_damaged_inside(length, tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [changed(GOOD, ("extra_info", "index"), index) for index in range(50)]
    write_verl_parquet(path, rows)
    data = bytearray(path.read_bytes())
    data[50:400] = bytes(350)
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="rows.parquet after row"):
        check_files([path], length)


def test_all_rows_are_looked_at_and_all_bad_ones_named(length, tmp_path):
    rows = [changed(GOOD, ("extra_info", "index"), index) for index in range(600)]
    for number in (3, 299, 598):
        rows[number]["images"] = [{"bytes": half(encoded(format="JPEG")), "path": None}]
    path = tmp_path / "rows.parquet"
    write_verl_parquet(path, rows)
    seen = []
    with pytest.raises(DataError, match="2 further rows are refused, too: 299, 598") as caught:
        check_files([path], length, advance=seen.append)
    assert caught.value.where == f"{path} row 3: images[0]" and sum(seen) == 600


def test_an_index_of_two_files(length, tmp_path):
    for name in "ab":
        write_verl_parquet(tmp_path / f"{name}.parquet", [GOOD])
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    with pytest.raises(DataError, match="b.parquet row 0: extra_info.index: two rows") as caught:
        check_files(paths, length)
    assert f"{paths[0]} row 0" in caught.value.got


def test_lengths_are_the_prompts(length, tmp_path):
    path = tmp_path / "rows.parquet"
    wide = changed(
        ROW, ("images",), [{"bytes": encoded(Image.new("RGB", (112, 56))), "path": None}]
    )
    write_verl_parquet(path, [GOOD, wide])
    (file,) = check_files([path], length)
    assert file.indices == ["0", "1"]
    assert file.num_tokens[1] - file.num_tokens[0] == 32 - 16


@pytest.mark.parametrize("orientation", range(1, 9))
def test_lengths_are_of_the_upright_image(orientation, length, tmp_path):
    exif = Image.Exif()
    exif[0x112] = orientation
    rows = []
    for index, name in enumerate(("JPEG", "PNG", "TIFF", "WEBP")):
        data = encoded(Image.new("RGB", (300, 40)), name, exif=exif)
        row = changed(GOOD, ("images",), [{"bytes": data, "path": None}])
        rows.append(changed(row, ("extra_info", "index"), index))
    path = tmp_path / "rows.parquet"
    write_verl_parquet(path, rows)
    (file,) = check_files([path], length)
    for (row, where), count in zip(iter_verl_rows(path), file.num_tokens, strict=True):
        messages, refs = checks.parse_prompt(row, where)
        images = [ref.open() for ref in refs]
        assert refs[0].decoded_size() == images[0].size[::-1]
        assert images[0].size == ((300, 40) if orientation < 5 else (40, 300))
        prompt = encode_prompt(length.tokenizer, length.processor, messages, images, where)
        assert len(prompt.ids) == count


# ---- data as others write it ----------------------------------------------------------------


def test_json_keeps_texts_as_they_are(length, tmp_path):
    """`datasets` gives dates back for a column of such texts, and numbers for others."""
    truths = ["2026-11-28", "007", "1e5", "12:30", "true", "-0", "1.50", "null"]
    (tmp_path / "a.png").write_bytes(PNG)
    rows = []
    for index, truth in enumerate(truths):
        row = changed(ROW, ("reward_model", "ground_truth"), truth)
        row = changed(row, ("images",), [str(tmp_path / "a.png")])
        rows.append(changed(row, ("extra_info", "index"), index))
    for path in (tmp_path / "rows.jsonl", tmp_path / "rows.json"):
        write_lines(path, *rows)
        check_files([path], length)
        read = [row["reward_model"]["ground_truth"] for row, _ in iter_verl_rows(path)]
        assert read == truths
        path.write_text(json.dumps(rows))
        read = [row["reward_model"]["ground_truth"] for row, _ in iter_verl_rows(path)]
        assert read == truths


def test_structs_as_json_text_and_columns_of_other_names(length, tmp_path):
    record = {
        "data_source": "geo",
        "prompt": "not the prompt",
        "question": ROW["prompt"],
        "pictures": ROW["images"],
        "reward_model": json.dumps(ROW["reward_model"]),
        "extra_info": json.dumps({"index": 4, "answer": "7"}),
    }
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([record]), path)
    keys = RowKeys("question", "pictures")
    (file,) = check_files([path], length, keys)
    assert file.indices == ["4"]
    ((row, _),) = iter_verl_rows(path, keys)
    assert row["prompt"] == ROW["prompt"] and row["images"] == ROW["images"]
    assert row["extra_info"] == {"index": 4, "answer": "7"}
    assert row["reward_model"]["ground_truth"] == "7" and "pictures" not in row
    with pytest.raises(DataError, match="row 0: prompt: malformed row; got not the prompt"):
        check_files([path], length)
    with pytest.raises(DataError, match=r"columns \['problem'\] are missing.*data.prompt_key"):
        check_files([path], length, RowKeys("problem"))


def test_a_column_that_datasets_types_as_image(length, tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "rows.parquet"
    write_like_geo3k(path)
    (file,) = check_files([path], length)
    assert file.indices == ["0", "1"]


# ---- verdicts that are kept -----------------------------------------------------------------


def test_a_file_that_has_passed_is_not_read_again(length, tmp_path, cache, monkeypatch):
    path = tmp_path / "rows.parquet"
    write_verl_parquet(path, [GOOD, ROW])
    first = check_files([path], length)
    assert len(list(cache.glob("grpo_latent/rows/*.json"))) == 1
    monkeypatch.setattr(checks, "iter_verl_rows", lambda *args: pytest.fail("read again"))
    seen = []
    assert check_files([path], length, advance=seen.append) == first and seen == [2]


def test_other_bytes_and_damaged_verdicts_are_read(length, tmp_path, cache):
    path = tmp_path / "rows.parquet"
    write_verl_parquet(path, [GOOD, ROW])
    check_files([path], length)
    (kept,) = cache.glob("grpo_latent/rows/*.json")
    for damaged in ("", "{", "[]", '{"indices": []}', "null"):
        kept.write_text(damaged)
        assert check_files([path], length)[0].indices == ["0", "1"]
    write_verl_parquet(path, [GOOD, changed(ROW, ("prompt", 0, "content"), "read")])
    with pytest.raises(DataError, match="row 1: prompt"):
        check_files([path], length)


def test_an_image_file_that_changes_is_looked_at_again(length, tmp_path):
    picture, path = tmp_path / "a.png", tmp_path / "rows.jsonl"
    picture.write_bytes(PNG)
    write_lines(path, GOOD | {"images": [str(picture)]})
    check_files([path], length)
    picture.write_bytes(half(PNG))
    with pytest.raises(DataError, match="rows.jsonl row 0: images.0.: not a readable image"):
        check_files([path], length)
    picture.unlink()
    with pytest.raises(DataError, match="rows.jsonl row 0: images.0.: no such image file"):
        check_files([path], length)


def test_a_cache_that_cannot_be_written_costs_nothing_else(length, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "file"))
    path = tmp_path / "rows.parquet"
    write_verl_parquet(path, [GOOD])
    assert check_files([path], length)[0].indices == ["0"]
