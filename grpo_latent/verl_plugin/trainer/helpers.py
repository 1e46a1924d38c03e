"""Helpers of a run: actors that need no training worker, started beside it.

verl starts one kind of actor after the other, and each spends its first seconds on imports:

    verl    training workers ▶ reward workers ▶ rollout servers ▶ agent loop workers
    here    training workers ▶ rollout servers
            reward workers, agent loop workers
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from omegaconf import DictConfig
from verl.experimental.reward_loop.reward_loop import RewardLoopManager
from verl.trainer.ppo.v1 import trainer_base

from grpo_latent.verl_plugin.boot import compat
from grpo_latent.verl_plugin.rollout.agent_loop import start_agent_loop_workers
from grpo_latent.verl_plugin.rollout.replica import LatentServerManager


@contextmanager
def helpers_first(config: DictConfig) -> Iterator[list[ray.actor.ActorHandle]]:
    """Starts helpers, and has verl's `_setup`, which is called within, take those.

    Yields:
        the agent loop workers. Their manager takes them by their names later, and names last as
        long as somebody holds the workers.
    """
    workers = start_agent_loop_workers(config)
    # a reward model has its place on the training workers' devices, after them
    started = None if config.reward.reward_model.enable else RewardLoopManager(config)

    def reward_loop_manager(**arguments) -> RewardLoopManager:
        return started or RewardLoopManager(**arguments)

    with compat.replaced(
        trainer_base,
        RewardLoopManager=reward_loop_manager,
        LLMServerManager=LatentServerManager,
    ):
        yield workers
