import pytest

from grpo_latent.rewards.combine import combine
from grpo_latent.rewards.functions import FunctionSpec
from grpo_latent.rewards.outcome import Outcome

ACCURACY, FORMAT = FunctionSpec("accuracy.py", weight=1.0), FunctionSpec("format.py", weight=0.1)


def test_weighted_sum_with_unweighted_terms():
    combined = combine(
        [ACCURACY, FORMAT], [Outcome("ok", 1.0, {"pred": "4"}), Outcome("ok", 0.5, {"spans": 2.0})]
    )
    assert combined.score == pytest.approx(1.05)
    assert combined.terms == {"accuracy": 1.0, "format": 0.5}
    assert combined.extras == {"accuracy/pred": "4", "format/spans": 2.0}


def test_extras_of_a_single_function_keep_their_names():
    assert combine([ACCURACY], [Outcome("ok", 1.0, {"pred": "4"})]).extras == {"pred": "4"}


def test_one_failure_fails_the_reward_but_not_the_other_terms():
    combined = combine([ACCURACY, FORMAT], [Outcome("timeout"), Outcome("ok", 1.0)])
    assert combined.score is None and combined.terms == {"accuracy": None, "format": 1.0}
    assert [(term, outcome.kind) for term, outcome in combined.failures] == [
        ("accuracy", "timeout")
    ]


def test_a_sum_that_overflows_is_a_failure():
    huge = [FunctionSpec("a.py", weight=1e308), FunctionSpec("b.py", weight=1e308)]
    combined = combine(huge, [Outcome("ok", 10.0), Outcome("ok", 10.0)])
    assert combined.score is None and combined.failures[0][1].kind == "inf"
