"""What a reward function may return, and the typed failure of everything else."""

import decimal
import fractions
import pickle

import numpy as np
import pytest
import torch

from grpo_latent.errors import RewardError
from grpo_latent.rewards.outcome import normalise, to_error


@pytest.mark.parametrize(
    "result, score",
    [
        (1, 1.0),
        (0.5, 0.5),
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.bool_(True), 1.0),
        (np.array([0.25]), 0.25),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([True]), 1.0),
        (torch.tensor(0.5, requires_grad=True, dtype=torch.bfloat16), 0.5),
        (fractions.Fraction(1, 4), 0.25),
        ({"score": 1}, 1.0),
        ({"score": np.float64(0.5), "pred": "4"}, 0.5),
    ],
)
def test_numbers_of_every_make_are_scores(result, score):
    outcome = normalise(result)
    assert (outcome.kind, outcome.score, type(outcome.score)) == ("ok", score, float)


@pytest.mark.parametrize(
    "result, kind, said",
    [
        (None, "type", "None (NoneType)"),
        ("1.0", "type", "'1.0' (str)"),
        ([1.0], "type", "(list)"),
        ((1.0, 2.0), "type", "(tuple)"),
        (1 + 0j, "type", "(complex)"),
        (decimal.Decimal("1"), "type", "(Decimal)"),
        (np.array([1.0, 2.0]), "type", "(ndarray)"),
        (np.array(["1"]), "type", "(ndarray)"),
        (torch.tensor([1.0, 2.0]), "type", "(Tensor)"),
        (object, "type", "(type)"),
        ({}, "type", "without 'score'"),
        ({"reward": 1.0}, "type", "without 'score'"),
        ({"score": None}, "type", "'score' is None"),
        ({"score": 1.0, "parts": [1]}, "type", "'parts' is [1]"),
        ({"score": 1.0, 3: 1.0}, "type", "the key 3"),
        ({"score": 1.0, "dropped": 1.0}, "type", "the key 'dropped'"),
        (float("nan"), "nan", "nan (float)"),
        (torch.tensor(float("nan")), "nan", "(Tensor)"),
        ({"score": np.nan}, "nan", "'score'"),
        ({"score": 1.0, "part": float("nan")}, "nan", "'part'"),
        (float("inf"), "inf", "inf (float)"),
        (-np.inf, "inf", "-inf"),
        (10**400, "inf", "(int)"),
    ],
)
def test_everything_else_is_a_typed_failure_and_never_a_score(result, kind, said):
    outcome = normalise(result)
    assert outcome.kind == kind and outcome.score is None
    assert said in outcome.detail
    error = to_error(outcome, "exact_match", "group 17, trajectory 3", 30.0)
    assert error.kind == kind and isinstance(error, RewardError)
    for part in (
        "'exact_match'",
        "group 17, trajectory 3",
        said,
        "expected",
        "latent.reward.on_error=drop",
    ):
        assert part in str(error)
    assert pickle.loads(pickle.dumps(error)).kind == kind


def test_extras_are_plain_values():
    outcome = normalise({"score": 1, "n": np.int32(3), "hit": True, "pred": "4", "why": None})
    assert outcome.extras == {"n": 3.0, "hit": 1.0, "pred": "4", "why": None}
    assert all(type(v) in (float, str, type(None)) for v in outcome.extras.values())


def test_details_are_short():
    assert len(normalise("x" * 10_000).detail) < 300
