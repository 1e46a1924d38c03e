"""`reward/accuracy.py` against answers judged by hand."""

import threading

import pytest

from grpo_latent.errors import ConfigError, DataError, RewardError
from reward.accuracy import answer_text, compute_score


def score(answer, truth):
    return compute_score("geometry", f"<answer> {answer} </answer>", truth, {"index": 3})


@pytest.mark.parametrize(
    "answer, truth",
    [
        ("4", "4"),
        ("4.0", "4"),
        ("4", 4),
        ("0.5", 0.5),
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "0.5"),
        ("0.5", r"\boxed{\frac{1}{2}}"),
        ("50%", "0.5"),
        ("1,234", "1234"),
        (r"$1\,200$", "1200"),
        (r"$1\,234\,567$", "1234567"),
        (r"12\ 000", "12000"),
        ("12{,}000", "12000"),
        ("12\u202f000", "12000"),
        ("12'000", "12000"),
        ("−5", "-5"),
        ("x = 4", "4"),
        ("12", "12 cm"),
        ("B", "B"),
        ("(b)", "B"),
        ("B.", r"\boxed{B}"),
        ("Red  car.", "red car"),
        ("12:30", "12:30"),
        ("七", "七"),
    ],
)
def test_equal(answer, truth):
    assert score(answer, truth) == 1.0


@pytest.mark.parametrize(
    "answer, truth",
    [
        ("5", "4"),
        ("A", "B"),
        ("", "4"),
        ("4 or 5", "4"),
        ("12:45", "12:30"),
        ("3 apples and 2 pears", "3 apples and 5 pears"),
        ("3", "3 apples and 2 pears"),
        ("red", "green"),
        ("4" * 5000, "4"),
        ("2^{10}", "4"),
        # math-verify 0.9.0 reads groups of thousands as sums and products
        (r"$1\,200$", "201"),
        (r"$12\,000$", "0"),
        (r"$1\,234\,567$", "802"),
        ("−5", "5"),
    ],
)
def test_different(answer, truth):
    assert score(answer, truth) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "<answer> 4",
        "4 </answer>",
        "</answer> 4 <answer>",
        "<answer>4</answer><answer>4</answer>",
        "<answer><answer>4</answer></answer>",
        "<answer>5 <answer>4</answer>",
        "<answer>4</answer> 5</answer>",
        "&lt;answer&gt;4&lt;/answer&gt;",
        "<ANSWER>4</ANSWER>",
    ],
)
def test_only_one_pair_of_tags_is_an_answer(text):
    assert answer_text(text) is None
    assert compute_score("x", text, "4") == 0.0


def test_answer_may_span_lines_and_stand_anywhere():
    assert compute_score("x", "first\n<answer>\n 4 \n</answer> done", "4") == 1.0


@pytest.mark.parametrize(
    "truth", [None, "", "  ", "\\boxed{}", [], ["4"], {"a": 1}, True, float("nan"), float("inf")]
)
def test_malformed_ground_truth_is_an_error_that_names_the_row(truth):
    with pytest.raises(DataError, match=r"'geometry', row 3.*ground_truth"):
        score("4", truth)


@pytest.mark.parametrize("text", [None, 4, b"<answer>4</answer>", ["<answer>4</answer>"]])
def test_solution_that_is_no_text_is_an_error(text):
    with pytest.raises(RewardError, match="no text") as caught:
        compute_score("x", text, "4")
    assert caught.value.kind == "type"


@pytest.mark.parametrize(
    "text, right",
    [
        ("Look at it.And then there.The answer is B.", 1),
        ("so Answer: B", 1),
        ("The answer is A. No, the final answer is: **B**.", 1),
        ("**The answer is (B).**", 1),
        ("The answer is\n\\boxed{B}", 1),
        ("The answer is A. The answer is B because A is blue.", 0),
        ("The answer is B or A", 0),
        ("The answer is B. The answer is A.", 0),
        ("The answer is not B", 0),
        ("The answer isn't known, B", 0),
        ("B", 0),
        ("<answer> B </answer>", 0),
        ("The answer is", 0),
        ("", 0),
    ],
)
def test_a_stated_answer_closes_the_completion(text, right):
    assert compute_score("comt", text, "B", {"index": 3}, variant="stated") == right
    assert (
        compute_score("comt", text, "B", {"latent": {"stop_reason": "length"}}, variant="stated")
        == 0
    )


def test_stated_answers_are_compared_as_maths_and_only_where_asked_for():
    assert compute_score("x", "The answer is 1/2.", "0.5", variant="stated") == 1.0
    assert compute_score("x", "The answer is 1/2.", "0.5") == 0.0
    with pytest.raises(ConfigError, match="kwargs.variant: unknown form; got boxed"):
        compute_score("x", "7", "7", variant="boxed")


def test_works_outside_the_main_thread():
    """math-verify's own time-outs are signals, which raise ValueError in any other thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(score("1/2", "0.5")))
    thread.start()
    thread.join()
    assert results == [1.0]
