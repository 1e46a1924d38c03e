"""The images of a group, which its first trajectory alone has, fetched by a worker once a step.

    agent loop ─ pixels, once a group ─▶ TransferQueue ─ once a step ─▶ GroupImages
                                                                            │ a reference a row
                                              old, ref, update of a worker ◀┘

A rank asks for the groups that it has rows of, whichever rows these are.
"""

from __future__ import annotations

from typing import Any

import transfer_queue as tq
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from verl.utils import tensordict_utils as tu

from grpo_latent.errors import LatentMismatchError
from grpo_latent.verl_plugin.boot.row_keys import group_of, trajectory_key
from grpo_latent.verl_plugin.worker.finite import KEYS, PARTITION, keys_of
from grpo_latent.verl_plugin.worker.micro_batch import IMAGES


class GroupImages:
    """What a worker holds of one batch, for all its engines and passes."""

    def __init__(self) -> None:
        self._batch = ""  # the keys of all its trajectories
        self._inputs: dict[str, Any] = {}  # of each group, as the model takes them

    def add_to(self, data: TensorDict) -> None:
        """Gives each row its group's images, as verl's engine looks for them.

        Raises:
            LatentMismatchError: the trainer has not said whose rows these are.
        """
        keys, partition_id = keys_of(data), tu.get_non_tensor_data(data, PARTITION, None)
        if keys is None or partition_id is None:
            raise LatentMismatchError(
                "batch without the names of its trajectories",
                where="latent engine, images of groups",
                got=sorted(data.keys()),
                expected=f"{KEYS} and {PARTITION}, as trainer mode latent_sync sends them",
            )
        batch = tu.get_non_tensor_data(data, KEYS, None)
        if batch != self._batch:
            self._batch, self._inputs = batch, {}
        groups = [group_of(key) for key in keys]
        if new := [group for group in dict.fromkeys(groups) if group not in self._inputs]:
            rows = tq.kv_batch_get(
                keys=[trajectory_key(group, 0) for group in new],
                partition_id=partition_id,
                select_fields=[IMAGES],
            )
            found = [getattr(each, "data", each) for each in rows[IMAGES]]
            self._inputs |= zip(new, found, strict=True)
        data[IMAGES] = NonTensorStack(*[self._inputs[group] for group in groups])
