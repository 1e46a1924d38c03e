"""Group-relative advantages: a trajectory is measured against the others of its prompt row.

Legend: N trajectories, M groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from grpo_latent.errors import ConfigError, RewardError

GroupIds: TypeAlias = Sequence[str] | np.ndarray | Tensor

ESTIMATORS = ("grpo", "dr_grpo", "rloo")
DEFAULT_EPS = 1e-4  # LVR's (and TRL's); verl's `grpo` has 1e-6
NUM_NAMED = 5  # trajectories or groups that an error message lists before it says "and k more"


def group_advantages(
    rewards_N: Tensor,
    group_ids: GroupIds,
    estimator: str = "grpo",
    eps: float = DEFAULT_EPS,
    valid_N: Tensor | None = None,
) -> Tensor:
    """Advantages from the rewards of a batch of groups, which may stand in any order.

    With r_i the reward of trajectory i, and mean, std over the G valid trajectories of its group:

        grpo:     A_i = (r_i - mean) / (std + eps)      std has G - 1 in the denominator (ddof 1)
        dr_grpo:  A_i = r_i - mean
        rloo:     A_i = r_i - mean over the *others* of the group = G / (G - 1) * (r_i - mean)

    Sources: GRPO (arXiv 2402.03300, section 4.1.2; LVR's ddof and eps), Dr. GRPO (2503.20783,
    section 3.2), RLOO (2402.14740, section 2.3). verl gives the only trajectory of a group the
    advantage (r - 0) / 1; here it is refused.

    Args:
        rewards_N: float [N]; its gradient, if any, is cut.
        group_ids: one id a trajectory: strings, or integers [N].
        estimator: `grpo`, `dr_grpo` or `rloo`.
        eps: added to the standard deviation (`grpo` only).
        valid_N: bool [N], False leaves a trajectory out of its group's statistics and gives it
            advantage 0 (verl's padding rows, dropped trajectories). A group left with one
            trajectory has no baseline: advantage 0.

    Returns:
        float [N], dtype and device of `rewards_N`. A group of equal rewards gets exactly 0.

    Raises:
        ConfigError: unknown estimator, eps < 0, a group of one, or fields that differ in length.
        RewardError: a NaN (kind `nan`) or an infinity (kind `inf`) among the valid rewards.

    >>> group_advantages(torch.tensor([1.0, 0.0, 3.0, 5.0]), ["a", "a", "b", "b"], "dr_grpo")
    tensor([ 0.5000, -0.5000, -1.0000,  1.0000])
    """
    _check_arguments(rewards_N, group_ids, estimator, eps, valid_N)
    rewards_N = rewards_N.detach()
    group_N, ids_M = _group_indices(group_ids, rewards_N.device)
    valid_N = torch.ones_like(group_N, dtype=torch.bool) if valid_N is None else valid_N
    _refuse_not_finite(rewards_N, valid_N, group_N, ids_M)
    _refuse_groups_of_one(valid_N, group_N, ids_M)

    num_groups = len(ids_M)
    weight_N = valid_N.double()
    size_M = weight_N.new_zeros(num_groups).index_add(0, group_N, weight_N)
    values_N = torch.where(valid_N, rewards_N.double(), 0.0)
    # shifted by the group's maximum, equal rewards are exactly 0 before anything is rounded
    shift_M = values_N.new_full((num_groups,), -torch.inf).scatter_reduce(
        0, group_N, torch.where(valid_N, values_N, -torch.inf), "amax"
    )
    centred_N = torch.where(valid_N, values_N - shift_M[group_N], 0.0)
    mean_M = torch.zeros_like(size_M).index_add(0, group_N, centred_N) / size_M.clamp(min=1)
    centred_N = torch.where(valid_N, centred_N - mean_M[group_N], 0.0)

    if estimator == "grpo":
        variance_M = torch.zeros_like(size_M).index_add(0, group_N, centred_N.square()) / (
            size_M - 1
        ).clamp(min=1)
        std_N = variance_M.sqrt()[group_N]
        # 0 / (0 + eps) is 0 for any eps but 0
        advantages_N = torch.where(centred_N == 0, 0.0, centred_N / (std_N + eps))
    elif estimator == "dr_grpo":
        advantages_N = centred_N
    else:
        advantages_N = centred_N * (size_M / (size_M - 1).clamp(min=1))[group_N]
    return advantages_N.to(rewards_N.dtype)


def _check_arguments(
    rewards_N: Tensor, group_ids: GroupIds, estimator: str, eps: float, valid_N: Tensor | None
) -> None:
    if estimator not in ESTIMATORS:
        raise ConfigError(
            "unknown advantage estimator", got=estimator, expected=f"one of {ESTIMATORS}"
        )
    if not eps >= 0:
        raise ConfigError("eps of the advantage is not usable", got=eps, expected="a float >= 0")
    if rewards_N.ndim != 1 or not rewards_N.is_floating_point():
        raise ConfigError(
            "rewards are one float a trajectory",
            got=f"{rewards_N.dtype} {tuple(rewards_N.shape)}",
            expected="float [N]",
        )
    if len(group_ids) != len(rewards_N) or (
        valid_N is not None and valid_N.shape != rewards_N.shape
    ):
        raise ConfigError(
            "rewards, group ids and valid flags differ in length",
            got={
                "rewards": len(rewards_N),
                "group_ids": len(group_ids),
                "valid": None if valid_N is None else len(valid_N),
            },
            expected="one of each a trajectory",
        )


def _group_indices(group_ids: GroupIds, device: torch.device) -> tuple[Tensor, list[str]]:
    """Index of each trajectory's group, int64 [N], and the M ids as text, in sorted order."""
    ids = group_ids.cpu().numpy() if isinstance(group_ids, Tensor) else np.asarray(group_ids)
    unique_M, inverse_N = np.unique(ids.astype(str), return_inverse=True)
    return torch.from_numpy(inverse_N.astype(np.int64)).to(device), unique_M.tolist()


def _refuse_not_finite(
    rewards_N: Tensor, valid_N: Tensor, group_N: Tensor, ids_M: list[str]
) -> None:
    bad_N = valid_N & ~torch.isfinite(rewards_N)
    if not bool(bad_N.any()):
        return
    bad = bad_N.nonzero()[:, 0].tolist()
    kind = "nan" if bool(torch.isnan(rewards_N[bad[0]])) else "inf"
    raise RewardError(
        "a reward is not finite",
        kind=kind,
        where=_some(
            [f"group {ids_M[group_N[i]]!r} trajectory {i}" for i in bad[: NUM_NAMED + 1]], len(bad)
        ),
        got=rewards_N[bad[0]].item(),
        expected="a finite float",
        fix="Correct the reward function, or set latent.reward.on_error=drop to leave such "
        "trajectories out.",
    )


def _refuse_groups_of_one(valid_N: Tensor, group_N: Tensor, ids_M: list[str]) -> None:
    rows_M = torch.bincount(group_N, minlength=len(ids_M))
    lone_M = torch.zeros_like(rows_M, dtype=torch.bool)
    lone_M[group_N[valid_N]] = True
    lone_M &= rows_M == 1
    if not bool(lone_M.any()):
        return
    lone = [ids_M[m] for m in lone_M.nonzero()[:, 0].tolist()]
    raise ConfigError(
        "a group of one trajectory has no baseline to be measured against",
        where=_some([f"group {g!r}" for g in lone[: NUM_NAMED + 1]], len(lone)),
        got=f"{len(lone)} of {len(ids_M)} groups with 1 trajectory",
        expected=">= 2 trajectories a group",
        fix="Set actor_rollout_ref.rollout.n >= 2, and look in the log for trajectories that "
        "failed.",
    )


def _some(names: list[str], total: int) -> str:
    shown = ", ".join(names[:NUM_NAMED])
    return shown if total <= NUM_NAMED else f"{shown} and {total - NUM_NAMED} more"
