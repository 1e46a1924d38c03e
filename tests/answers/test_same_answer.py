"""Pairs of answers with what a careful person says of them: for the reward and for the graders.

Not covered: number words, other languages, conversions between temperatures or currencies.
"""

import pytest
from answer_pairs import PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_latent.answers import peel, same_answer, unmark
from grpo_latent.answers.units import parse_unit
from grpo_latent.eval.graders import grade
from reward.accuracy import compute_score, equal_as_maths

CASES = [(kind, *pair) for kind, pairs in PAIRS.items() for pair in pairs]
OPTIONS = ["B", "(B)", "B.", "B)", "[B]", "**B**", "**(B).**", "$B$", r"$\boxed{B}$", r"\text{B}"]
OPTIONS += ["option B", "Option (B)", "\uff08B\uff09\u3002", "\uff22", "B\u200b"]
OPTIONS += [r"\boxed{\text{B}}", "`B`", '"B"', r"\(B\)", "**B.**", r"$\mathrm{B}$.", "*B*", "_B_"]
STATED = ["The answer is {}", "The answer is {}.", "**The answer is {}.**", "**Answer:** {}"]
STATED += ["Answer: {}", "### Answer: {}", "**Final Answer:** {}.", "__Answer:__ {}"]
STATED += ["Answer\uff1a{}", "The answer is :{}", "The answer is\n{}", "**Answer:**\n\n{}"]
STATED += ["The best answer is {}", "> The answer is {}", "- The answer is {}"]
STATED += ["*The answer is {}*", "It is red.\n**Answer: {}**"]


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """The first formula loads sympy, which takes more than two seconds on a busy machine."""
    monkeypatch.setattr("reward.accuracy.MATH_TIMEOUT_S", 60)


def test_there_are_enough_pairs_of_each_kind_and_verdict():
    assert len(CASES) >= 150 and len(set(CASES)) == len(CASES)
    verdicts = [case[-1] for case in CASES]
    assert 60 <= sum(verdicts) <= len(CASES) - 60


@pytest.mark.parametrize(("kind", "gold", "answer", "equal"), CASES)
def test_pair(kind, gold, answer, equal):
    assert same_answer(gold, answer, equal_as_maths) == bool(equal)
    assert same_answer(answer, gold, equal_as_maths) == bool(equal)
    assert compute_score("x", f"<answer> {answer} </answer>", gold) == equal
    assert compute_score("x", f"So the answer is {answer}", gold, variant="stated") == equal


@pytest.mark.parametrize(
    ("kind", "gold", "answer", "equal"),
    [case for case in CASES if case[0] not in ("maths", "letters")],
)
def test_pair_as_an_options_text(kind, gold, answer, equal):
    """Graders take a text for an option under the same rule."""
    result = grade(f"<answer> {answer} </answer>", (gold, "none of these"), "A")
    assert result.correct == bool(equal) and result.answer in ("A", None)


@pytest.mark.parametrize("answer", OPTIONS)
@pytest.mark.parametrize("statement", [*STATED, "<answer> {} </answer>", "{}"])
def test_an_option_under_any_marks(statement, answer):
    completion = statement.format(answer)
    assert grade(completion, ("Open", "Closed"), "B").correct
    if statement != "{}":
        variant = "tags" if statement.startswith("<") else "stated"
        assert compute_score("x", completion, "B", variant=variant) == 1.0
        assert compute_score("x", completion, "A", variant=variant) == 0.0


MARKS = st.sampled_from(
    ["**{}**", "${}$", "{}.", r"\boxed{{{}}}", r"\text{{{}}}", "`{}`", '"{}"', r"\({}\)", " {}\n"]
)


@given(st.lists(MARKS, max_size=6, unique=True), st.sampled_from(["B", "left", "7", "red car"]))
def test_marks_come_off_in_any_order(marks, answer):
    text = answer
    for mark in marks:
        text = mark.format(text)
    assert peel(text) == answer


PIECES = st.sampled_from(
    r"""5 0 . , - / : $ % ^ { } ( ) \ = x * cm km not left pm \frac \text \boxed ° − 1e ٣ ' "
    _ per square million ² < | 1/0 e999""".split()
    + [" ", "\n", "\x00"]
)
TEXTS = st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=14).map("".join))


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_peeling_is_idempotent_and_a_text_equals_itself(text):
    assert peel(peel(text)) == peel(text)
    assert same_answer(text, text) and same_answer(text, peel(text))
    unmark(text)


@settings(max_examples=400, deadline=None)
@given(TEXTS, TEXTS)
def test_comparing_is_symmetric_and_never_raises(first, second):
    assert same_answer(first, second) == same_answer(second, first)


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_no_answer_makes_the_reward_raise(text):
    assert compute_score("x", f"<answer>{text}</answer>", "5 cm") in (0.0, 1.0)
    assert compute_score("x", f"<answer>{text}</answer>", r"\sqrt{2}") in (0.0, 1.0)


@pytest.mark.parametrize("text", ["$" * 10**5, "{" * 10**5, "5 " * 10**5, "a b" * 900, "1," * 900])
def test_long_answers_take_no_time(text):  # by a quadratic pattern they would take hours
    assert not same_answer(text, "5", equal_as_maths)


def test_a_unit_is_a_quantity():
    assert parse_unit(["km/h"]) == parse_unit(["kilometers", "per", "hour"])
    assert parse_unit(["square", "feet"]) == parse_unit(["ft^2"])
    assert parse_unit(["apples"]) is None and parse_unit(["m", "/", "s", "/", "s"]) is None
