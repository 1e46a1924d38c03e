"""Writers of files in each published schema, of a few rows."""

import base64
import csv
import io
import json

import pytest
from PIL import Image

from grpo_latent.data.embedded.digits import generate, to_rows
from grpo_latent.data.rows import write_verl_parquet
from grpo_latent.eval.benchmarks import BENCHMARKS

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(color="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(buffer, format="PNG")
    return buffer.getvalue()


def stored(color="red") -> dict:
    return {"bytes": png(color), "path": "x.png"}


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_table(path, rows, delimiter=","):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_mmvp(root, **changes):
    (root / "MMVP Images").mkdir()
    rows = []
    for index in (1, 2, 3, 4):
        (root / "MMVP Images" / f"{index}.jpg").write_bytes(png())
        answer = "(a)" if index % 2 else "(b)"
        row = {
            "Index": index,
            "Question": "Is it open?",
            "Options": "(a) Open (b) Closed",
            "Correct Answer": answer,
        }
        rows.append(row | changes)
    write_table(root / "Questions.csv", rows)


def write_vstar(root, **changes):
    (root / "direct_attributes").mkdir()
    (root / "direct_attributes" / "sa_1.jpg").write_bytes(png())
    instruction = "Answer with the option's letter from the given choices directly."
    text = f"What is the colour?\n(A) red\n(B) dark red\n{instruction}"
    row = {
        "image": "direct_attributes/sa_1.jpg",
        "text": text,
        "category": "direct_attributes",
        "label": "B",
    }
    (root / "test_questions.jsonl").write_text(
        json.dumps({**row, "question_id": 0, **changes}) + "\n\n"
    )


def write_blink(root, **changes):
    for subset in ("Counting", "Jigsaw"):
        row = {
            "idx": f"val_{subset}_1",
            "question": "How many?",
            "sub_task": subset,
            "choices": ["1", "2", "3"],
        }
        row |= {
            "answer": "(C)",
            "image_1": stored(),
            "image_2": stored("blue"),
            "image_3": None,
            "image_4": None,
        }
        write_parquet(root / subset / "val-00000-of-00001.parquet", [row | changes])


def write_hrbench(root, **changes):
    row = {
        "index": 0,
        "question": "What is written?",
        "A": "one",
        "B": "two",
        "C": "three",
        "D": "four",
    }
    row |= {
        "answer": "D",
        "category": "single",
        "cycle_category": "cycle 0",
        "image": base64.b64encode(png()).decode(),
    }
    rotated = row | {"index": 1, "A": "four", "D": "one", "answer": "A"}
    write_table(root / "hr_bench_4k.tsv", [row | changes, rotated | changes], "\t")


REALWORLD = {
    "index": "7",
    "question": "What is on the sign?",
    "answer": "C",
    "category": "Perception/OCR with Complex Context",
    "l2-category": "scene text recognition",
}
REALWORLD_OPTIONS = ["(A) STOP", "(B) GO (slow)", "(C) YIELD", "(D) EXIT", "(E) Not in the image."]


def write_mme_realworld(root, **changes):
    row = REALWORLD | {"image": base64.b64encode(png()).decode()}
    row |= {"multi-choice options": str(REALWORLD_OPTIONS)}
    write_table(root / "mme_realworld_lite.tsv", [row | changes], "\t")


def write_comt(root, **changes):
    (root / "images_comt").mkdir()
    (root / "images_comt" / "1.jpg").write_bytes(png())
    row = {
        "text_input": "Which is deleted? A. red B. blue",
        "image_input": ["images_comt/1.jpg"],
        "sequence_plan": [{"type": "latent", "helper_image": "not_here.jpg"}],
        "original_final_answer": "B",
    }
    (root / "TEST.jsonl").write_text(json.dumps(row | changes) + "\n")


def write_m3cot(root, **changes):
    row = {
        "id": "physics-1",
        "category": "x",
        "question": "Which?",
        "choices": ["north", "south"],
        "context": "A map.",
    }
    row |= {
        "answer": "A",
        "rationale": "Because.",
        "image": stored(),
        "domain": "science",
        "topic": "geo",
    }
    write_parquet(root / "data" / "test-00000-of-00001.parquet", [row | changes])


def write_scienceqa(root, **changes):
    row = {
        "image": None,
        "question": "Which conducts?",
        "choices": ["wood", "iron"],
        "answer": 1,
        "hint": "Think.",
    }
    row |= {"subject": "natural science", "topic": "physics"}
    write_parquet(
        root / "data" / "test-00000-of-00001.parquet", [row | changes, {**row, "image": stored()}]
    )


def write_digits(root, **changes):
    write_verl_parquet(
        root / "heldout.parquet", to_rows(generate(3, stream="heldout", seed=0), "heldout")
    )


WRITERS = {name: globals()[f"write_{name}"] for name in BENCHMARKS}
