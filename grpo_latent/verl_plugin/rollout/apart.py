"""Rollout servers on nodes of their own (`latent.placement=apart`), as verl's standalone replicas.

    beside   trainer rank 0 + server 0 │ trainer rank 1 + server 1      a server a rank, its device
    apart    trainer rank 0            │ trainer rank 1            │ server 0, server 1, …

How many there are, `rollout.nnodes` and `rollout.n_gpus_per_node` say, verl's own keys. A step
stays synchronous: each waits while the other works, so `apart` is for models that do not fit
beside their optimizer. verl's own trainer for such replicas is asynchronous, and sends weights by
NCCL.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from omegaconf import DictConfig
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from grpo_latent.verl_plugin.boot import compat
from grpo_latent.verl_plugin.boot.cluster_resources import training_nodes
from grpo_latent.verl_plugin.rollout.replica import server_name, start_server


class ApartServers:
    """The servers, and how weights come to them: in the place of verl's checkpoint engine.

    Args:
        config: verl's, whole.
        workers: the worker group of the actor.
    """

    def __init__(self, config: DictConfig, workers):
        self._workers = workers
        rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
        trainers = (
            training_nodes(trainer.nnodes, trainer.n_gpus_per_node, "CPU")
            if compat.is_cpu()
            else []
        )
        self._groups = compat.placement_groups(
            [rollout.n_gpus_per_node] * rollout.nnodes, taken=trainers
        )
        places = [
            _within(group, index)
            for group in self._groups
            for index in range(rollout.n_gpus_per_node)
        ]
        self.names = [server_name(rank) for rank in range(len(places))]
        self.servers: list[ray.actor.ActorHandle] = asyncio.run(
            _start_all(self.names, places, rollout, config.actor_rollout_ref.model)
        )

    def serve(self, trainer) -> None:
        """Puts them where verl's trainer, which has started none, has its own."""
        manager = trainer.llm_server_manager
        manager.server_handles, manager.server_addresses = self.servers, self.names
        trainer.checkpoint_manager = self

    def update_weights(self, global_steps: int) -> None:
        """Sends the actor's weights to every server."""
        ray.get(self._workers.send_weights_to(self.servers, global_steps))

    def sleep_replicas(self) -> None:
        """Does nothing: no one else needs their devices."""


async def _start_all(names: list[str], places: list[dict], rollout, model) -> list:
    calls = [
        start_server(name, place, rollout, model, rank)
        for rank, (name, place) in enumerate(zip(names, places, strict=True))
    ]
    return list(await asyncio.gather(*calls))


def _within(group, index: int) -> dict[str, Any]:
    """Options of an actor in one of a placement group's bundles."""
    there = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {"num_cpus": 1, "num_gpus": 0 if compat.is_cpu() else 1, "scheduling_strategy": there}
