"""M3CoT and ScienceQA: steps, prompts, and one typed error for each way to break a record."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from grpo_latent.data.formats.sentences import split_sentences
from grpo_latent.data.formats.stepwise import (
    READERS,
    main,
    parse_coconut_record,
    parse_m3cot_record,
    parse_scienceqa_record,
    rationale_steps,
    read_coconut_json,
    read_m3cot,
    read_scienceqa,
    remaining_text,
    to_verl_rows,
)
from grpo_latent.data.rows import iter_verl_rows, write_verl_parquet
from grpo_latent.errors import DataError


def png():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


IMAGE = {"bytes": png(), "path": "a.png"}
M3COT = {
    "id": "x-1",
    "category": "physical",
    "image_id": "x-1",
    "question": "What falls?",
    "choices": ["A feather", "A stone", "Both"],
    "context": "There is no air.",
    "answer": "C",
    "rationale": "There is no air. So nothing slows them. Both fall. They fall alike. Hence both",
    "split": "train",
    "image": IMAGE,
    "domain": "science",
    "topic": "natural-science",
}
SCIENCEQA = {
    "image": None,
    "question": "What falls?",
    "choices": ["A feather", "A stone"],
    "answer": 1,
    "hint": "",
    "task": "closed choice",
    "grade": "grade2",
    "subject": "natural science",
    "topic": "physics",
    "category": "Forces",
    "skill": "s",
    "lecture": "Air slows things.",
    "solution": "A stone is heavy.",
}


def write(path, *records):
    pq.write_table(pa.Table.from_pylist(list(records)), path)
    return path


def test_m3cot(tmp_path):
    first, second = read_m3cot(
        write(tmp_path / "a.parquet", M3COT, M3COT | {"image": None, "context": None})
    )
    text = "What falls?\nContext: There is no air.\nOptions:\n(A) A feather\n(B) A stone\n(C) Both"
    assert first.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": text}]
    assert first.steps == (
        "There is no air. So nothing slows them.",
        "Both fall. They fall alike.",
        "Hence both",
    )
    assert first.answer == "C" and first.images[0].open().size == (4, 4) and "row 0" in first.where
    assert (
        second.images == ()
        and "Context" not in second.messages[0]["content"][0]["text"]
        and "row 1" in second.where
    )
    assert remaining_text(first, 0).startswith("There is no air. So") and remaining_text(
        first, 0
    ).endswith("the answer is C")
    assert remaining_text(first, 3) == "Therefore, the answer is C" == remaining_text(first, 9)


def test_scienceqa(tmp_path):
    plain = {"solution": "", "lecture": ""}
    first, second = read_scienceqa(
        write(tmp_path / "a.parquet", SCIENCEQA, SCIENCEQA | plain | {"image": IMAGE})
    )
    assert first.steps == ("Air slows things.", "A stone is heavy.") and first.answer == "B"
    assert second.steps == () and len(second.images) == 1
    assert remaining_text(second, 0) == "Therefore, the answer is B"


COCONUT = {"question": "2 + 3, times 2?", "answer": "10", "steps": ["<<2+3=5>>", " <<5*2=10>> "]}


def test_coconut_json_in_sft_and_rl(tmp_path):
    path, out = tmp_path / "gsm.json", tmp_path / "rl.parquet"
    path.write_text(json.dumps([COCONUT, COCONUT | {"steps": []}]))
    first, second = read_coconut_json(path)
    assert first.messages == (
        {"role": "user", "content": [{"type": "text", "text": "2 + 3, times 2?"}]},
    )
    assert (
        first.steps == ("<<2+3=5>>", "<<5*2=10>>")
        and second.steps == ()
        and "row 1" in second.where
    )
    assert remaining_text(first, 1) == "<<5*2=10>> <answer> 10 </answer>"
    main(["--format", "coconut_json", "--in", str(path), "--out", str(out)])
    row, _ = next(iter_verl_rows(out))
    assert row["prompt"] == [{"role": "user", "content": "2 + 3, times 2?"}] and row["extra_info"][
        "steps"
    ] == list(first.steps)
    assert row["reward_model"]["ground_truth"] == "10" and row["images"] == []


@pytest.mark.parametrize(
    "content, message",
    [
        ("[", "not a readable JSON file"),
        ("{}", "no list of records"),
        ("[]", "no list of records"),
    ],
)
def test_unreadable_coconut_json(tmp_path, content, message):
    (tmp_path / "gsm.json").write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_coconut_json(tmp_path / "gsm.json"))


@pytest.mark.parametrize("num", range(1, 9))
def test_steps_keep_every_sentence_in_order(num):
    sentences = [f"Sentence {i}." for i in range(num)]
    steps = rationale_steps(" ".join(sentences))
    assert " ".join(steps) == " ".join(sentences) and len(steps) == min(num, 3)
    sizes = [step.count("Sentence") for step in steps]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


SENTENCES = [
    # IVT-LR's own: ". " after the line breaks became spaces
    ("It is red. It is 7. So B.", ["It is red.", "It is 7.", "So B."]),
    ("It is red.\nIt is 7.\nSo B.", ["It is red.", "It is 7.", "So B."]),
    ("It is red.\r\n\r\nIt is 7.", ["It is red.", "It is 7."]),
    ("It is red. \n It is 7.  So B", ["It is red.", "It is 7.", "So B"]),
    ("It is red.\tIt is 7.", ["It is red.", "It is 7."]),
    ("there are 7. blue is 2.", ["there are 7.", "blue is 2."]),
    # line breaks
    ("Red is 7\nBlue is 2", ["Red is 7", "Blue is 2"]),
    ("The cube on the\nleft is red. So B.", ["The cube on the left is red.", "So B."]),
    ("Look at this figure:\nThe cube is red.", ["Look at this figure:", "The cube is red."]),
    # lists
    ("1. It is red.\n2. It is 7.", ["1. It is red.", "2. It is 7."]),
    ("1. It is red. 2. It is 7.", ["1. It is red.", "2. It is 7."]),
    ("- red\n- blue\n- green", ["- red", "- blue", "- green"]),
    ("* red\n\u2022 blue", ["* red", "\u2022 blue"]),
    ("(1) red\n(2) blue", ["(1) red", "(2) blue"]),
    ("A. north\nB. south", ["A. north", "B. south"]),
    ("Step 1. Add. Step 2. Stop.", ["Step 1. Add.", "Step 2. Stop."]),
    # decimals, abbreviations, initials
    ("It is 3.5 m. So B.", ["It is 3.5 m.", "So B."]),
    ("Acids, e.g. vinegar, are sour. So B.", ["Acids, e.g. vinegar, are sour.", "So B."]),
    ("That is, i.e. Boston. So B.", ["That is, i.e. Boston.", "So B."]),
    ("See Fig. 3. Then go.", ["See Fig. 3.", "Then go."]),
    ("Dr. King and Mr. Lee spoke. So B.", ["Dr. King and Mr. Lee spoke.", "So B."]),
    ("Cats vs. dogs. So B.", ["Cats vs. dogs.", "So B."]),
    ("Plant No. 5 grew. Is it red? No. So B.", ["Plant No. 5 grew.", "Is it red? No.", "So B."]),
    ("Iron, copper, etc. are metals. So B.", ["Iron, copper, etc. are metals.", "So B."]),
    ("Iron, copper, etc. Wood is none.", ["Iron, copper, etc.", "Wood is none."]),
    ("At 5 p.m. it rained. So B.", ["At 5 p.m. it rained.", "So B."]),
    ("J. K. Rowling wrote. So B.", ["J. K. Rowling wrote.", "So B."]),
    ("The answer is B. The rest is wrong.", ["The answer is B.", "The rest is wrong."]),
    ("It is Option B. The rest is wrong.", ["It is Option B.", "The rest is wrong."]),
    ("Magnet A. Magnet B", ["Magnet A.", "Magnet B"]),
]


@pytest.mark.parametrize(("text", "sentences"), SENTENCES)
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences


def test_a_rationale_in_lines_has_as_many_steps_as_one_in_a_row():
    """M3CoT's and ScienceQA's rationales break the line after the full stop."""
    rationale = "There is no air.\nSo nothing slows them.\nBoth fall alike."
    steps = tuple(rationale.split("\n"))
    assert parse_m3cot_record(M3COT | {"rationale": rationale}, "row 0").steps == steps
    record = SCIENCEQA | {"lecture": rationale, "solution": ""}
    assert parse_scienceqa_record(record, "row 0").steps == steps
    assert rationale_steps("- red\n- blue\n- green\n- so B.") == (
        "- red. - blue.",
        "- green.",
        "- so B.",
    )


@pytest.mark.parametrize("text", ["", "  ", " . ", ". . ."])
def test_a_rationale_without_words_has_no_steps(text):
    assert rationale_steps(text) == ()


BROKEN = {
    "record": ([1], "not a record"),
    "question": ({"question": " "}, "no question"),
    "choices": ({"choices": ["one"]}, "not a list of choices"),
    "choices ": ({"choices": "A"}, "not a list of choices"),
    "image": ({"image": "a.png"}, "no image bytes"),
    "image ": ({"image": {"bytes": b"no image", "path": None}}, "not a readable image"),
}
BROKEN_M3COT = BROKEN | {
    "answer": ({"answer": "D"}, "not the letter of a choice"),
    "answer ": ({"answer": 1}, "not the letter of a choice"),
    "rationale": ({"rationale": ""}, "no rationale"),
    "context": ({"context": 3}, "not a text"),
}
BROKEN_SCIENCEQA = BROKEN | {
    "answer": ({"answer": 2}, "not the index of a choice"),
    "answer ": ({"answer": "B"}, "not the index of a choice"),
    "answer  ": ({"answer": True}, "not the index of a choice"),
    "hint": ({"hint": 3}, "not a text"),
}
BROKEN_COCONUT = {
    "record": ([1], "not a record"),
    "question": ({"question": " "}, "no question"),
    "question ": ({"question": "<image>Q"}, "placeholders do not match"),
    "answer": ({"answer": 10}, "not a text"),
    "answer ": ({"answer": ""}, "no answer"),
    "steps": ({"steps": "5"}, "no rationale in steps"),
    "steps ": ({"steps": ["5", ""]}, "no rationale in steps"),
}


@pytest.mark.parametrize(
    "parse, good, field, change, message",
    [(parse_m3cot_record, M3COT, field, *case) for field, case in BROKEN_M3COT.items()]
    + [
        (parse_scienceqa_record, SCIENCEQA, field, *case)
        for field, case in BROKEN_SCIENCEQA.items()
    ]
    + [(parse_coconut_record, COCONUT, field, *case) for field, case in BROKEN_COCONUT.items()],
)
def test_malformed_records_name_row_and_field(parse, good, field, change, message):
    parse(good, "row 3")
    record = good | change if isinstance(change, dict) else change
    with pytest.raises(DataError, match=f"^row 3: {field.strip()}: {message}"):
        parse(record, "row 3")


def test_unreadable_files(tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(DataError, match="not a readable parquet file"):
        list(read_m3cot(path))
    path.write_text("no parquet")
    with pytest.raises(DataError, match="not a readable parquet file"):
        list(read_scienceqa(path))
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match="no rows"):
        list(read_m3cot(path))


def test_as_ivt_lrs_code_trains(tmp_path):
    """Written out by hand: braces, no context, 280 x 280, steps in lines; also through verl rows."""
    rationale = (
        "There is no air. So nothing\nslows them, e.g. a feather. Both fall. They fall alike."
    )
    file = write(tmp_path / "a.parquet", M3COT | {"rationale": rationale})
    (example,) = READERS["m3cot_published"](file)
    text = "[Question]:{What falls?}\n[Options]:\n(A).{A feather}\n(B).{A stone}\n(C).{Both}\nAnswer:\n"
    assert example.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": text}]
    assert example.images[0].open().size == (280, 280)
    assert example.steps == (
        "There is no air. So nothing slows them, e.g",
        "a feather. Both fall",
        "They fall alike.",
    )
    closing = "Therefore, the answer is C"
    assert remaining_text(example, 1) == f"a feather. Both fall\nThey fall alike.\n{closing}"
    assert remaining_text(example, 3) == remaining_text(example, None) == closing
    write_verl_parquet(tmp_path / "rl.parquet", to_verl_rows(iter([example]), "train"))
    ((row, _),) = iter_verl_rows(tmp_path / "rl.parquet")
    assert row["prompt"][0]["content"] == f"<image>{text}"
    assert Image.open(io.BytesIO(row["images"][0]["bytes"])).size == (280, 280)
    (plain,) = READERS["scienceqa_published"](write(tmp_path / "b.parquet", SCIENCEQA))
    assert plain.images == () and plain.messages[0]["content"][0]["text"].endswith("Answer:\n")
    assert plain.steps == ("Air slows things", "A stone is heavy.")
