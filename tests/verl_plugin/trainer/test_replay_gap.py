"""The gate between rollout and update, against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from grpo_latent.errors import ReplayGapError
from grpo_latent.verl_plugin.trainer import replay_gap as gate
from grpo_latent.verl_plugin.trainer.step_rows import StepRows

NAN, INF = math.nan, math.inf


def test_the_replay_gap_counts_actions_only():
    rollout = [torch.tensor([-1.0, -9.0, -2.0]), torch.tensor([-1.0])]
    old = [torch.tensor([-1.5, 0.0, -2.25]), torch.tensor([-1.0])]
    mask = [torch.tensor([1, 0, 1]), torch.tensor([1])]
    gap = gate.replay_gap(rollout, old, mask)
    assert (gap.maximum, gap.mean, gap.row, gap.position) == (0.5, 0.25, 0, 0)


def test_a_nan_is_the_worst_gap():
    gap = gate.replay_gap(
        [torch.tensor([-1.0, NAN])], [torch.tensor([-1.0, -1.0])], [torch.ones(2)]
    )
    assert gap.maximum == math.inf and gap.position == 1
    with pytest.raises(
        ReplayGapError, match="step 4, trajectory x, completion position 1: .* got inf nats"
    ):
        gap.check(1e9, 4, "trajectory x")


def test_no_action_is_no_gap():
    gap = gate.replay_gap([torch.tensor([NAN])], [torch.tensor([0.0])], [torch.zeros(1)])
    assert (gap.maximum, gap.mean) == (0.0, 0.0)
    gap.check(1e-9, 1, "trajectory x")


def test_the_bound():
    gap = gate.ReplayGap(1e-3, 1e-4, 0, 2)
    gap.check(1e-3, 1, "t")
    gap.check(None, 1, "t")
    with pytest.raises(ReplayGapError, match="expected <= latent.replay_logp_gap_bound=0.0005"):
        gap.check(5e-4, 1, "t")


def test_acts_at_latents_are_found_behind_the_prompt():
    kinds = [torch.tensor([0, 1, 3, 4, 4, 5, 2]), torch.tensor([0, 2])]
    masks = gate.act_masks(kinds, [torch.ones(5), torch.ones(1)], frozenset({4}))
    assert [mask.tolist() for mask in masks] == [[False, True, True, False, False], [False]]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["rollout_log_probs", "old_log_probs"])
@pytest.mark.parametrize("bound", [None, 1e9])
def test_a_log_prob_that_is_not_finite_never_passes(bad, side, bound):
    columns = {
        name: [torch.tensor([-1.0, -2.0])] for name in ("rollout_log_probs", "old_log_probs")
    }
    columns[side] = [torch.tensor([-1.0, bad])]
    rows = StepRows.__new__(StepRows)
    rows.keys, rows.tensors = ["a_0_0"], (columns | {"response_mask": [torch.ones(2)]}).get
    options = SimpleNamespace(
        act_kinds=frozenset(),
        treatment=SimpleNamespace(feeds_mean=False),
        replay_logp_gap_bound=bound,
    )
    with pytest.raises(
        ReplayGapError,
        match="step 7, trajectory a_0_0, completion position 1: a log-prob.* not finite",
    ):
        gate.check_replay(rows, options, 7)
    columns[side] = [torch.tensor([-1.0, -1.5])]
    rows.tensors = (columns | {"response_mask": [torch.ones(2)]}).get
    assert gate.check_replay(rows, options, 7)["latent/replay_logp_gap_max"] == 0.5
