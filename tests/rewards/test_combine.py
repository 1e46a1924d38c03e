import pytest

from grpo_latent.rewards.combine import combine, reward_metrics
from grpo_latent.rewards.functions import FunctionSpec
from grpo_latent.rewards.outcome import Outcome

ACCURACY, FORMAT = FunctionSpec("accuracy.py", weight=1.0), FunctionSpec("format.py", weight=0.1)


def test_weighted_sum_with_unweighted_terms():
    combined = combine([ACCURACY, FORMAT], [Outcome("ok", 1.0, {"pred": "4"}), Outcome("ok", 0.5, {"spans": 2.0})])
    assert combined.score == pytest.approx(1.05)
    assert combined.terms == {"accuracy": 1.0, "format": 0.5}
    assert combined.extras == {"accuracy/pred": "4", "format/spans": 2.0}


def test_extras_of_a_single_function_keep_their_names():
    assert combine([ACCURACY], [Outcome("ok", 1.0, {"pred": "4"})]).extras == {"pred": "4"}


def test_one_failure_fails_the_reward_but_not_the_other_terms():
    combined = combine([ACCURACY, FORMAT], [Outcome("timeout"), Outcome("ok", 1.0)])
    assert combined.score is None and combined.terms == {"accuracy": None, "format": 1.0}
    assert [(term, outcome.kind) for term, outcome in combined.failures] == [("accuracy", "timeout")]


def test_a_sum_that_overflows_is_a_failure():
    huge = [FunctionSpec("a.py", weight=1e308), FunctionSpec("b.py", weight=1e308)]
    combined = combine(huge, [Outcome("ok", 10.0), Outcome("ok", 10.0)])
    assert combined.score is None and combined.failures[0][1].kind == "inf"


def test_metrics_of_a_batch_by_hand():
    infos = [
        {"score": 1.0, "accuracy": 1.0, "pred": "4", "acc": 1.0, "dropped": 0.0, "reward_error": ""},
        {"score": 0.0, "accuracy": 0.0, "pred": "5", "acc": 0.0, "dropped": 0.0, "reward_error": ""},
        {"score": 0.0, "accuracy": None, "dropped": 1.0, "reward_error": "timeout"},
        {"score": -1.0, "accuracy": 0.5, "dropped": 0.0, "reward_error": "nan"},
    ]
    metrics = reward_metrics(infos)
    assert metrics["rewards/accuracy/mean"] == pytest.approx(0.5)
    assert metrics["rewards/accuracy/std"] == pytest.approx((0.5 / 3) ** 0.5)
    assert metrics["rewards/score/mean"] == pytest.approx(0.0)  # the dropped one's 0 is no reward
    assert metrics["rewards/score/std"] == pytest.approx((2 / 3) ** 0.5)
    errors = {key.rpartition("/")[2]: n for key, n in metrics.items() if key.startswith("rewards/errors/")}
    assert errors == {"exception": 0, "nan": 1, "inf": 0, "type": 0, "timeout": 1}
    assert metrics["rewards/dropped"] == 1
    assert not any("pred" in key or "/acc/" in key for key in metrics)


def test_metrics_of_an_empty_batch_have_only_counters():
    assert set(reward_metrics([]).values()) == {0.0}
