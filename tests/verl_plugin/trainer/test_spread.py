"""Spread of rewards and of validations, against numbers worked out by hand."""

import math

import pytest

from grpo_latent.verl_plugin.trainer.spread import held_out_error, reward_spread, standard_error


def test_the_standard_error_of_a_mean():
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(standard_error([2.0])) and math.isnan(standard_error([]))


def test_a_steps_rewards():
    """Groups' means 0.5, 1 and 0: their sd is 0.5; two of three have no signal, half are at 1."""
    spread = reward_spread([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], list("aabbcc"))
    assert spread == {
        "frac_reward_zero_std": pytest.approx(2 / 3),
        "rewards/standard_error": pytest.approx(0.5 / math.sqrt(3)),
        "rewards/at_top_frac": 0.5,
    }


def test_a_step_without_trajectories_has_no_spread():
    spread = reward_spread([], [])
    assert spread["frac_reward_zero_std"] == 0.0
    assert math.isnan(spread["rewards/standard_error"] + spread["rewards/at_top_frac"])


def test_a_validation_of_one_source():
    """Questions' means 1, 0.5, 0, not six answers: two of one question are not independent."""
    uids = ["q", "q", "r", "r", "s", "s"]
    infos = {"reward": [9.0] * 6, "acc": [1, 1, 1, 0, 0, 0]}
    assert held_out_error(["x"] * 6, uids, infos) == pytest.approx(0.5 / math.sqrt(3))


def test_sources_count_alike():
    """verl's metric is the mean over sources: errors of 0.5 and 0.25 give their root over two.

    The second source has rewards only.
    """
    infos = {"acc": [1.0, 0.0, None, None], "reward": [5.0, 5.0, 0.5, 1.0]}
    error = held_out_error(["x", "x", "y", "y"], list("abcd"), infos)
    assert error == pytest.approx(math.hypot(0.5, 0.25) / 2)


def test_a_source_of_one_question_leaves_the_error_unknown():
    infos = {"reward": [1.0, 0.0, 1.0]}
    assert math.isnan(held_out_error(["x", "x", "y"], list("abc"), infos))
    assert math.isnan(held_out_error([], [], infos))
