"""Metrics of a step's trajectories, against numbers worked out by hand."""

import math

import pytest
import torch

from grpo_latent.verl_plugin.trainer import step_metrics as rows


def fields(
    num_spans=0, num_steps=0, num_forced_ends=0, stop_reason="eos", norms=(), **reward_extra_info
):
    latent = {"num_spans": num_spans, "num_steps": num_steps, "num_forced_ends": num_forced_ends}
    latent_norms = torch.tensor(norms).numpy()
    info = {"latent": latent, "latent_norms": latent_norms, "stop_reason": stop_reason}
    return {**info, "reward_extra_info": reward_extra_info}


def test_latent_metrics():
    batch = [
        fields(2, 6, 1, "length", norms=(1.0, 3.0)),
        fields(1, 3, 1, norms=(5.0,)),
        fields(),
        fields(),
    ]
    metrics = rows.latent_metrics(batch)
    assert metrics == {
        "latent/frac_rollouts": 0.5,
        "latent/spans_mean": 0.75,
        "latent/steps_mean": 2.25,
        "latent/steps_max": 6.0,
        "latent/forced_end_frac": pytest.approx(2 / 3),
        "latent/norm_mean": 3.0,
        "latent/stopped_at_length_frac": 0.25,
    }
    assert rows.latent_metrics([fields()])["latent/forced_end_frac"] == 0.0
    beside_tokens = rows.latent_metrics([fields(norms=(2.0, 2.0)), fields()])
    assert beside_tokens["latent/frac_rollouts"] == 0.5 and beside_tokens["latent/spans_mean"] == 0


def test_reward_metrics_leave_dropped_rows_out():
    batch = [
        fields(accuracy=1.0, score=1.0, dropped=0.0, reward_error=""),
        fields(accuracy=0.0, score=0.0, dropped=0.0, reward_error=""),
        fields(accuracy=0.5, score=0.5, dropped=0.0, note="text"),
        fields(accuracy=9.0, score=0.0, dropped=1.0, reward_error="timeout"),
    ]
    metrics = rows.reward_metrics(batch, torch.tensor([1.0, 0.0, 0.5, 0.0]), ["a", "a", "b", "b"])
    assert metrics["rewards/accuracy/mean"] == 0.5
    assert metrics["rewards/accuracy/std"] == pytest.approx(math.sqrt(1 / 6))
    assert metrics["frac_reward_zero_std"] == 0.5  # group b has one kept trajectory
    assert metrics["rewards/dropped_frac"] == 0.25 and metrics["rewards/errors/timeout"] == 1.0
    assert metrics["rewards/errors/nan"] == 0.0  # a counter that is always there can be watched
    assert not any(
        name.startswith(("rewards/score", "rewards/dropped/", "rewards/note")) for name in metrics
    )


def test_scores_leave_dropped_rows_out():
    kept, dropped = fields(dropped=0.0), fields(dropped=1.0)
    assert rows.score_metrics([kept, kept], torch.tensor([1.0, 3.0])) == {}
    metrics = rows.score_metrics([kept, dropped, kept], torch.tensor([1.0, 0.0, 3.0]))
    assert metrics["critic/score/mean"] == metrics["critic/rewards/mean"] == 2.0
    assert (metrics["critic/score/min"], metrics["critic/score/max"]) == (1.0, 3.0)
    assert math.isnan(rows.score_metrics([dropped], torch.zeros(1))["critic/score/mean"])
