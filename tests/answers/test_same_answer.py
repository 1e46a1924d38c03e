"""Pairs of answers with what a careful person says of them: for the reward and for the graders.

Not covered: number words, other languages, conversions between temperatures or currencies.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_latent.answers import peel, same_answer, unmark
from grpo_latent.answers.units import parse_unit
from grpo_latent.eval.graders import grade
from reward.accuracy import compute_score, equal_as_maths

# kind -> (gold, answer, are they the same)
PAIRS = {
    "units": [
        ("10 km", "10 m", 0),
        ("100 m", "100 cm", 0),
        ("1 m", "100 cm", 1),
        ("1 km", "1000 m", 1),
        ("5 cm", "5 mm", 0),
        ("5 kg", "5 g", 0),
        ("5 kg", "5000 grams", 1),
        ("5 kilograms", "5 kg", 1),
        ("12 cm", "12", 1),
        ("12", "12 cm", 1),
        ("60 seconds", "1 minute", 1),
        ("60 seconds", "60 minutes", 0),
        ("90 min", "1 hour 30 minutes", 1),
        ("1 hour 30 minutes", "1 hour 20 minutes", 0),
        ("72 km/h", "20 m/s", 1),
        ("72 km/h", "72 m/s", 0),
        ("5 meters per second", "5 m/s", 1),
        ("5 cm^2", "5 cm\u00b2", 1),
        ("5 square centimeters", r"5\text{ cm}^2", 1),
        ("5 cm^2", "5 cm", 0),
        ("25 \u00b0C", "25 \u2103", 1),
        ("77 \u2109", "77 \u00b0F", 1),
        ("25 \u2109", "25 \u2103", 0),
        ("5 cm^3", "5 ml", 1),
        ("5 MW", "5 mW", 0),
        (r"5\text{ cm}", "5 cm", 1),
        (r"5\,\mathrm{cm}", "50 mm", 1),
        (r"\text{5 m}", "5 m", 1),
        ("1 foot", "12 inches", 1),
        ("1 mile", "1 km", 0),
        (r"90^\circ", "90 degrees", 1),
        ("90\u00b0", "90", 1),
        ("90 degrees", "90 radians", 0),
        ("20 \u00b0C", "20 degrees Celsius", 1),
        ("20 \u00b0C", "20 \u00b0F", 0),
        ("5 apples", "5 cm", 0),
        ("3 apples", "3 pears", 0),
        ("1 apple", "1 apples", 1),
        ("3 apples", "3", 1),
        ("5 kWh", "18 MJ", 1),
        ("5 kWh", "5 kW", 0),
        ("10 Mb", "10 MB", 0),
        ("10 GB", "10 MB", 0),
        ("5 KB", "5 kb", 1),
        ("9.8 m/s^2", r"9.8\,\mathrm{m\,s^{-2}}", 1),
        ("9.8 m/s^2", "9.8 m/s", 0),
        ("5 c", "5 cents", 0),
    ],
    "money and percent": [
        (r"\$5", "5", 1),
        ("5", r"\$5", 1),
        ("$5", "5 dollars", 1),
        ("USD 5", "$5", 1),
        ("$5", "\u20ac5", 0),
        ("5 euros", "\u20ac5", 1),
        ("$1", "100 cents", 1),
        ("$5", "5 cents", 0),
        ("-$5", "$5", 0),
        ("$1,200.50", "1200.5 dollars", 1),
        (r"50\%", "0.5", 1),
        ("0.5", r"50\%", 1),
        ("50%", "50 percent", 1),
        ("50%", "50", 1),
        ("50%", "5", 0),
        ("5%", "0.5", 0),
        ("50%", "50 m", 0),
        ("150%", "1.5", 1),
        ("5 %", "5\u2030", 0),
        ("0.5 %", "5\u2030", 1),
        ("$5M", "$5 million", 1),
        ("\u20ac2.5bn", "\u20ac2500 million", 1),
        ("$5M", "$5", 0),
        ("US$5", "$5", 1),
        ("HK$5", "US$5", 0),
    ],
    "numbers": [
        ("100000", "1e5", 1),
        ("1e5", "100000", 1),
        ("1.5e-3", "0.0015", 1),
        ("1e5", "1e6", 0),
        ("10^5", "10", 0),
        ("1e-7", "2e-7", 0),
        (r"2\times10^3", "2000", 1),
        (r"2 \times 10^{-3}", "0.002", 1),
        ("2 \u00d7 10^3", "200", 0),
        ("007", "7", 1),
        ("7", "007", 1),
        ("070", "7", 0),
        ("1,234", "1234", 1),
        (r"12\,000", "12000", 1),
        ("12'000", "12000", 1),
        ("1,234.50", "1234.5", 1),
        ("4.0", "4", 1),
        ("4.", "4", 1),
        (".5", "0.5", 1),
        ("+5", "5", 1),
        ("\u22125", "-5", 1),
        ("-5", "minus 5", 1),
        ("-5", "5", 0),
        ("1/2", "0.5", 1),
        (r"\frac{1}{2}", "1/2", 1),
        (r"-\frac{1}{2}", "-0.5", 1),
        ("1 1/2", "1.5", 1),
        (r"1\frac{1}{2}", "1.5", 1),
        ("1/3", "0.333333", 1),
        ("1/3", "0.33", 0),
        ("5 million", "5000000", 1),
        ("5 million", "5", 0),
        ("5k", "5000", 1),
        ("5 thousand", "5 million", 0),
        ("2 dozen eggs", "24 eggs", 1),
        ("5", "50", 0),
        ("4", "4 or 5", 0),
        ("\uff17", "7", 1),
        ("\uff11\uff12\u3002", "12", 1),
        ("#5", "5", 1),
        ("No. 5", "5", 1),
        ("No. 5", "6", 0),
    ],
    "times and dates": [
        ("3 pm", "3 am", 0),
        ("3 am", "3 pm", 0),
        ("3 p.m.", "3pm", 1),
        ("12:30 PM", "12:30 pm", 1),
        ("12:30 pm", "12:30 am", 0),
        ("12:30", "12:45", 0),
        ("12:30", "12", 0),
        ("12:30", "1230", 0),
        ("12:30", "12 : 30", 1),
        ("2024-01-05", "2018", 0),
        ("2024-01-05", "2024-01-05", 1),
        ("2024-01-05", "2024-05-01", 0),
        ("1/2/2024", "2/1/2024", 0),
        ("March 5", "5 March", 1),
        ("March 5", "April 5", 0),
        ("March 5, 2020", "March 5, 2021", 0),
        ("1990-1995", "-5", 0),
        ("1980s", "1980", 0),
        ("the 1980s", "1980s", 1),
        ("60 s", "60", 1),
        ("3600 s", "3600s", 1),
        ("1 hour", "3600s", 1),
        ("30 minutes", "1800s", 1),
        ("the 1800s", "1800", 0),
    ],
    "identifiers": [
        ("555-1234", "-679", 0),
        ("555-1234", "555-1234", 1),
        ("555-1234", "555\u20131234", 1),
        ("555-1234", "5551234", 0),
        ("8-9", "-1", 0),
        ("8-9", "8 - 9", 1),
        ("8-9", "9-8", 0),
        ("3:2", "1.5", 0),
        ("3:2", "6:4", 0),
        ("3-1", "2", 0),
        ("1.10.2", "1.1.2", 0),
        ("v1.10", "v1.1", 0),
        ("version 1.10", "version 1.1", 0),
        ("Python 3.10", "Python 3.1", 0),
        ("192.168.0.1", "192.168.0.10", 0),
        ("B2", "2", 0),
        ("B2", "b2", 1),
        ("10-15 cm", "10-15 mm", 0),
        ("10-15 cm", "10-15", 1),
        ("(555) 123-4567", "-4444", 0),
        ("1, 2, 3", "1,2,3", 1),
        ("1, 2, 3", "3, 2, 1", 0),
        ("1, 2", "1.2", 0),
        ("1, 2", "1 and 2", 1),
        ("1, 2, 3", "1, 2, and 3", 1),
        ("1, 2", "2 and 1", 0),
        ("5-10", "5 to 10", 1),
        ("5-10", "5~10", 1),
        ("5-10", "7", 0),
        ("5 to 10 cm", "5-10 cm", 1),
        ("5 to 10 cm", "5-10 mm", 0),
    ],
    "directions": [
        ("2 north", "2 south", 0),
        ("2 south", "2 north", 0),
        ("5 degrees left", "5 degrees right", 0),
        ("5 degrees right", "5\u00b0 right", 1),
        ("5 degrees right", "5 degrees", 0),
        ("5 m up", "5 m down", 0),
        ("10 km east", "10 km west", 0),
        ("10 km east", "10000 m east", 1),
        ("3 steps forward", "3 steps backward", 0),
        ("45\u00b0 clockwise", "45\u00b0 counterclockwise", 0),
    ],
    "names": [
        ("red 5", "blue 5", 0),
        ("red 5", "Red 5", 1),
        ("Room 3", "Table 3", 0),
        ("Room 3", "room 3", 1),
        ("Room 3", "Room 4", 0),
        ("Gate A 5", "Gate B 5", 0),
        ("Figure 2", "Table 2", 0),
        ("x = 4", "4", 1),
        ("x = 4", "y = 4", 0),
        ("x = 4", "x = 5", 0),
        ("the area is 5 cm^2", "5 cm^2", 1),
        ("about 5", "5", 1),
        ("3 apples and 2 pears", "3 apples and 5 pears", 0),
        ("3 apples and 2 pears", "3", 0),
        ("Room 3", "3 m", 0),
    ],
    "negation": [
        ("5", "not 5", 0),
        ("not 5", "5", 0),
        ("not 5", "not 5", 1),
        ("5", r"\neq 5", 0),
        ("5", "isn't 5", 0),
        ("5", "no 5", 0),
        ("5", "at least 5", 0),
        ("5", "more than 5", 0),
        ("more than 5", "less than 5", 0),
        ("5", "5 or more", 0),
        ("left", "not left", 0),
        ("5 cm", "not 5 cm", 0),
        ("5", "anything but 5", 0),
        ("5", "almost 5", 0),
        ("5", "hardly 5", 0),
        ("5", "nearly 5", 0),
        ("5", "less 5", 0),
        ("5", "!= 5", 0),
        ("5", r"\not= 5", 0),
        ("5", r"\neg 5", 0),
        ("5", r"\rightarrow 5", 0),
        ("5", "5+", 0),
        ("5", "5-", 0),
    ],
    "texts": [
        ("left", "felt", 0),
        (r"\boxed{left}", r"\boxed{felt}", 0),
        ("left", r"\boxed{felt}", 0),
        ("left", r"\boxed{left}", 1),
        ("stop", "post", 0),
        ("net", "ten", 0),
        ("left", "Left.", 1),
        ("left", r"\text{left}", 1),
        ("red car", "Red  car.", 1),
        ("red car", "car red", 0),
        ("dark red", "red", 0),
        ("left-hand", "left", 0),
        ("yes", "no", 0),
        ("\u4e03", "\u4e03", 1),
        ("\u4e03", "\u516b", 0),
        ("caf\u00e9", "cafe\u0301", 1),
        ("no", "No!", 1),
        ("red, blue", "red,blue", 1),
        ("A, B", "A,B", 1),
        ("A, B", "B, A", 0),
    ],
    "marks": [
        ("left", "**left**", 1),
        ("left", "`left`", 1),
        ("left", '"left"', 1),
        ("left", "\u201cleft.\u201d", 1),
        ("left", r"$\boxed{\text{left}}$.", 1),
        ("left", r"\(\textbf{left}\)", 1),
        ("left", "__left__", 1),
        ("left", "***left***.", 1),
        ("left", "**$left$.**", 1),
        ("7", "**$7$.**", 1),
        ("7", r"\[\boxed{7}\]", 1),
        ("7", r"$$\mathbf{7}$$", 1),
        ("5 cm", r"$5$ \text{cm}", 1),
        ("5 cm", r"\boxed{5\text{ cm}}", 1),
        ("7", r"**\boxed{8}**", 0),
        ("$5 or $6", "5 or 6", 0),
    ],
    # of an option's letter the graders have a table below
    "letters": [
        ("A", "option A", 1),
        ("A", "Choice (A).", 1),
        ("A", "option B", 0),
        ("A", "A or B", 0),
        ("B", "\uff08B\uff09\u3002", 1),
        ("B", "\uff22", 1),
        ("B", "B\u200b", 1),
    ],
    # the graders compare no formulas: options are texts that a completion quotes
    "maths": [
        ("|x| + 1", "1+|x|", 1),
        ("|x-1|", "|1-x|", 1),
        ("|x|", "|x", 0),
        ("5", "= 5", 1),
        (r"\sqrt{4}", "2", 1),
        (r"\sqrt{2}", r"\sqrt{3}", 0),
        ("3 + 4", "7", 1),
        ("3 + 4", "8", 0),
        ("x^2 + 1", "1 + x^2", 1),
        ("x^2 + 1", "x^2 - 1", 0),
        ("5x", "5", 0),
        (r"\frac{\sqrt{4}}{4}", "0.5", 1),
        (r"2\pi\text{ cm}", r"2\pi\text{ m}", 0),
        (r"2\pi\text{ cm}", r"2\pi", 1),
        ("2^{10}", "1024", 1),
        ("2^{10}", "4", 0),
        ("10^5", "100000", 1),
        (r"\{1, 2\}", r"\{2, 1\}", 1),
        ("(3, 4)", "(4, 3)", 0),
        ("x > 5", "5", 0),
        (r"\pm 5", "5", 0),
        ("9^{9^{9}}", "9", 0),
        ("9999999!", "9", 0),
        (r"\leq 5", r"\geq 5", 0),
        (r"\leq 5", "\u2264 5", 1),
        ("< 5", "> 5", 0),
        ("x < 5", "< 5", 1),
        ("5d", "5", 0),
        ("5 c", "5", 0),
        ("1e3", "10^3", 1),
        ("101_2", "101", 0),
        ("101_2", "101_{2}", 1),
        (r"5\uparrow", r"5\downarrow", 0),
        (
            r"\begin{pmatrix}1\\2\end{pmatrix}",
            r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
            1,
        ),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", 0),
        ("f(x)=2x", "2x", 1),
    ],
}
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
