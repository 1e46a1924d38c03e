"""`reward/digits.py`: 1 for the digit, 0.1 for the form."""

import pytest

from grpo_latent.errors import ConfigError, DataError, RewardError
from reward.digits import compute_score


def score(text, truth="7", spans=(0,), stop_reason="eos", **kwargs):
    latent = {"num_spans": len(spans), "span_offsets": list(spans), "stop_reason": stop_reason}
    result = compute_score("digits", text, truth, {"index": 5, "latent": latent}, **kwargs)
    assert result["score"] == pytest.approx(result["accuracy"] + 0.1 * result["format"])
    return result["accuracy"], result["format"]


@pytest.mark.parametrize(
    "text, spans, expected",
    [
        ("<answer> 7 </answer>", (0,), (1, 1)),
        (" <answer>7</answer> ", (0, 0), (1, 1)),
        ("<answer> 8 </answer>", (0,), (0, 1)),
        ("<answer> red </answer>", (0,), (0, 1)),
        ("<answer> 77 </answer>", (0,), (0, 1)),
        ("<answer> 7 </answer>", (), (1, 0)),  # right without a span: blind, if the mask holds
        ("<answer> 7 </answer>", (20,), (1, 0)),
        (
            "7 <answer> 7 </answer>",
            (0,),
            (0, 0),
        ),  # the first token is predicted with the image in sight
        ("<answer> 7 </answer> 7", (0,), (0, 0)),
        ("<answer> 7 </answer><answer> 7 </answer>", (0,), (0, 0)),
        ("<answer> </answer>", (0,), (0, 0)),
        ("7", (0,), (0, 0)),
        ("", (), (0, 0)),
    ],
)
def test_cases(text, spans, expected):
    assert score(text, spans=spans) == expected


def test_cut_by_the_length_limit_scores_nothing():
    assert score("<answer> 7 </answer>", stop_reason="length") == (0, 0)


def test_text_variant_asks_for_no_span_and_allows_text_before_the_answer():
    assert score("it is red <answer> 7 </answer>", spans=(), variant="text") == (1, 1)
    assert score("<answer> 7 </answer> it is", spans=(), variant="text") == (0, 0)


STEPS = ("red at r0 c1 is 7", "blue at r2 c3 is 3")


@pytest.mark.parametrize(
    "text, spans, expected",
    [
        ("at red 7 at blue 3 <answer> 7 </answer>", (6, 16), (1, 1)),
        ("at red 12 at blue 0 <answer> 7 </answer>", (6, 17), (1, 1)),  # only the answer is known
        ("at red 7 at blue 3 <answer> 8 </answer>", (6, 16), (0, 1)),
        (
            "at blue 7 at red 3 <answer> 7 </answer>",
            (7, 16),
            (0, 0),
        ),  # the order would carry a bit past the latents
        ("red 7 blue 3 <answer> 7 </answer>", (3, 10), (0, 0)),
        ("at red 7 <answer> 7 </answer>", (6,), (0, 0)),
        ("at red 7 at blue 3 <answer> 7 </answer>", (6,), (0, 0)),
        ("at red 7 at blue 3 <answer> 7 </answer>", (0, 16), (0, 0)),
        ("at red 7 at blue 3 <answer> 7 </answer>", (8, 18), (0, 0)),
        ("at red 7 at blue 3 at red 1 <answer> 7 </answer>", (6, 16, 25), (0, 0)),
        ("7 at red 7 at blue 3 <answer> 7 </answer>", (8, 18), (0, 0)),
    ],
)
def test_interleaved_variant_wants_each_colour_its_span_and_a_number(text, spans, expected):
    latent = {"num_spans": len(spans), "span_offsets": list(spans), "stop_reason": "eos"}
    result = compute_score(
        "digits", text, "7", {"index": 5, "latent": latent, "steps": STEPS}, variant="interleaved"
    )
    assert (result["accuracy"], result["format"]) == expected


def test_interleaved_variant_needs_the_steps():
    with pytest.raises(DataError, match="row 5, extra_info.steps: no steps"):
        score("at red 7 <answer> 7 </answer>", variant="interleaved")


@pytest.mark.parametrize("truth", [0, "0", " 3 ", 9])
def test_ground_truth_may_be_text_or_int(truth):
    assert score(f"<answer> {truth} </answer>", truth) == (1, 1)


@pytest.mark.parametrize("truth", [None, "", "10", 10, -1, "seven", 7.0, True, ["7"], "٧"])
def test_malformed_ground_truth_is_an_error(truth):
    with pytest.raises(DataError, match="row 5.*ground_truth"):
        score("<answer> 7 </answer>", truth)


def test_other_malformed_input():
    with pytest.raises(ConfigError, match="variant"):
        score("", variant="ilvr")
    with pytest.raises(RewardError, match="no text"):
        score(None)
    with pytest.raises(RewardError, match="latent summary"):
        compute_score("digits", "", "7", {"index": 0})
