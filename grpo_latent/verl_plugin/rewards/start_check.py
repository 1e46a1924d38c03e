"""Reward functions, loaded and called by the driver before Ray starts, as reward workers do it."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from grpo_latent.common.paths import is_remote
from grpo_latent.data.files import RowKeys, iter_verl_rows
from grpo_latent.errors import RewardError
from grpo_latent.rewards.check import completions
from grpo_latent.rewards.functions import specs_from_config
from grpo_latent.rewards.runner import RewardItem, RewardRunner
from grpo_latent.verl_plugin.rewards.manager import reward_settings


def check_rewards(config: DictConfig) -> list[str]:
    """Loads the functions of `latent.reward` in a process of their own and calls them on a row.

    They get its true answer in `<answer>` tags: what fails on that, fails on every trajectory.

    Returns:
        what the user should know.

    Raises:
        ConfigError: no function, a setting that is not usable, a file that is missing or does not
            import, a function that it lacks or that cannot be called.
        RewardError: a function fails on the row, and `latent.reward.on_error` is `raise`.
    """
    settings = reward_settings(config)
    functions = specs_from_config(settings.pop("functions"))
    with RewardRunner(functions, **{**settings, "num_processes": 1}) as runner:
        if OmegaConf.select(config, "reward.reward_model.enable", default=False):
            return ["the reward was not tried on a row: its judge starts with the workers"]
        item = first_item(config)
        if item is None:
            return []
        on_error, runner.on_error = runner.on_error, "raise"  # it is to be heard of in any case
        try:
            runner.score(item)
        except RewardError as error:
            if on_error == "raise":
                raise
            return [str(error)]
    return []


def first_item(config: DictConfig) -> RewardItem | None:
    """The first training row with its own true answer; None of files that lie elsewhere."""
    files = config.data.train_files
    path = files if isinstance(files, str) else files[0]
    if is_remote(path):
        return None
    row, where = next(iter_verl_rows(path, RowKeys.of(config.data)))
    truth = (row["reward_model"] or {}).get("ground_truth")
    right = completions(str(truth), "")[0]
    extra_info = {**(row.get("extra_info") or {}), "latent": right.latent, "num_turns": 2}
    return RewardItem(row["data_source"], right.solution_str, truth, extra_info, where)
