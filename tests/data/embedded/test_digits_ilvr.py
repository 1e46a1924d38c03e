"""The embedded task as ILVR records: what is written is what the reader and the encoder take."""

import json

import numpy as np

from grpo_latent.data.embedded import digits, digits_ilvr
from grpo_latent.data.formats.ilvr_jsonl import read_ilvr_jsonl


def test_written_records_are_read_back_with_their_pixels(tmp_path):
    examples = digits.generate(6, stream="sft", seed=0, kinds=("max",))
    has_answer = [True, False] * 3
    digits_ilvr.write_ilvr_jsonl(tmp_path / "rows.jsonl", examples, has_answer)
    read = list(read_ilvr_jsonl(tmp_path / "rows.jsonl"))
    assert [example.has_answer for example in read] == has_answer
    for source, example in zip(examples, read, strict=True):
        first, second = source.asked
        known = (str(first.digit), f"{second.digit} <answer> {source.answer} </answer>")
        texts = [f"at {first.color}", None, known[0], f"at {second.color}", None, known[1]]
        if not example.has_answer:
            texts[2] = texts[5] = None
        assert [segment.text for segment in example.segments] == texts
        assert [segment.is_unknown for segment in example.segments].count(True) == (
            0 if example.has_answer else 2
        )
        content = example.messages[0]["content"]
        assert [content[0]["text"], content[1]["type"]] == [source.question, "image"]
        pixels = [np.asarray(image.open()) for image in example.images]
        pixels += [
            np.asarray(segment.helper_image.open())
            for segment in example.segments
            if segment.helper_image
        ]
        for found, expected in zip(pixels, [source.image, *source.helper_images], strict=True):
            assert np.array_equal(found, expected)


def test_an_unlabelled_record_tells_nothing_of_the_digits(tmp_path):
    (example,) = digits.generate(1, stream="sft", seed=0, kinds=("max",))
    digits_ilvr.write_ilvr_jsonl(tmp_path / "rows.jsonl", [example], [False])
    record = json.loads((tmp_path / "rows.jsonl").read_text())
    assert record.pop("sequence_plan")[2] == {"type": "text", "content": None}
    assert set(record) == {"text_input", "image_input", "has_answer"}


def test_main_keeps_few_answers(tmp_path, capsys):
    digits_ilvr.main(["--out", str(tmp_path), "--sft", "40", "--labels-per-answer", "1"])
    read = list(read_ilvr_jsonl(tmp_path / "train_sft.jsonl"))
    labelled = [example.answer for example in read if example.has_answer]
    assert len(read) == 40 and len(labelled) == len(set(labelled)) > 3
    assert f"40 rows, {len(labelled)} with an answer" in capsys.readouterr().out
