"""Helpers of a run: actors that need no training worker, started beside it.

verl starts one kind of actor after the other, and each spends its first seconds on imports:

    verl      training workers ▶ reward workers ▶ rollout servers ▶ agent loop workers
    here      training workers ▶ rollout servers
              reward workers, agent loop workers
    one node  training workers
    of CPUs   rollout servers, reward workers, agent loop workers
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from omegaconf import DictConfig
from verl.experimental.reward_loop.reward_loop import RewardLoopManager
from verl.trainer.ppo.v1 import trainer_base
from verl.utils.config import omega_conf_to_dataclass

from grpo_latent.verl_plugin.boot import compat
from grpo_latent.verl_plugin.boot.cluster_resources import alive_nodes
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.boot.registration import ROLLOUT_NAME
from grpo_latent.verl_plugin.rollout.agent_loop import start_agent_loop_workers
from grpo_latent.verl_plugin.rollout.replica import (
    LatentServerManager,
    beside,
    make_server,
    server_name,
)


def make_servers(config: DictConfig) -> list[ray.actor.ActorHandle]:
    """Rollout servers, where their places are known before there are training workers.

    Elsewhere a server waits for its worker, to be asked for node and device. None with engine
    vllm, and none apart.
    """
    actor_rollout, nodes = config.actor_rollout_ref, alive_nodes()
    is_beside = LatentOptions.from_rollout(actor_rollout.rollout).placement == "beside"
    is_hf = actor_rollout.rollout.name == ROLLOUT_NAME
    if not (is_hf and is_beside and compat.is_cpu() and len(nodes) == 1):
        return []
    place = beside(nodes[0]["NodeID"], None)
    # as verl's replicas have it, which take these servers by their names
    rollout = omega_conf_to_dataclass(actor_rollout.rollout)
    return [
        make_server(server_name(rank), place, rollout, actor_rollout.model, rank)
        for rank in range(config.trainer.n_gpus_per_node)
    ]


@contextmanager
def helpers_first(config: DictConfig) -> Iterator[list[ray.actor.ActorHandle]]:
    """Starts helpers, and has verl's `_setup`, which is called within, take those.

    Yields:
        agent loop workers and rollout servers. Whoever needs them takes them by their names later,
        and names last as long as somebody holds the actors.
    """
    named = [*start_agent_loop_workers(config), *make_servers(config)]
    # a reward model has its place on the training workers' devices, after them
    started = None if config.reward.reward_model.enable else RewardLoopManager(config)

    def reward_loop_manager(**arguments) -> RewardLoopManager:
        return started or RewardLoopManager(**arguments)

    with compat.replaced(
        trainer_base,
        RewardLoopManager=reward_loop_manager,
        LLMServerManager=LatentServerManager,
    ):
        yield named
