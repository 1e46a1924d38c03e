"""The trajectories of one training step in TransferQueue, fetched by column where needed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from grpo_latent import recorded_fields
from grpo_latent.models.groups import number_groups
from grpo_latent.recorded_fields import Wire
from grpo_latent.verl_plugin.boot.row_keys import group_of
from grpo_latent.verl_plugin.worker.finite import (
    GROUPS,
    KEYS,
    NUMBERS,
    PARTITION,
    SEPARATOR,
    STEP,
)


class StepRows:
    """Some columns of some trajectories of a batch.

    Args:
        batch: of verl's.
        columns: those of them that the batch has are fetched.
        keys: of the trajectories, all of the batch if None.
    """

    def __init__(self, batch: KVBatchMeta, columns: Iterable[str], keys: list[str] | None = None):
        self.keys: list[str] = batch.keys if keys is None else keys
        self._fields: TensorDict = tq.kv_batch_get(
            keys=self.keys, partition_id=batch.partition_id, select_fields=list(columns)
        )

    def __contains__(self, column: str) -> bool:
        return column in self._fields.keys()

    def tensors(self, column: str) -> list[Tensor]:
        """A tensor of each trajectory."""
        return list(self._fields[column].unbind())

    def objects(self, column: str) -> list:
        """A Python object of each trajectory."""
        return [getattr(value, "data", value) for value in self._fields[column]]

    @property
    def group_ids(self) -> list[str]:
        """Of each trajectory."""
        return [group_of(key) for key in self.keys]


def number_rows(batch: KVBatchMeta) -> None:
    """Gives each trajectory its number in the batch, for workers to name it, and its group's."""
    groups = number_groups([group_of(key) for key in batch.keys])
    columns = {NUMBERS: torch.arange(len(batch.keys)), GROUPS: torch.tensor(groups)}
    numbers = TensorDict(columns, batch_size=len(batch.keys))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=numbers)


def whole_groups(keys: list[str], lengths: list[int], num_ranks: int) -> list[list[int]] | None:
    """Rows for each rank, groups whole and one after the other, ranks with about equal work.

    None where ranks cannot have equally many whole groups.

    Args:
        keys, lengths: of the batch's trajectories.
    """
    rows_of_group: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        rows_of_group.setdefault(group_of(key), []).append(row)
    groups = list(rows_of_group.values())
    # verl gives each rank equally many rows
    if len(groups) % num_ranks or len({len(rows) for rows in groups}) > 1:
        return None
    work = calculate_workload(torch.tensor(lengths))
    parts = get_seqlen_balanced_partitions(
        [int(work[rows].sum()) for rows in groups], num_ranks, equal_size=True
    )
    return [[row for group in part for row in groups[group]] for part in parts]


def for_workers(batch: KVBatchMeta, step: int) -> KVBatchMeta:
    """The batch, to be sent to workers with the columns that they read, and what names its rows.

    The rest, texts and rewards' details, stays in TransferQueue: fetching every column, which is
    what verl does, took most of an update of a small model.
    """
    batch.fields = [*recorded_fields.columns(Wire.WORKER), NUMBERS, GROUPS]
    names = {STEP: step, KEYS: SEPARATOR.join(batch.keys), PARTITION: batch.partition_id}
    batch.extra_info.update(names)
    return batch
