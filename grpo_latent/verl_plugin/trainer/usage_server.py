"""Who measures the use of latents: a server with engine hf, which alone can feed other vectors.

With rollout backend `hf_latent` that is the rollout server itself. With `vllm_latent` it is a
server of its own beside the first training worker, which gets the weights for each measurement and
frees the device after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray

from grpo_latent.verl_plugin.boot.registration import ROLLOUT_NAME
from grpo_latent.verl_plugin.rollout.replica import launch_server

NAME = "latent_usage_server"
SLEEP_TIMEOUT_S = 30.0


class UsageServer:
    """The trainer's end.

    Args:
        config: verl's, whole.
        workers: the worker group of the actor.
        rollout_servers: handles of the rollout servers.
    """

    def __init__(self, config, workers, rollout_servers: list):
        self._rollout = config.actor_rollout_ref.rollout
        self._model = config.actor_rollout_ref.model
        self._workers = workers
        self._rollout_servers = rollout_servers
        self._own: ray.actor.ActorHandle | None = None

    @contextmanager
    def holding(self, policy_version: int) -> Iterator[ray.actor.ActorHandle]:
        """A server with the actor's current weights, which are those of `policy_version`.

        One of its own sleeps again afterwards, whatever happened: training needs the device.
        """
        if self._rollout.name == ROLLOUT_NAME:
            yield self._rollout_servers[0]
            return
        own = self._own
        if own is None:
            own = self._own = asyncio.run(
                launch_server(NAME, self._workers.workers[0], self._rollout, self._model)
            )
        try:
            ray.get(self._workers.send_weights_to([own], policy_version))  # wakes it
            yield own
        except BaseException:
            # a server that died or hangs cannot sleep, and what went wrong says more
            with suppress(ray.exceptions.RayError):
                ray.get(own.sleep.remote(), timeout=SLEEP_TIMEOUT_S)
            raise
        ray.get(own.sleep.remote())
