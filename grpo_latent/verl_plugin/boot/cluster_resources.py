"""Whether a Ray cluster has room for a run, asked before it would wait for ever, and where."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import Any

import ray
from omegaconf import DictConfig

from grpo_latent.errors import ConfigError


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's records of the nodes, by address."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return sorted(alive, key=lambda node: ipaddress.ip_address(node["NodeManagerAddress"]))


def cpus_needed(config: DictConfig) -> int:
    """Ray CPUs that the actors of a run ask for.

    That is verl's task runner, TransferQueue's controller and storage units, and, on CPU, one a
    worker or server apart. Helpers that hold none still need one to be placed.
    """
    storage = config.transfer_queue.backend.SimpleStorage.num_data_storage_units
    workers = config.trainer.n_gpus_per_node * config.trainer.nnodes
    placing = 1
    return 1 + storage + workers + num_apart(config) + placing


def num_apart(config: DictConfig) -> int:
    """How many rollout servers run apart from trainers."""
    rollout = config.actor_rollout_ref.rollout
    return rollout.nnodes * rollout.n_gpus_per_node if config.latent.placement == "apart" else 0


def check_resources(config: DictConfig) -> None:
    """Raises `ConfigError` if the cluster cannot hold the actors: Ray would wait in silence."""
    trainer, resources = config.trainer, ray.cluster_resources()
    if trainer.device != "cpu" and not resources.get("GPU"):
        raise ConfigError(
            "no node has a GPU",
            where="trainer.device",
            got=trainer.device,
            expected=f"{trainer.nnodes} nodes with {trainer.n_gpus_per_node} GPUs that Ray sees",
            fix="Set device=cpu, or see `grpo-latent doctor` and nvidia-smi on the nodes.",
        )
    needed = cpus_needed(config)
    available = resources.get("CPU", 0)
    if available < needed:
        raise ConfigError(
            "the Ray cluster has too few CPUs",
            where="ray",
            got=int(available),
            expected=f">= {needed}",
            fix="On your own machine start it with more logical CPUs than cores, e.g. ray "
            "start --head --num-cpus=16.",
        )
    if trainer.device != "cpu":
        training_nodes(trainer.nnodes, trainer.n_gpus_per_node, "GPU")
        return
    nodes = training_nodes(trainer.nnodes, trainer.n_gpus_per_node, "CPU")
    if num_apart(config):
        rollout = config.actor_rollout_ref.rollout
        training_nodes(rollout.nnodes, rollout.n_gpus_per_node, "CPU", taken=nodes)


def training_nodes(
    num_nodes: int, workers_each: int, resource: str, taken: Collection[str] = ()
) -> list[str]:
    """Ids of the nodes that training workers go to, by address; last the one that this runs on.

    That one has the driver, the trainer and what else there is one of.

    Args:
        resource: of which each worker holds one.
        taken: nodes that are others'.

    Raises:
        ConfigError: fewer nodes have so many of it.
    """
    nodes = [node for node in alive_nodes() if node["NodeID"] not in taken]
    here = ray.get_runtime_context().get_node_id()
    roomy = [node for node in nodes if node["Resources"].get(resource, 0) >= workers_each]
    if len(roomy) < num_nodes:
        had = {node["NodeManagerAddress"]: node["Resources"].get(resource, 0) for node in nodes}
        counts = ", ".join(f"{address} has {count:.0f}" for address, count in had.items())
        raise ConfigError(
            "too few nodes with room for the training workers",
            where="trainer.nnodes",
            got=f"{num_nodes}; {resource}s: {counts}",
            expected=f"{num_nodes} nodes with {workers_each}",
            fix="Choose trainer.nnodes and trainer.n_gpus_per_node for the nodes that there are.",
        )
    roomy.sort(key=lambda node: node["NodeID"] == here)  # stable
    return [node["NodeID"] for node in roomy[:num_nodes]]
