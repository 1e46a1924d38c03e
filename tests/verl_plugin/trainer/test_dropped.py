"""Validation without dropped trajectories. (Training without them: test_training.py.)"""

import pytest

from grpo_latent.verl_plugin.trainer import dropped


def test_validation_leaves_dropped_rows_out():
    """Dropped rows stay out of validation, where verl would average their 0.

    It would also fill the missing accuracy up with another.
    """
    from verl.trainer.ppo.metric_utils import process_validation_metrics

    sources, uids = ["d"] * 3, ["a", "b", "b"]
    infos = {"reward": [1.0, 0.0, 0.5], "acc": [1.0, None, 0.5], "dropped": [0.0, 1.0, 0.0]}
    kept = dropped.without_dropped(sources, uids, infos, [2, 2, 2], {("d", "a"): 1, ("d", "b"): 2})
    assert kept.expected_acc_counts == {
        ("d", "a"): 1,
        ("d", "b"): 1,
    } and kept.dropped_frac == pytest.approx(1 / 3)
    kept_sources, kept_uids, kept_infos, turns = kept.columns
    metrics = process_validation_metrics(
        kept_sources, kept_uids, kept_infos, expected_acc_counts=kept.expected_acc_counts
    )["d"]
    assert metrics["reward"]["mean@1"] == metrics["acc"]["mean@1"] == 0.75 and turns == [2, 2]
    untouched = dropped.without_dropped(
        sources, uids, {"reward": [1.0, 0.0, 0.5]}, [2, 2, 2], None
    )
    assert untouched.columns[1] == uids and untouched.dropped_frac == 0.0
