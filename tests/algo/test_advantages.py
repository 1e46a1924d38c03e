"""Advantages against hand numbers, numpy and verl's own estimators."""

import numpy as np
import pytest
import torch

from grpo_latent.algo.advantages import ESTIMATORS, group_advantages
from grpo_latent.errors import ConfigError, RewardError


def test_hand_numbers():
    rewards_N = torch.tensor([1.0, 0.0, 2.0, 3.0, 3.0, 3.0])
    ids = ["a", "a", "a", "b", "b", "b"]
    # group a: mean 1, deviations 0, -1, 1, std with ddof 1 = 1
    torch.testing.assert_close(
        group_advantages(rewards_N, ids, "grpo", eps=1.0),
        torch.tensor([0.0, -0.5, 0.5, 0.0, 0.0, 0.0]),
    )
    assert group_advantages(rewards_N, ids, "dr_grpo").tolist() == [0.0, -1.0, 1.0, 0.0, 0.0, 0.0]
    # leave-one-out baselines of group a: mean(0, 2) = 1, mean(1, 2) = 1.5, mean(1, 0) = 0.5
    torch.testing.assert_close(
        group_advantages(rewards_N, ids, "rloo"), torch.tensor([0.0, -1.5, 1.5, 0.0, 0.0, 0.0])
    )


def test_default_eps_is_lvrs():
    advantages_N = group_advantages(torch.tensor([0.0, 1.0], dtype=torch.float64), [0, 0])
    assert advantages_N[1].item() == pytest.approx(
        0.5 / (np.std([0, 1], ddof=1) + 1e-4), rel=1e-12
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_of_unequal_size_against_numpy(estimator):
    generator = np.random.default_rng(0)
    ids_N = np.concatenate([np.full(size, g) for g, size in enumerate([2, 3, 8, 5])])
    rewards_N = generator.normal(size=len(ids_N)) * 3 + 100
    expected_N = np.empty_like(rewards_N)
    for group in set(ids_N):
        r = rewards_N[ids_N == group]
        others = np.array([np.delete(r, i).mean() for i in range(len(r))])
        expected_N[ids_N == group] = {
            "grpo": (r - r.mean()) / (r.std(ddof=1) + 1e-4),
            "dr_grpo": r - r.mean(),
            "rloo": r - others,
        }[estimator]
    result_N = group_advantages(torch.from_numpy(rewards_N), torch.from_numpy(ids_N), estimator)
    np.testing.assert_allclose(result_N.numpy(), expected_N, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e8, -0.7])
def test_equal_rewards_give_exactly_zero(estimator, dtype, value):
    advantages_N = group_advantages(
        torch.full((7,), value, dtype=dtype), ["g"] * 7, estimator, eps=0.0
    )
    assert torch.equal(advantages_N, torch.zeros(7, dtype=dtype))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_survive_shuffling(estimator):
    rewards_N = torch.randn(24, generator=torch.Generator().manual_seed(1))
    ids = [f"row-{i // 6}" for i in range(24)]
    expected_N = group_advantages(rewards_N, ids, estimator)
    order_N = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    shuffled_N = group_advantages(rewards_N[order_N], [ids[i] for i in order_N], estimator)
    torch.testing.assert_close(shuffled_N, expected_N[order_N], rtol=0, atol=1e-7)


def test_ids_of_any_kind_give_the_same_groups():
    rewards_N = torch.tensor([1.0, 2.0, 5.0, 7.0])
    expected_N = group_advantages(rewards_N, ["x", "y", "x", "y"])
    for ids in (
        torch.tensor([9, 4, 9, 4]),
        np.array(["x", "y", "x", "y"], dtype=object),
        ("1", "01", "1", "01"),
        np.array([3, "y", 3, "y"], object),
    ):
        assert torch.equal(group_advantages(rewards_N, ids), expected_N)


def test_left_out_trajectories_do_not_count():
    rewards_N = torch.tensor([1.0, float("nan"), 0.0, 5.0, 9.0])
    ids = ["a", "a", "a", "b", "b"]
    valid_N = torch.tensor([True, False, True, True, False])
    advantages_N = group_advantages(rewards_N, ids, "dr_grpo", valid_N=valid_N)
    # group b keeps one trajectory of two: no baseline, no advantage, no error
    assert advantages_N.tolist() == [0.5, 0.0, -0.5, 0.0, 0.0]


def test_a_padding_row_alone_in_its_group_is_no_error():
    rewards_N, valid_N = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([True, True, False])
    assert group_advantages(rewards_N, ["a", "a", "pad"], "dr_grpo", valid_N=valid_N).tolist() == [
        0.5,
        -0.5,
        0.0,
    ]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_group_of_one_is_refused(estimator):
    with pytest.raises(ConfigError, match=r"group 'lonely'.*rollout\.n >= 2"):
        group_advantages(torch.tensor([1.0, 2.0, 3.0]), ["a", "a", "lonely"], estimator)


@pytest.mark.parametrize(
    "value, kind", [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "inf")]
)
def test_rewards_that_are_not_finite_name_group_and_trajectory(value, kind):
    with pytest.raises(RewardError, match=r"group 'b' trajectory 3") as caught:
        group_advantages(torch.tensor([1.0, 0.0, 1.0, value]), ["a", "a", "b", "b"])
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "change, message",
    [
        ({"estimator": "gae"}, "unknown advantage estimator"),
        ({"eps": -1.0}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"group_ids": ["a"]}, "differ in length"),
        ({"rewards_N": torch.tensor([1, 2])}, "one float a trajectory"),
        ({"rewards_N": torch.zeros(2, 3)}, "one float a trajectory"),
        ({"valid_N": torch.tensor([True])}, "differ in length"),
    ],
)
def test_malformed_arguments(change, message):
    arguments = {"rewards_N": torch.tensor([1.0, 2.0]), "group_ids": ["a", "a"], **change}
    with pytest.raises(ConfigError, match=message):
        group_advantages(**arguments)


def test_no_gradient_flows_into_rewards():
    rewards_N = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not group_advantages(rewards_N, ["a", "a"]).requires_grad
