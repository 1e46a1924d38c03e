"""Reward functions, loaded by the driver before Ray starts, as the reward workers will load them."""

from __future__ import annotations

from omegaconf import DictConfig

from grpo_latent.rewards.functions import specs_from_config
from grpo_latent.rewards.runner import RewardRunner
from grpo_latent.verl_plugin.rewards.manager import reward_settings


def check_rewards(config: DictConfig) -> None:
    """Loads the functions of `latent.reward` once, in a process of their own, and ends it.

    Raises:
        ConfigError: no function, a setting that is not usable, a file that is missing or does not
            import, a function that it lacks or that cannot be called.
    """
    settings = reward_settings(config)
    functions = specs_from_config(settings.pop("functions"))
    with RewardRunner(functions, **{**settings, "num_processes": 1}):
        pass
