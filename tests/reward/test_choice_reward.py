"""`reward/choice.py` against completions judged by hand."""

import pytest

from grpo_latent.errors import DataError, RewardError
from reward.choice import compute_score


@pytest.mark.parametrize(
    "text, accuracy, form",
    [
        ("Therefore, the answer is B", 1, 1),
        ("It is red. Therefore, The answer is: (b). ", 1, 1),
        ("Therefore, the answer is **B**.", 1, 1),
        ("**Therefore, the answer is B.**", 1, 1),
        ("Therefore, the answer is $\\boxed{\\text{B}}$.", 1, 1),
        ("Therefore, the answer is A", 0, 1),
        ("the answer is not shown. the answer is B", 0, 0),
        ("Therefore, the answer is B because it is red", 0, 0),
        ("the answer is B. the answer is B", 0, 0),
        ("the answer is Blue", 0, 0),
        ("B", 0, 0),
        ("", 0, 0),
    ],
)
def test_judged_by_hand(text, accuracy, form):
    score = compute_score("m3cot", text, "B", {"index": 3})
    assert score == {"score": accuracy + 0.1 * form, "accuracy": accuracy, "format": form}


def test_a_completion_cut_off_has_no_form():
    latent = {"stop_reason": "length"}
    assert compute_score("m3cot", "the answer is B", "B", {"latent": latent})["score"] == 0


def test_what_cannot_be_scored_is_an_error():
    with pytest.raises(
        DataError, match="row 3, reward_model.ground_truth: the ground truth is no letter"
    ):
        compute_score("m3cot", "the answer is B", "42", {"index": 3})
    with pytest.raises(RewardError, match="no text"):
        compute_score("m3cot", None, "B")
