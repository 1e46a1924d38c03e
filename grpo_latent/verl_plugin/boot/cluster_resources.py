"""Whether a Ray cluster has room for a run, asked before it would wait for ever."""

from __future__ import annotations

import ray
from omegaconf import DictConfig

from grpo_latent.errors import ConfigError


def cpus_needed(config: DictConfig) -> int:
    """Ray CPUs that the actors of a run ask for.

    That is verl's task runner, TransferQueue's controller and storage units, and, on CPU, one a
    worker. Helpers that hold none still need one to be placed.
    """
    storage = config.transfer_queue.backend.SimpleStorage.num_data_storage_units
    workers = config.trainer.n_gpus_per_node * config.trainer.nnodes
    placing = 1
    return 1 + storage + workers + placing


def check_cpus(config: DictConfig) -> None:
    """Raises `ConfigError` if the cluster cannot hold the actors: Ray would wait in silence."""
    needed = cpus_needed(config)
    available = ray.cluster_resources().get("CPU", 0)
    if available < needed:
        raise ConfigError(
            "the Ray cluster has too few CPUs",
            where="ray",
            got=int(available),
            expected=f">= {needed}",
            fix="On your own machine start it with more logical CPUs than cores, e.g. ray "
            "start --head --num-cpus=16.",
        )
