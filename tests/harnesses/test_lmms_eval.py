"""lmms-eval 0.7.3 itself, in its own environment, on a task that is built from a local file."""

import json

import pytest
from harness_cases import (
    NEW_TOKENS,
    ROOT,
    make_questions,
    needs_vllm,
    our_evaluation,
    python_of,
    run,
    write_lmms_task,
)

pytestmark = pytest.mark.slow


def test_our_model_inside_lmms_eval(tmp_path):
    python = python_of("lmms-eval")
    tests = ROOT / "tests" / "harnesses" / "inside_lmms_eval.py"
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, "-c", "/dev/null"]
    model = ROOT / "grpo_latent" / "harnesses" / "lmms_eval_model.py"
    said = run([python, "-m", "pytest", *options, "--doctest-modules", tests, model], tmp_path)
    assert "passed" in said


ENGINES = {"hf": "", "vllm": ",max_model_len=128,enforce_eager=True"}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_task_of_a_local_file_scores_as_our_evaluation(engine, tmp_path):
    """Row by row: the same answers, so the same accuracy; the task's bound of one token is raised."""
    command = python_of("lmms-eval").parent / "lmms-eval"
    if engine == "vllm":
        needs_vllm(python_of("lmms-eval"))
    questions = make_questions(tmp_path)
    write_lmms_task(questions, tmp_path / "task")
    arguments = f"pretrained={tmp_path / 'model'},min_new_tokens={NEW_TOKENS},engine={engine}"
    arguments += ENGINES[engine]
    said = run(
        [
            command,
            *("--model", "grpo_latent", "--model_args", arguments),
            *("--tasks", "tiny_digits", "--include_path", tmp_path / "task"),
            *("--batch_size", "5", "--log_samples", "--output_path", tmp_path / "out"),
        ],
        tmp_path,
        VLLM_CPU_KVCACHE_SPACE="1",
    )
    assert (
        f"the task allows 1 new tokens, which latents and answer tags would fill; {NEW_TOKENS}"
        in said
    )
    (results,) = tmp_path.glob("out/*/*_results.json")
    accuracy = json.loads(results.read_text())["results"]["tiny_digits"]["exact,none"]
    assert accuracy == pytest.approx(questions.accuracy)
    assert accuracy == pytest.approx(our_evaluation(questions)["greedy"]["accuracy"])
    (samples,) = tmp_path.glob("out/*/*_samples_tiny_digits.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["filtered_resps"] for row in rows] == questions.said
    assert all(row["token_counts"] == [{"output_tokens": NEW_TOKENS}] for row in rows)
