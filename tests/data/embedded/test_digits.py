"""The embedded task: determinism, label scarcity, disjoint splits, boxes, and its parquet files.

The files are read as verl reads them.
"""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from grpo_latent.data.boxes import box_to_visual_tokens
from grpo_latent.data.embedded import digits
from grpo_latent.errors import ConfigError
from grpo_latent.models.tiny import tiny_qwen2_5_vl, word_tokenizer


@pytest.fixture(scope="module")
def examples():
    return digits.generate(200, stream="sft", seed=0, kinds=tuple(digits.KINDS))


def test_same_arguments_same_examples_other_seed_or_stream_others():
    def images(**changes):
        arguments = {"num": 20, "stream": "sft", "seed": 0} | changes
        return np.stack(
            [example.image for example in digits.generate(arguments.pop("num"), **arguments)]
        )

    assert np.array_equal(images(), images())
    assert not np.array_equal(images(), images(seed=1))
    assert not np.array_equal(images(), images(stream="rl"))


def test_the_heldout_stream_is_pinned():
    """Data must not move under a published result.

    If this fails on purpose, say so in the results.
    """
    example = digits.generate(3, stream="heldout", seed=digits.EVAL_SEED)[2]
    assert (example.question, example.answer) == ("read orange ?", "0")
    assert example.boxes == [pytest.approx((0.5, 30 / 56, 40 / 56, 0.75))]
    assert (
        abs(int(example.image.astype(int).sum()) - 620037) < 20
    )  # another CPU may round a pixel otherwise


def test_questions_answers_and_steps_agree(examples):
    kinds = {example.kind for example in examples}
    assert kinds == set(digits.KINDS)
    for example in examples:
        values = [item.digit for item in example.asked]
        by_hand = {"read": values[0], "sum": sum(values), "max": max(values)}[example.kind]
        assert example.answer == str(by_hand)
        assert example.question.split() == [
            example.kind,
            *(item.color for item in example.asked),
            "?",
        ]
        assert [step.split()[-1] for step in example.steps] == [str(value) for value in values]
        assert len({item.color for item in example.objects}) == len(example.objects) == 6
        assert len({(item.row, item.column) for item in example.objects}) == 6


def test_a_box_is_the_visual_token_of_its_cell(examples):
    for item in (item for example in examples for item in example.objects):
        assert box_to_visual_tokens(item.box_normalised, (1, 8, 8), 2) == [
            item.row * 4 + item.column
        ]


def test_pixels_show_the_object_in_its_box():
    """Mean colour in a cell leans to the object's, and its helper image is the cell.

    Cells without objects are grey.
    """
    for example in digits.generate(50, stream="sft", seed=1):
        (asked,) = example.asked
        x0, y0, x1, y1 = asked.box
        cell = example.image[
            asked.row * 14 : asked.row * 14 + 14, asked.column * 14 : asked.column * 14 + 14
        ]
        assert np.array_equal(example.helper_images[0], cell)
        assert np.array_equal(
            cell[y0 % 14 : y0 % 14 + 12, x0 % 14 : x0 % 14 + 12], example.image[y0:y1, x0:x1]
        )
        excess = {}
        for row, column in np.ndindex(4, 4):
            cell = (
                example.image[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
                .reshape(-1, 3)
                .mean(0)
            )
            excess[row, column] = np.abs(cell - 61).max()
        occupied = {(item.row, item.column) for item in example.objects}
        assert min(excess[cell] for cell in occupied) > max(
            excess[cell] for cell in set(excess) - occupied
        )
        target = np.array(digits.COLORS[asked.color]) - 60
        seen = example.helper_images[0].reshape(-1, 3).mean(0) - 60
        assert target @ seen / np.linalg.norm(target) / np.linalg.norm(seen) > 0.9


def test_splits_use_disjoint_digit_images():
    train, heldout = (set(digits.digit_pool(stream).tolist()) for stream in ("rl", "heldout"))
    assert len(train) == 1297 and len(heldout) == 500 and not train & heldout
    assert {stream: used for stream, (_, used) in digits.STREAMS.items()} == {
        "sft": True, "rl": True, "pretrain": True, "dev": False, "heldout": False,
    }  # fmt: skip


def test_dense_labels_name_the_cells():
    images, digit_NC, color_NC = digits.generate_dense(64, np.random.default_rng(0), "pretrain")
    empty = digit_NC == digits.NO_DIGIT
    assert images.shape == (64, 56, 56, 3) and np.array_equal(empty, color_NC == digits.NO_COLOR)
    assert 0.3 < empty.mean() < 0.5 and set(digit_NC[~empty]) == set(range(10))
    cells = (
        images.reshape(64, 4, 14, 4, 14, 3)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(64, 16, -1, 3)
        .mean(2)
    )
    assert np.abs(cells[empty] - 61).max() < 8
    reds = cells[color_NC == digits.COLOR_NAMES.index("red")]
    assert (reds[:, 0] > reds[:, 1] + 5).all()


def test_answers_are_scarce_per_kind_and_answer(examples):
    keep = digits.scarce_labels(examples, per_answer=2)
    kept = [
        (example.kind, example.answer)
        for example, kept in zip(examples, keep, strict=True)
        if kept
    ]
    assert max(kept.count(label) for label in kept) == 2
    assert {label for label in kept} == {(example.kind, example.answer) for example in examples}
    assert all(digits.scarce_labels(examples, per_answer=None))
    assert not any(digits.scarce_labels(examples, per_answer=0))


def test_rationales_with_places_without_or_none(examples):
    rows = {
        name: digits.to_rows(examples[:1], "sft", steps=name)[0]["extra_info"]["steps"]
        for name in digits.STEPS
    }
    assert rows["none"] == [] and rows["full"] == examples[0].steps
    assert rows["short"] == [f"{item.color} is {item.digit}" for item in examples[0].asked]


def test_every_word_is_in_the_vocabulary(examples):
    tokenizer = word_tokenizer(digits.WORDS)
    texts = [" ".join([example.question, *example.steps, example.answer]) for example in examples]
    assert tokenizer.unk_token_id not in {
        token for ids in tokenizer(texts).input_ids for token in ids
    }


@pytest.mark.parametrize(
    "arguments", [{"stream": "test"}, {"stream": "sft", "kinds": ("read", "guess")}]
)
def test_unknown_names_are_typed_errors(arguments):
    with pytest.raises(ConfigError, match="one of"):
        digits.generate(1, seed=0, **arguments)


def test_files_of_the_command(tmp_path):
    sizes = ["--sft", "300", "--rl", "7", "--dev", "5", "--heldout", "6"]
    digits.main(["--out", str(tmp_path), "--seed", "3", *sizes])
    tables = {path.stem: pq.read_table(path).to_pylist() for path in tmp_path.iterdir()}
    assert {name: len(rows) for name, rows in tables.items()} == {
        "train_sft": 300,
        "train_rl": 7,
        "dev": 5,
        "heldout": 6,
    }
    labelled = [row for row in tables["train_sft"] if row["extra_info"]["has_answer"]]
    assert sorted(row["reward_model"]["ground_truth"] for row in labelled) == [
        str(digit) for digit in range(10)
    ]
    for row in tables["train_sft"]:
        has_answer = row["extra_info"]["has_answer"]
        truth = row["reward_model"]["ground_truth"]
        assert has_answer == (truth != "") == (row["extra_info"]["steps"] is not None)
        assert row["extra_info"]["response"] == (
            f"<lvr> <answer> {truth} </answer>" if has_answer else "<lvr> <answer>"
        )
        assert len(row["extra_info"]["bboxes"]) == 1

    examples = digits.generate(7, stream="rl", seed=3)
    for index, (row, example) in enumerate(zip(tables["train_rl"], examples, strict=True)):
        decoded = np.asarray(Image.open(io.BytesIO(row["images"][0]["bytes"])))
        assert np.array_equal(decoded, example.image)
        assert row["prompt"] == [{"role": "user", "content": f"{example.question}<image>"}]
        assert (
            row["data_source"] == "digits"
            and row["reward_model"]["ground_truth"] == example.answer
        )
        assert row["extra_info"]["index"] == index and row["extra_info"]["bboxes"] == [
            list(example.boxes[0])
        ]


def test_prompt_of_a_row_through_the_processor():
    _, tokenizer, processor = tiny_qwen2_5_vl(digits.WORDS)
    row = digits.to_rows(digits.generate(1, stream="rl", seed=0), "rl")[0]
    content = [
        {"type": "text", "text": row["prompt"][0]["content"].removesuffix("<image>")},
        {"type": "image"},
    ]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    image = Image.open(io.BytesIO(row["images"][0]["bytes"]))
    ids = processor(text=[text], images=[image], return_tensors="pt")["input_ids"][0]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[:2] == ["<|im_start|>", "read"] and words[3:5] == ["?", "<|vision_start|>"]
    assert words[5:21] == ["<|image_pad|>"] * 16 and words[21:] == ["<|vision_end|>", "<|im_end|>"]


def test_wrong_boxes_are_of_the_next_colour_in_sft_alone(tmp_path):
    sizes = ["--sft", "200", "--rl", "60", "--dev", "5", "--heldout", "60"]
    for name, options in (("plain", []), ("wrong", ["--wrong-boxes", "3"])):
        digits.main(["--out", str(tmp_path / name), *sizes, *options])
    wrong_colors = digits.COLOR_NAMES[:3]
    for stream in ("train_sft", "train_rl", "heldout"):
        plain, wrong = (
            pq.read_table(tmp_path / name / f"{stream}.parquet").to_pylist()
            for name in ("plain", "wrong")
        )
        name = stream.removeprefix("train_")
        seed = digits.EVAL_SEED if name == "heldout" else 0
        examples = digits.generate(len(plain), stream=name, seed=seed)
        for one, other, example in zip(plain, wrong, examples, strict=True):
            is_wrong = other["extra_info"].pop(digits.WRONG_BOX)
            boxes = other["extra_info"].pop("bboxes")
            right = one["extra_info"].pop("bboxes")
            assert one == other, "answers, images and all else stay, and plain rows have no mark"
            assert is_wrong == (example.asked[0].color in wrong_colors)
            if not (is_wrong and name == "sft"):
                assert boxes == right
                continue
            place = digits.COLOR_NAMES.index(example.asked[0].color)
            following = [*digits.COLOR_NAMES[place + 1 :], *digits.COLOR_NAMES[:place]]
            shown = {item.color: item for item in example.objects}
            neighbour = next(shown[color] for color in following if color in shown)
            assert boxes == [list(neighbour.box_normalised)] != right


def test_the_next_colour_after_the_last_is_the_first():
    example = next(
        example
        for example in digits.generate(200, stream="sft", seed=0)
        if example.asked[0].color == digits.COLOR_NAMES[-1]
    )
    shown = {item.color: item for item in example.objects}
    first = next(shown[color] for color in digits.COLOR_NAMES if color in shown)
    assert example.boxed(digits.COLOR_NAMES) == [first]
    words = digits.text_response(example, False, digits.COLOR_NAMES)
    assert words == f"r{first.row} c{first.column} <answer>"
