"""VLMEvalKit itself, in its own environment, on a table that is built here."""

import csv
import json

import pytest
from harness_cases import (
    NEW_TOKENS,
    ROOT,
    make_questions,
    our_evaluation,
    python_of,
    run,
    write_vlmevalkit_table,
)

pytestmark = pytest.mark.slow


def test_our_classes_inside_vlmevalkit(tmp_path):
    python = python_of("vlmevalkit")
    tests = ROOT / "tests" / "harnesses" / "inside_vlmevalkit.py"
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, "-c", "/dev/null"]
    assert "passed" in run([python, "-m", "pytest", *options, tests], tmp_path)


def test_a_table_scores_as_our_evaluation(tmp_path):
    """Ten options, the digits; its exact matching finds the one that the model says."""
    python = python_of("vlmevalkit")
    questions = make_questions(tmp_path)
    write_vlmevalkit_table(questions, tmp_path / "LMUData")
    model = {
        "class": "GrpoLatent",
        "folder": str(tmp_path / "model"),
        "template": "{question}",
        "max_new_tokens": 1,
        "min_new_tokens": NEW_TOKENS,
    }
    config = {
        "model": {"tiny": model},
        "data": {"TinyDigits": {"class": "CustomMCQDataset", "dataset": "TinyDigits"}},
    }
    (tmp_path / "mine.json").write_text(json.dumps(config))
    said = run(
        [
            *(python, "-m", "grpo_latent.harnesses.vlmevalkit", "--config", "mine.json"),
            *("--work-dir", tmp_path / "out", "--judge", "exact_matching"),
        ],
        tmp_path,
        LMUData=str(tmp_path / "LMUData"),
        PRED_FORMAT="tsv",
    )
    (scores,) = tmp_path.glob("out/tiny/*_acc.csv")
    (row,) = csv.DictReader(scores.read_text().splitlines())
    assert float(row["Overall"]) == pytest.approx(questions.accuracy), said[-2000:]
    assert float(row["Overall"]) == pytest.approx(our_evaluation(questions)["greedy"]["accuracy"])
    with open(tmp_path / "out" / "tiny" / "tiny_TinyDigits.tsv", newline="") as file:
        predictions = {
            row["index"]: row["prediction"] for row in csv.DictReader(file, delimiter="\t")
        }
    assert [predictions[str(number)] for number in range(18)] == questions.said
