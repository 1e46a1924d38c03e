"""Metrics, the replay gap and dumps of a step's trajectories, against numbers worked out by hand."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from grpo_latent.errors import ReplayGapError
from grpo_latent.verl_plugin.trainer import step_rows as rows

NAN = math.nan


def test_the_replay_gap_counts_actions_only():
    rollout = [torch.tensor([-1.0, -9.0, -2.0]), torch.tensor([-1.0])]
    old = [torch.tensor([-1.5, 0.0, -2.25]), torch.tensor([-1.0])]
    mask = [torch.tensor([1, 0, 1]), torch.tensor([1])]
    gap = rows.replay_gap(rollout, old, mask)
    assert (gap.maximum, gap.mean, gap.row, gap.position) == (0.5, 0.25, 0, 0)


def test_a_nan_is_the_worst_gap():
    gap = rows.replay_gap([torch.tensor([-1.0, NAN])], [torch.tensor([-1.0, -1.0])], [torch.ones(2)])
    assert gap.maximum == math.inf and gap.position == 1
    with pytest.raises(ReplayGapError, match="step 4, trajectory x, completion position 1: .* got inf nats"):
        gap.check(1e9, 4, "trajectory x")


def test_no_action_is_no_gap():
    gap = rows.replay_gap([torch.tensor([NAN])], [torch.tensor([0.0])], [torch.zeros(1)])
    assert (gap.maximum, gap.mean) == (0.0, 0.0)
    gap.check(1e-9, 1, "trajectory x")


def test_the_bound():
    gap = rows.ReplayGap(1e-3, 1e-4, 0, 2)
    gap.check(1e-3, 1, "t")
    gap.check(None, 1, "t")
    with pytest.raises(ReplayGapError, match="expected <= latent.replay_logp_gap_bound=0.0005"):
        gap.check(5e-4, 1, "t")


def test_acts_at_latents_are_found_behind_the_prompt():
    kinds = [torch.tensor([0, 1, 3, 4, 4, 5, 2]), torch.tensor([0, 2])]
    masks = rows.act_masks(kinds, [torch.ones(5), torch.ones(1)], frozenset({4}))
    assert [mask.tolist() for mask in masks] == [[False, True, True, False, False], [False]]


def fields(num_spans=0, num_steps=0, num_forced_ends=0, stop_reason="eos", norms=(), **reward_extra_info):
    latent = {"num_spans": num_spans, "num_steps": num_steps, "num_forced_ends": num_forced_ends}
    latent_norms = torch.tensor(norms).numpy()
    info = {"latent": latent, "latent_norms": latent_norms, "stop_reason": stop_reason}
    return {**info, "reward_extra_info": reward_extra_info}


def test_latent_metrics():
    batch = [fields(2, 6, 1, "length", norms=(1.0, 3.0)), fields(1, 3, 1, norms=(5.0,)), fields(), fields()]
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
    assert not any(name.startswith(("rewards/score", "rewards/dropped/", "rewards/note")) for name in metrics)


def test_scores_leave_dropped_rows_out():
    kept, dropped = fields(dropped=0.0), fields(dropped=1.0)
    assert rows.score_metrics([kept, kept], torch.tensor([1.0, 3.0])) == {}
    metrics = rows.score_metrics([kept, dropped, kept], torch.tensor([1.0, 0.0, 3.0]))
    assert metrics["critic/score/mean"] == metrics["critic/rewards/mean"] == 2.0
    assert (metrics["critic/score/min"], metrics["critic/score/max"]) == (1.0, 3.0)
    assert math.isnan(rows.score_metrics([dropped], torch.zeros(1))["critic/score/mean"])


def test_validation_leaves_dropped_rows_out():
    """verl would average the 0 of a dropped trajectory, and fill the missing accuracy up with another."""
    from verl.trainer.ppo.metric_utils import process_validation_metrics

    sources, uids = ["d"] * 3, ["a", "b", "b"]
    infos = {"reward": [1.0, 0.0, 0.5], "acc": [1.0, None, 0.5], "dropped": [0.0, 1.0, 0.0]}
    kept = rows.without_dropped(sources, uids, infos, [2, 2, 2], {("d", "a"): 1, ("d", "b"): 2})
    assert kept.expected_acc_counts == {("d", "a"): 1, ("d", "b"): 1} and kept.dropped_frac == pytest.approx(1 / 3)
    kept_sources, kept_uids, kept_infos, turns = kept.columns
    metrics = process_validation_metrics(
        kept_sources, kept_uids, kept_infos, expected_acc_counts=kept.expected_acc_counts
    )["d"]
    assert metrics["reward"]["mean@1"] == metrics["acc"]["mean@1"] == 0.75 and turns == [2, 2]
    untouched = rows.without_dropped(sources, uids, {"reward": [1.0, 0.0, 0.5]}, [2, 2, 2], None)
    assert untouched.columns[1] == uids and untouched.dropped_frac == 0.0


def test_dumps_are_read_back(tmp_path):
    latents = {"7/0": torch.randn(2, 4), "7/1": torch.zeros(0, 4)}
    rows.dump_rollouts(tmp_path / "new", 3, [{"id": "7/0", "reward": 0.5}, {"id": "7/1", "reward": 0.0}], latents)
    lines = (tmp_path / "new" / "step_3.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["7/0", "7/1"]
    loaded = load_file(tmp_path / "new" / "step_3.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in latents.items())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["step_3.jsonl", "step_3.safetensors"]
