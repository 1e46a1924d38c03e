"""VLMEvalKit itself, in its own environment, on a table that is built here."""

import csv
import io
import json

import pytest
from harness_cases import (
    LETTERS,
    NEW_TOKENS,
    ROOT,
    make_questions,
    our_evaluation,
    python_of,
    run,
    served,
    write_vlmevalkit_table,
)
from PIL import Image

pytestmark = pytest.mark.slow


def test_our_classes_inside_vlmevalkit(tmp_path):
    python = python_of("vlmevalkit")
    tests = ROOT / "tests" / "harnesses" / "inside_vlmevalkit.py"
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, "-c", "/dev/null"]
    assert "passed" in run([python, "-m", "pytest", *options, tests], tmp_path)


def evaluated(python, models, folder, *arguments, **variables):
    """Runs VLMEvalKit on the table: accuracy and answers of each model, and what it printed."""
    config = {
        "model": models,
        "data": {"TinyDigits": {"class": "CustomMCQDataset", "dataset": "TinyDigits"}},
    }
    (folder / "mine.json").write_text(json.dumps(config))
    said = run(
        [
            *(python, "-m", "grpo_latent.harnesses.vlmevalkit", "--config", "mine.json"),
            *("--work-dir", folder / "out", "--judge", "exact_matching", *arguments),
        ],
        folder,
        LMUData=str(folder / "LMUData"),
        PRED_FORMAT="tsv",
        **variables,
    )
    results = {}
    for name in models:
        (scores,) = folder.glob(f"out/{name}/*_acc.csv")
        (row,) = csv.DictReader(scores.read_text().splitlines())
        with open(folder / "out" / name / f"{name}_TinyDigits.tsv", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        by_index = {int(row["index"]): row["prediction"] for row in rows}
        results[name] = float(row["Overall"]), [by_index[number] for number in range(18)]
    return results, said


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
    results, said = evaluated(python, {"tiny": model}, tmp_path)
    accuracy, answers = results["tiny"]
    assert accuracy == pytest.approx(questions.accuracy), said[-2000:]
    assert accuracy == pytest.approx(our_evaluation(questions)["greedy"]["accuracy"])
    assert answers == questions.said


def its_prompt(question):
    """What VLMEvalKit makes of a row, where no template says otherwise."""
    options = "".join(f"{LETTERS[number]}. {number}\n" for number in range(10))
    closing = "Please select the correct answer from the options above. \n"
    return f"Question: {question}\nOptions:\n{options}{closing}"


def as_jpeg(image):
    """What its OpenAI classes send of an image."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.mark.vllm
def test_a_served_checkpoint_scores_as_our_evaluation(tmp_path):
    """`grpo_latent.serve`, and as its client our class of VLMEvalKit's and VLMEvalKit's own."""
    python = python_of("vlmevalkit")
    questions = make_questions(tmp_path, its_prompt, as_jpeg)
    assert len(set(questions.said)) > 1 and 0 < questions.accuracy < 1
    write_vlmevalkit_table(questions, tmp_path / "LMUData")
    flags = ("--dtype", "float32", "--max-model-len", "256", "--enforce-eager")
    with served(tmp_path / "model", tmp_path, *flags) as address:
        client = {"model": str(tmp_path / "model"), "api_base": address, "key": "none"}
        client |= {"max_tokens": NEW_TOKENS, "temperature": 0, "retry": 1}
        models = {
            "ours": client | {"class": "GrpoLatentServed"},
            "theirs": client | {"class": "GPT4V", "img_size": -1},
        }
        # smaller images would be enlarged
        results, said = evaluated(
            python, models, tmp_path, "--api-nproc", "4", VLMEVAL_MIN_IMAGE_EDGE="1"
        )
    accuracy = our_evaluation(questions)["greedy"]["accuracy"]
    for name in models:
        assert results[name][1] == questions.said, said[-2000:]
        assert results[name][0] == pytest.approx(accuracy)
