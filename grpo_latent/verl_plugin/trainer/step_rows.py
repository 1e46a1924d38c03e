"""The trajectories of one training step in TransferQueue, fetched by column where needed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta

from grpo_latent import recorded
from grpo_latent.recorded import Wire
from grpo_latent.verl_plugin.worker.finite import KEYS, NUMBERS, SEPARATOR, STEP


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
        """Of each trajectory, whose key is `<group>_<session>_<output>`."""
        return [group_of(key) for key in self.keys]


def group_of(key: str) -> str:
    """The group of a trajectory's key."""
    return key.rsplit("_", 2)[0]


def number_rows(batch: KVBatchMeta) -> None:
    """Gives each trajectory its number in the batch, so that a worker can name it."""
    numbers = TensorDict({NUMBERS: torch.arange(len(batch.keys))}, batch_size=len(batch.keys))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=numbers)


def for_workers(batch: KVBatchMeta, step: int) -> KVBatchMeta:
    """The batch, to be sent to workers with the columns that they read, and what names its rows.

    The rest, texts and rewards' details, stays in TransferQueue: fetching every column, which is
    what verl does, took most of an update of a small model.
    """
    batch.fields = [*recorded.columns(Wire.WORKER), NUMBERS]
    batch.extra_info.update({STEP: step, KEYS: SEPARATOR.join(batch.keys)})
    return batch
