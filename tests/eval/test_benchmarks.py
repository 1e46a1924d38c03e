"""Files in each published schema, written here.

The real files are not at hand, so that their oddities are not covered.
"""

import base64
import json

import pytest
from benchmark_cases import (
    REALWORLD,
    REALWORLD_OPTIONS,
    WRITERS,
    png,
    write_blink,
    write_comt,
    write_digits,
    write_hrbench,
    write_m3cot,
    write_mme_realworld,
    write_mmvp,
    write_parquet,
    write_table,
    write_vstar,
)

from grpo_latent.data.embedded.digits import generate
from grpo_latent.data.formats.stepwise import (
    read_m3cot,
    read_scienceqa,
    read_stepwise_rows,
    to_verl_rows,
)
from grpo_latent.data.rows import write_verl_parquet
from grpo_latent.errors import DataError
from grpo_latent.eval.benchmarks import BENCHMARKS, load_benchmark
from grpo_latent.eval.graders import pair_accuracy

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


# name -> (number of items, right letter, options, number of images, category) of the first item
FIRST = {
    "mmvp": (4, "A", ("Open", "Closed"), 1, ""),
    "vstar": (1, "B", ("red", "dark red"), 1, "direct_attributes"),
    "blink": (2, "C", ("1", "2", "3"), 2, "Counting"),
    "hrbench": (2, "D", ("one", "two", "three", "four"), 1, "single"),
    "mme_realworld": (
        1,
        "C",
        ("STOP", "GO (slow)", "YIELD", "EXIT", "Not in the image."),
        1,
        "Perception/OCR with Complex Context",
    ),
    "m3cot": (1, "A", ("north", "south"), 1, "science"),
    "scienceqa": (2, "B", ("wood", "iron"), 0, "natural science"),
}


@pytest.mark.parametrize("name", FIRST)
def test_published_schema(name, tmp_path):
    WRITERS[name](tmp_path)
    items = load_benchmark(name, tmp_path)
    item = items[0]
    assert (len(items), item.answer, item.options, len(item.images), item.category) == FIRST[name]
    parts = item.messages[0]["content"]
    assert [part["type"] for part in parts] == ["image"] * len(item.images) + ["text"]
    assert all(image.open().size == (4, 3) for image in item.images)
    letters = "ABCDE"[: len(item.options)]
    assert [item.grade(f"({letter})").correct for letter in letters] == [
        letter == item.answer for letter in letters
    ]
    assert all(option in parts[-1]["text"] for option in item.options)
    assert item.chance == 1 / len(item.options)


def test_embedded_task(tmp_path):
    write_digits(tmp_path)
    examples = generate(3, stream="heldout", seed=0)
    items = load_benchmark("digits", tmp_path)
    assert [item.answer for item in items] == [example.answer for example in examples]
    assert items[0].grade(f"<answer> {items[0].answer} </answer>").correct and items[0].chance == 0


def test_mme_realworlds_tables_are_read_alike(tmp_path):
    """The .tsv, VLMEvalKit's .json and its own table, and lmms-eval's .parquet."""
    image = base64.b64encode(png()).decode()
    write_mme_realworld(tmp_path)
    (expected,) = load_benchmark("mme_realworld", tmp_path)
    (tmp_path / "json" / "MME-RealWorld").mkdir(parents=True)
    row = REALWORLD | {"image": image, "multi-choice options": REALWORLD_OPTIONS}
    (tmp_path / "json" / "MME-RealWorld" / "one.json").write_text(json.dumps([row]))
    text = "The choices are listed below:\n" + "\n".join(REALWORLD_OPTIONS)
    (tmp_path / "own").mkdir()
    write_table(
        tmp_path / "own" / "MME-RealWorld-Lite.tsv", [row | {"multi-choice options": text}], "\t"
    )
    stored = {"bytes": image, **{name: row[name] for name in row if name != "image"}}
    write_parquet(tmp_path / "parquet" / "train-00000.parquet", [stored])
    for folder in ("json", "own", "parquet"):
        (item,) = load_benchmark("mme_realworld", tmp_path / folder)
        assert (item.messages, item.answer) == (expected.messages, "C"), folder
        assert item.images[0].open().size == (4, 3)
    assert expected.messages[0]["content"][1]["text"] == (
        "What is on the sign? The choices are listed below:\n(A) STOP\n(B) GO (slow)\n(C) YIELD\n"
        "(D) EXIT\n(E) Not in the image.\nSelect the best answer to the above multiple-choice "
        "question based on the image. Respond with only the letter (A, B, C, D, or E) of the "
        "correct option.\nThe best answer is:"
    )


def test_comts_answers_are_words(tmp_path):
    write_comt(tmp_path)
    (item,) = load_benchmark("comt", tmp_path)
    content = item.messages[0]["content"]
    assert content == [{"type": "image"}, {"type": "text", "text": item.question}]
    right = ("B", "(b)", "<answer> B </answer>", "It is gone. The answer is B.")
    assert all(item.grade(text).correct for text in right)
    assert not any(item.grade(text).correct for text in ("A", "B or A", "<answer> B", ""))


def test_mmvp_pairs(tmp_path):
    write_mmvp(tmp_path)
    items = load_benchmark("mmvp", tmp_path / "Questions.csv")
    pairs = [item.group_id for item in items]
    assert pairs == ["pair 1", "pair 1", "pair 2", "pair 2"]
    assert pair_accuracy([item.grade("(a)").correct for item in items], pairs) == 0


def test_hrbench_groups_the_rotations_of_a_question(tmp_path):
    write_hrbench(tmp_path)
    first, second = load_benchmark("hrbench", tmp_path)
    assert first.group_id == second.group_id and first.item_id != second.item_id
    (tmp_path / "other").mkdir()
    write_hrbench(tmp_path / "other", image=base64.b64encode(png("blue")).decode())
    assert load_benchmark("hrbench", tmp_path / "other")[0].group_id != first.group_id, (
        "the same words of another image"
    )


@pytest.mark.parametrize("name, read", [("m3cot", read_m3cot), ("scienceqa", read_scienceqa)])
def test_questions_that_are_trained_on_are_asked_as_in_training(name, read, tmp_path):
    """One file, read for evaluation, for SFT, and for RL by way of its rows."""
    WRITERS[name](tmp_path)
    (file,) = tmp_path.glob("data/*.parquet")
    write_verl_parquet(tmp_path / "rl.parquet", to_verl_rows(read(file), "train"))
    evaluated = [(item.messages, item.answer) for item in load_benchmark(name, tmp_path)]
    for trained in (read(file), read_stepwise_rows(tmp_path / "rl.parquet")):
        assert [(example.messages, example.answer) for example in trained] == evaluated


def test_m3cots_jsonl_names_image_files(tmp_path):
    write_m3cot(tmp_path)
    (expected,) = load_benchmark("m3cot", tmp_path)
    (row,) = pq.read_table(next(tmp_path.glob("data/*.parquet"))).to_pylist()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.png").write_bytes(png())
    del row["rationale"]
    (tmp_path / "test.jsonl").write_text(json.dumps(row | {"image": "one.png"}))
    (item,) = load_benchmark("m3cot", tmp_path / "test.jsonl")
    assert item.messages == expected.messages and item.images[0].open().size == (4, 3)


def test_subset(tmp_path):
    write_blink(tmp_path)
    assert [item.category for item in load_benchmark("blink", tmp_path, "Jigsaw")] == ["Jigsaw"]
    with pytest.raises(DataError, match="no rows of subset 'Chess'"):
        load_benchmark("blink", tmp_path, "Chess")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_file_says_what_and_where_from(name, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        load_benchmark(name, tmp_path)
    benchmark = BENCHMARKS[name]
    for part in (
        str(tmp_path),
        "notes.txt",
        benchmark.source,
        *benchmark.files,
        *benchmark.columns,
    ):
        assert part in str(caught.value)


MALFORMED = [
    ("mmvp", {"Options": "Open or Closed"}, "Options"),
    ("mmvp", {"Correct Answer": "(c)"}, "answer"),
    ("mmvp", {"Index": 7}, "7.jpg"),
    ("vstar", {"label": "E"}, "answer"),
    ("vstar", {"text": "no options"}, "text"),
    ("vstar", {"image": "direct_attributes/none.jpg"}, "none.jpg"),
    ("blink", {"answer": "hidden"}, "test split"),
    ("blink", {"choices": []}, "choices"),
    ("hrbench", {"image": "%%%"}, "base64"),
    ("hrbench", {"answer": "E"}, "answer"),
    ("mme_realworld", {"multi-choice options": "['(A) a', '(C) c']"}, "options"),
    ("mme_realworld", {"multi-choice options": "['a', 'b']"}, "options"),
    ("mme_realworld", {"multi-choice options": ""}, "choices"),
    ("mme_realworld", {"answer": "F"}, "answer"),
    ("mme_realworld", {"image": ""}, "base64"),
    ("mme_realworld", {"question": ""}, "question"),
    ("m3cot", {"answer": "C"}, "answer"),
    ("m3cot", {"image": None, "choices": ["one"]}, "choices"),
    ("scienceqa", {"answer": 2}, "answer"),
    ("vstar", {"text": None}, "malformed row"),
    ("vstar", {"image": None}, "malformed row"),
    ("m3cot", {"choices": None}, ""),
    ("scienceqa", {"choices": None}, ""),
    ("scienceqa", {"answer": None}, ""),
    ("blink", {"choices": None}, "choices"),
    ("hrbench", {"image": None}, "base64"),
    # null cells, which become the text None, or a list's characters
    ("mmvp", {"Question": ""}, "Question"),
    ("vstar", {"question_id": None}, "question_id"),
    ("vstar", {"label": None}, "answer"),
    ("vstar", {"text": "  "}, "text"),
    ("blink", {"question": None}, "question"),
    ("blink", {"idx": None}, "idx"),
    ("blink", {"answer": None}, "answer"),
    ("blink", {"choices": ["1", None]}, "choices: option B"),
    ("blink", {"choices": "one or two"}, "choices"),
    ("blink", {"choices": "123"}, "choices"),
    ("hrbench", {"question": ""}, "question"),
    ("hrbench", {"C": ""}, "C"),
    ("hrbench", {"index": ""}, "index"),
    ("m3cot", {"question": None}, "question"),
    ("m3cot", {"id": None}, "id"),
    ("m3cot", {"choices": ["north", None]}, "choices"),
    ("scienceqa", {"question": None}, "question"),
]


@pytest.mark.parametrize("index", ["lndex", "Index", " index ", "\ufeffIndex"])
def test_mmvps_header_in_its_published_spellings(index, tmp_path):
    write_mmvp(tmp_path)
    file = tmp_path / "Questions.csv"
    file.write_text(file.read_text().replace("Index", index, 1), encoding="utf-8")
    assert [item.item_id for item in load_benchmark("mmvp", tmp_path)] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("choices", ["['1', '2', '3']", '["1", "2", "3"]', "(1, 2, 3)"])
def test_choices_that_are_written_as_text(choices, tmp_path):
    write_blink(tmp_path, choices=choices)
    assert load_benchmark("blink", tmp_path)[0].options == ("1", "2", "3")


@pytest.mark.parametrize(("name", "changes", "named"), MALFORMED)
def test_malformed_row_is_named(name, changes, named, tmp_path):
    WRITERS[name](tmp_path, **changes)
    with pytest.raises(DataError, match=f"row 0.*{named}"):
        load_benchmark(name, tmp_path)


@pytest.mark.parametrize("name", FIRST)
def test_missing_column_is_named(name, tmp_path):
    WRITERS[name](tmp_path)
    (file,) = [
        next(iter(sorted(tmp_path.glob(f"**/{p}"))))
        for p in BENCHMARKS[name].files
        if list(tmp_path.glob(f"**/{p}"))
    ]
    column = BENCHMARKS[name].columns[-1]
    if file.suffix == ".parquet":
        write_parquet(file, pq.read_table(file).drop_columns([column]).to_pylist())
    else:
        file.write_text(file.read_text().replace(column, "other", 1))
    with pytest.raises(DataError, match=f"row 0: columns .'{column}'. are missing"):
        load_benchmark(name, file)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_corrupt_file_is_named(name, tmp_path):
    WRITERS[name](tmp_path)
    file = next(f for p in BENCHMARKS[name].files for f in sorted(tmp_path.glob(f"**/{p}")))
    file.write_bytes(b"\xff\xfe\x00 not a table {")
    with pytest.raises(DataError, match=file.name):
        load_benchmark(name, file)


def test_half_a_pair_is_refused_before_anything_is_decoded(tmp_path):
    write_mmvp(tmp_path)
    path = tmp_path / "Questions.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match=r"not 2 rows a group.*'pair 2': 1"):
        load_benchmark("mmvp", tmp_path)


def test_a_row_without_a_category_is_sorted_among_the_others(tmp_path):
    """The report sorts categories, after everything has been decoded."""
    write_vstar(tmp_path, category=None)
    (item, *_) = load_benchmark("vstar", tmp_path)
    assert (item.category, item.item_id) == ("", "/0")
