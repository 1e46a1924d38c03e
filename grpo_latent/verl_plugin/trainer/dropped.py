"""Trajectories that a reward failed on under `latent.reward.on_error=drop`: they count nowhere.

verl knows no such thing: its loss, its baselines and its validation would take their reward of 0
for one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from grpo_latent.verl_plugin.trainer.step_rows import StepRows


def mask_dropped(batch: KVBatchMeta) -> None:
    """Takes dropped trajectories' actions away: no loss, no part in their group's baseline."""
    rows = StepRows(batch, ("extra_fields", "response_mask", "rm_scores"))
    dropped = [is_dropped(extra) for extra in rows.objects("extra_fields")]
    if not any(dropped):
        return
    keys = [key for key, drop in zip(batch.keys, dropped, strict=True) if drop]
    masks = rows.tensors("response_mask")
    empty = [torch.zeros_like(mask) for mask, drop in zip(masks, dropped, strict=True) if drop]
    nested = torch.nested.as_nested_tensor(empty, layout=torch.jagged)
    update = {"response_mask": nested, "loss_mask": nested.clone(), "rm_scores": nested.float()}
    tq.kv_batch_put(
        keys=keys, partition_id=batch.partition_id, fields=TensorDict(update, batch_size=len(keys))
    )


def is_dropped(extra_fields: dict) -> bool:
    """Whether the reward manager took this trajectory out of training."""
    return float(extra_fields.get("reward_extra_info", {}).get("dropped", 0) or 0) == 1.0


@dataclass(frozen=True)
class ValidationRows:
    """What verl makes validation metrics of.

    Attributes:
        columns: data sources, uids, reward infos by name, turns.
        expected_acc_counts: trajectories by (data source, uid) that are left.
        dropped_frac: share of the trajectories that were taken out.
    """

    columns: tuple[list, list, dict[str, list], list]
    expected_acc_counts: dict[tuple[str, str], int] | None
    dropped_frac: float


def without_dropped(
    data_sources: list,
    uids: list,
    reward_infos: dict[str, list],
    turns: list,
    expected_acc_counts: dict[tuple[str, str], int] | None,
) -> ValidationRows:
    """Validation without dropped trajectories, whose 0 verl would count as a reward.

    Args:
        reward_infos: columns of `reward_extra_info`, one value a trajectory.
        expected_acc_counts: trajectories by (data source, uid), which verl fills up with
            accuracies of 0.
    """
    dropped = [float(value or 0) == 1.0 for value in reward_infos.get("dropped", [0] * len(uids))]
    if not any(dropped):
        return ValidationRows((data_sources, uids, reward_infos, turns), expected_acc_counts, 0.0)
    kept = [i for i, drop in enumerate(dropped) if not drop]
    counts = None if expected_acc_counts is None else dict(expected_acc_counts)
    for i, drop in enumerate(dropped):
        key = (str(data_sources[i]), str(uids[i]))
        if drop and counts and key in counts:
            counts[key] -= 1
    columns = [[column[i] for i in kept] for column in (data_sources, uids, turns)]
    infos = {name: [values[i] for i in kept] for name, values in reward_infos.items()}
    return ValidationRows(
        (columns[0], columns[1], infos, columns[2]), counts, sum(dropped) / len(dropped)
    )
