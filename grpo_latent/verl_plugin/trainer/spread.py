"""How far rewards lie apart: over groups, within groups, over held-out questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def standard_error(means: Sequence[float]) -> float:
    """Of the mean of independent numbers: sd (ddof 1) / sqrt(n); nan below two of them.

    >>> standard_error([0.0, 1.0]), standard_error([1.0])
    (0.5, nan)
    """
    return stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan


def reward_spread(rewards: Sequence[float], group_ids: Sequence[str]) -> dict[str, float]:
    """Spread of a step's rewards.

    Args:
        rewards: of the trajectories that count.
        group_ids: of the same.

    Returns:
        `frac_reward_zero_std`: share of groups without two different rewards; 0 without groups.
        `rewards/standard_error`: of the mean reward, from the groups' means.
        `rewards/at_top_frac`: share of trajectories with the largest reward; nan without any.
    """
    groups: dict[str, list[float]] = {}
    for reward, group_id in zip(rewards, group_ids, strict=True):
        groups.setdefault(group_id, []).append(reward)
    num_silent = sum(len(set(group)) == 1 for group in groups.values())
    top = max(rewards, default=math.nan)
    num_at_top = sum(reward == top for reward in rewards)
    return {
        "frac_reward_zero_std": num_silent / max(len(groups), 1),
        "rewards/standard_error": standard_error([fmean(group) for group in groups.values()]),
        "rewards/at_top_frac": num_at_top / len(rewards) if rewards else math.nan,
    }


def held_out_error(
    data_sources: Sequence[str], uids: Sequence[str], infos: dict[str, list]
) -> float:
    """Standard error of verl's main validation metric, a mean over data sources.

    Each source's is of the means of its questions; accuracy where a source has it, else reward.

    Args:
        infos: columns of `reward_extra_info`, one value a trajectory; None where there is none.
    """
    questions: dict[str, dict[str, list[int]]] = {}
    for i, (source, uid) in enumerate(zip(data_sources, uids, strict=True)):
        questions.setdefault(source, {}).setdefault(uid, []).append(i)
    errors = []
    for of_uid in questions.values():
        has_accuracy = any(_present(infos.get("acc"), indices) for indices in of_uid.values())
        column = infos["acc" if has_accuracy else "reward"]
        known = [_present(column, indices) for indices in of_uid.values()]
        errors.append(standard_error([fmean(values) for values in known if values]))
    return math.hypot(*errors) / len(errors) if errors else math.nan


def _present(column: list | None, indices: list[int]) -> list[float]:
    values = [column[i] for i in indices] if column is not None else []
    return [float(value) for value in values if value is not None]
