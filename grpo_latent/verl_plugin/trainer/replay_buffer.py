"""verl's sync replay buffer with a fixed order, a fast poll, and failures that raise."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from grpo_latent.errors import PluginError
from grpo_latent.verl_plugin.boot.actor_watch import ActorWatch

if TYPE_CHECKING:
    from grpo_latent.verl_plugin.rollout.agent_loop import LatentAgentLoopManager

POLL_S = 0.05
HEALTH_CHECK_S = 5.0
HEALTH_TIMEOUT_S = 120.0


class LatentReplayBuffer(ReplayBuffer):
    """Waits for all groups of a wave; returns them as dispatched, then by index in the group.

    verl returns groups as they arrive, so that micro-batches, and with them rounding, differ from
    run to run. It also lets failed groups pass (`failure` counts as terminal), and polls every two
    seconds.
    """

    manager: LatentAgentLoopManager  # from the trainer's `fit` on
    watch: ActorWatch  # from the trainer too, which has a Ray
    _next_health_check: float

    @classmethod
    def adopt(cls, buffer: ReplayBuffer) -> LatentReplayBuffer:
        """The buffer that verl has configured, as one of this class."""
        if type(buffer) is not ReplayBuffer:
            raise PluginError(
                "trainer mode latent_sync brings its own replay buffer",
                where="trainer.v1.sampler.custom_sampler",
                got=type(buffer).__name__,
                expected="path and name null",
            )
        # not made anew: verl works the arguments out within the method that makes it
        adopted = cls.__new__(cls)
        adopted.__dict__.update(buffer.__dict__)
        adopted.poll_interval = POLL_S
        adopted._next_health_check = 0.0
        return adopted

    def _sync_metadata_from_transfer_queue(self) -> None:
        super()._sync_metadata_from_transfer_queue()
        for partition_id, uids in self.failure_keys.items():
            if uids:
                self.manager.raise_failure(partition_id, len(uids), HEALTH_TIMEOUT_S)

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        if time.monotonic() >= self._next_health_check:
            # whatever died leaves prompts "running" for ever
            self.watch.check()
            self.manager.check_workers(HEALTH_TIMEOUT_S)
            self._next_health_check = time.monotonic() + HEALTH_CHECK_S
        return super()._wait_for_next_poll(partition_id, last_debug_time)

    def _materialize_batch(
        self, partition_id, selected_prompt_uids, partition_snapshot
    ) -> KVBatchMeta:
        tq.kv_clear(partition_id=partition_id, keys=selected_prompt_uids)
        order = {uid: self.manager.order_of_uid[uid] for uid in selected_prompt_uids}

        def position(key: str) -> tuple[int, int]:
            uid, session_id, _ = key.rsplit("_", 2)
            return order[uid], int(session_id)

        keys = sorted(
            (key for key in partition_snapshot if key.rsplit("_", 2)[0] in order), key=position
        )
        self.manager.forget(set(order))
        return KVBatchMeta(
            partition_id=partition_id, keys=keys, tags=[partition_snapshot[key] for key in keys]
        )
