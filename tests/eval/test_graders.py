"""Completions as models write them, with the grade that a careful person would give.

Not covered: other languages.
"""

import pytest

from grpo_latent.errors import DataError
from grpo_latent.eval.graders import committed_answer, grade, grade_option, pair_accuracy

OPEN = ("Open", "Closed")  # MMVP
COLORS = ("red", "blue", "dark red", "green")  # V*, HRBench
DEPTH = ("A is closer", "B is closer")  # BLINK Relative_Depth
LETTER_TEXTS = ("B", "A")  # an option whose text is another option's letter
SCIENCE = (
    "an insulator",
    "a conductor",
    "neither an insulator nor a conductor",
)  # ScienceQA, M3CoT
NUMBER: tuple[str, ...] = ()  # the embedded task

# (completion, options, truth, expected answer or None for unparsed, expected grade)
CASES = [
    # right, in the forms that the benchmarks' own prompts ask for
    ("(a)", OPEN, "A", "A", True),
    ("b", OPEN, "B", "B", True),
    ("B", OPEN, "B", "B", True),
    ("B.", OPEN, "B", "B", True),
    ("(B)<|im_end|>", OPEN, "B", "B", True),
    ("Closed", OPEN, "B", "B", True),
    ("closed.", OPEN, "B", "B", True),
    ("(b) Closed", OPEN, "B", "B", True),
    ("B. Closed.", OPEN, "B", "B", True),
    ("B: Closed", OPEN, "B", "B", True),
    ("<answer> B </answer>", OPEN, "B", "B", True),
    ("<answer>(b)</answer>", OPEN, "B", "B", True),
    ("The lid is up. <answer> A </answer><|im_end|>", OPEN, "A", "A", True),
    ("<answer> The answer is A. </answer>", OPEN, "A", "A", True),
    ("The answer is (B).", OPEN, "B", "B", True),
    ("So, the correct answer is: B", OPEN, "B", "B", True),
    ("Looking at the handle, the answer is A.", OPEN, "A", "A", True),
    ("It points left.\n\nAnswer: A", OPEN, "A", "A", True),
    ("Answer:B", OPEN, "B", "B", True),
    ("**B**", OPEN, "B", "B", True),
    ("$\\boxed{B}$", OPEN, "B", "B", True),
    ("Therefore \\boxed{\\text{Closed}}", OPEN, "B", "B", True),
    ("Option B", OPEN, "B", "B", True),
    ("The final answer is option (a).", OPEN, "A", "A", True),
    (
        "First I thought B.\nThe answer is A.",
        OPEN,
        "A",
        "A",
        True,
    ),  # revised: the last line commits
    ("dark red", COLORS, "C", "C", True),
    ("(D) green", COLORS, "D", "D", True),
    ("A is closer", DEPTH, "A", "A", True),
    ("The answer is B is closer.", DEPTH, "B", "B", True),
    ("neither an insulator nor a conductor", SCIENCE, "C", "C", True),
    ("Metal conducts.\nThe answer is B.", SCIENCE, "B", "B", True),
    ("<answer> 7 </answer>", NUMBER, "7", "7", True),
    (" <answer> 12 </answer><|im_end|>", NUMBER, "12", "12", True),
    ("7", NUMBER, "7", "7", True),
    ("The answer is 7.", NUMBER, "7", "7", True),
    ("<answer>-3</answer>", NUMBER, "-3", "-3", True),
    # wrong, and parsed as such
    ("A", OPEN, "B", "A", False),
    ("Open", OPEN, "B", "A", False),
    ("<answer> A </answer>", OPEN, "B", "A", False),
    ("The answer is not shown.\nThe answer is A.", OPEN, "B", "A", False),
    ("red", COLORS, "C", "A", False),  # contained in the right option's text
    ("The answer is B.\nThe answer is A.", OPEN, "B", "A", False),
    ("an insulator", SCIENCE, "C", "A", False),
    ("<answer> 17 </answer>", NUMBER, "7", "17", False),  # contains the right digit
    ("<answer> 70 </answer>", NUMBER, "7", "70", False),
    ("<answer>-7</answer>", NUMBER, "7", "-7", False),
    # adversarial: a lenient grader gives these a point
    ("A B C D", COLORS, "C", None, False),
    ("A or B", OPEN, "B", None, False),
    ("A, B", OPEN, "B", None, False),
    ("The answer is A or B.", OPEN, "B", None, False),
    ("The answer is not A.", OPEN, "A", None, False),
    ("It cannot be B", OPEN, "B", None, False),
    ("The answer is A, because B is wrong.", OPEN, "A", None, False),
    ("A bottle stands on the table.", OPEN, "A", None, False),  # the article, not the option
    ("I see a B-52 bomber", OPEN, "B", None, False),
    ("Because", OPEN, "B", None, False),  # begins with the letter
    ("The door is Closed, I mean Open", OPEN, "A", None, False),
    ("(a) Closed", OPEN, "A", None, False),  # letter and text contradict each other
    ("(b) Open", OPEN, "B", None, False),
    ("<answer> A </answer> <answer> B </answer>", OPEN, "B", None, False),
    ("<answer> B", OPEN, "B", None, False),
    ("B </answer>", OPEN, "B", None, False),
    ("</answer> B <answer>", OPEN, "B", None, False),
    ("<answer> A <answer> B </answer></answer>", OPEN, "B", None, False),
    ("<answer></answer>", OPEN, "A", None, False),
    ("<answer> A B </answer>", OPEN, "A", None, False),
    ("B <answer> unsure </answer>", OPEN, "B", None, False),  # the tags win, and hold no option
    ("\\boxed{A} \\boxed{B}", OPEN, "B", None, False),
    ("", OPEN, "A", None, False),
    ("   \n", OPEN, "A", None, False),
    ("C", OPEN, "B", None, False),  # there is no C
    ("1", OPEN, "A", None, False),
    ("A", LETTER_TEXTS, "A", None, False),  # option A, or the text of option B?
    ("<answer> 7 8 </answer>", NUMBER, "7", None, False),
    ("7 <answer> 8 7 </answer>", NUMBER, "7", None, False),
    ("1 2 3 4 5 6 7 8 9", NUMBER, "7", None, False),
    ("<answer> seven </answer>", NUMBER, "7", None, False),
    ("<answer> 7.0 </answer>", NUMBER, "7", None, False),
    ("<answer> 3 + 4 </answer>", NUMBER, "7", None, False),
    ("<answer> 7 or 8 </answer>", NUMBER, "7", None, False),
    (f"<answer>{'9' * 5000}</answer>", NUMBER, "9", None, False),  # int() of it raises
    ("<answer>٧</answer>", NUMBER, "7", None, False),  # a digit of another script
]


@pytest.mark.parametrize(("completion", "options", "truth", "answer", "correct"), CASES)
def test_grade(completion, options, truth, answer, correct):
    result = grade(completion, options, truth)
    assert (result.answer, result.correct) == (answer, correct)
    assert ("unparsed" in result.reason) == (answer is None)


def test_there_are_enough_cases_and_both_grades():
    grades = [case[-1] for case in CASES]
    assert len(CASES) >= 60 and 30 <= sum(grades) <= len(CASES) - 30


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_parsing_does_not_see_the_truth(case):
    """A completion is parsed alike whatever the truth is: at most one truth can be right."""
    completion, options, _, answer, _ = case
    truths = "ABCDEFG"[: len(options)] if options else [str(n) for n in range(-20, 120)]
    grades = [grade(completion, options, truth) for truth in truths]
    assert {g.answer for g in grades} == {answer}
    assert sum(g.correct for g in grades) == (answer is not None)


def test_long_completions_are_graded():  # by a quadratic pattern they would take hours
    for text in (
        "\n" * 200_000,
        "answer is ," * 20_000,
        "the answer is " * 20_000,
        "(" * 200_000,
        "<answer>" * 50_000,
    ):
        assert not grade(text + "x", OPEN, "A").correct


def test_special_tokens_are_no_answer():
    assert committed_answer("<|lvr_start|><|lvr|><|lvr_end|> B <|im_end|>") == "B"


@pytest.mark.parametrize(
    ("options", "truth"), [(OPEN, "C"), (OPEN, ""), (OPEN, "(A)"), (OPEN, "AB"), ((), "seven")]
)
def test_a_truth_that_does_not_fit_is_refused(options, truth):
    with pytest.raises(DataError, match="truth"):
        grade("A", options, truth)


def test_a_completion_that_is_no_text_is_refused():
    with pytest.raises(DataError, match="no text"):
        grade(None, OPEN, "A")


def test_pair_accuracy():
    assert pair_accuracy([1, 1, 0, 1, 0, 0], ["a", "a", "b", "b", "c", "c"]) == pytest.approx(
        1 / 3
    )
    with pytest.raises(DataError, match="two questions a pair"):
        pair_accuracy([1, 1, 1], ["a", "a", "b"])
    with pytest.raises(DataError, match="differ in number"):
        pair_accuracy([1, 1], ["a"])


def test_option_reason_names_both():
    assert grade_option("A", OPEN, "B").reason == "answered A, truth B"
