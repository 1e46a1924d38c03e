"""verl's reward manager `grpo_latent`: rewards see text without latents, failures are typed.

reward.reward_manager.name=grpo_latent
reward.custom_reward_function.path=my_reward.py
    one function of one's own: this override is enough
latent.reward.functions=[{path, name, weight, term, kwargs}, …]
    several, weighted; used if there is no custom one
latent.reward.timeout_s=30  latent.reward.on_error=raise|drop|score  latent.reward.error_score=0.0
latent.reward.num_processes=1
    processes that run the functions, in each of verl's reward workers
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl import DataProto
from verl.experimental.reward_loop.reward_manager import register
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from grpo_latent.common.settings import check_keys, section
from grpo_latent.errors import PluginError
from grpo_latent.rewards.functions import specs_from_config
from grpo_latent.rewards.runner import DEFAULT_TIMEOUT_S, RewardItem, RewardRunner
from grpo_latent.verl_plugin.boot.threads import in_thread

logger = logging.getLogger(__name__)

NAME = "grpo_latent"
SETTINGS = ("functions", "timeout_s", "on_error", "error_score", "num_processes")


@register(NAME)
class LatentRewardManager(RewardManagerBase):
    """Scores one trajectory at a time, for verl's `RewardLoopWorker`.

    `compute_score`, the function that verl has already imported into this process, goes unused: a
    function that hangs can only be killed in a process of its own, where it is loaded from the
    same file.

    Raises:
        ConfigError: settings are not usable, or a function cannot be loaded.
    """

    def __init__(
        self,
        config,
        tokenizer,
        compute_score,
        reward_router_address=None,
        reward_model_tokenizer=None,
    ):
        super().__init__(config, tokenizer, compute_score)
        settings = reward_settings(config)
        hand_judge(settings, reward_router_address, reward_model_tokenizer)
        num_processes = settings.get("num_processes", 1)
        self.runner = RewardRunner(
            specs_from_config(settings["functions"]),
            timeout_s=settings.get("timeout_s", DEFAULT_TIMEOUT_S),
            on_error=settings.get("on_error", "raise"),
            error_score=settings.get("error_score", 0.0),
            num_processes=num_processes,
        )
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="reward")

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Reward of the last row of `data`, and what verl stores as `reward_extra_info`.

        With `on_error=drop` a trajectory on which a function failed comes back with `reward_score`
        0 and `dropped` 1.0. The 0 only stands in for a number that verl needs: the trainer must
        clear the `response_mask` of such a row, which also takes it out of its group's baseline
        (`verl_plugin/worker/algo.py`).

        Raises:
            PluginError: the agent loop did not report the text and the latent summary.
            RewardError: a function failed, and `on_error` is `raise`.
        """
        item = reward_item(data[-1:][0].non_tensor_batch)
        result = await in_thread(self._threads, self.runner.score, item)
        return {"reward_score": result.score, "reward_extra_info": result.info()}


def reward_settings(config: DictConfig) -> dict[str, Any]:
    """`latent.reward` as plain values; a custom function replaces the list of functions."""
    node = OmegaConf.select(config, "latent.reward")
    if node is None:
        node = OmegaConf.select(config, "actor_rollout_ref.rollout.custom.latent.reward")
    settings = section(node, "latent.reward")
    check_keys(settings, SETTINGS, "latent.reward")
    settings = {key: value for key, value in settings.items() if value is not None}
    settings["functions"] = [dict(function) for function in settings.get("functions", [])]
    name = "reward.custom_reward_function"
    custom = section(OmegaConf.select(config, name), name)
    if custom.get("path"):
        if settings["functions"]:
            logger.warning(
                "reward.custom_reward_function replaces latent.reward.functions (%s)",
                ", ".join(str(function.get("path")) for function in settings["functions"]),
            )
        function = {
            "path": custom["path"],
            "name": custom.get("name"),
            "kwargs": custom.get("reward_kwargs"),
        }
        settings["functions"] = [function]
    return settings


def hand_judge(settings: dict[str, Any], router_address: str | None, tokenizer: Any) -> None:
    """Gives every function of `settings` the address and tokenizer of verl's reward model.

    verl itself does so with its one function.

    Args:
        settings: of `reward_settings`; changed in place.
        router_address: None where there is no reward model, which leaves the settings as they are.
    """
    if router_address is None:
        return
    judge = {"reward_router_address": router_address, "reward_model_tokenizer": tokenizer}
    for function in settings["functions"]:
        function["kwargs"] = {**(function.get("kwargs") or {}), **judge}


def judge_tokenizer(config: DictConfig) -> Any:
    """The tokenizer of verl's reward model; None without one."""
    if not config.reward.reward_model.enable:
        return None
    from verl.utils import hf_tokenizer
    from verl.utils.fs import copy_to_local

    # verl passes its `trust_remote_code` of the reward model on; nothing here runs code out of a
    # model's folder, so a judge whose tokenizer needs that raises
    return hf_tokenizer(copy_to_local(config.reward.reward_model.model_path))


def reward_item(row: Mapping[str, Any]) -> RewardItem:
    """What the functions get to see of a row of verl's `non_tensor_batch`."""
    reported = row.get("tool_extra_fields") or {}
    missing = [key for key in ("solution_str", "latent") if reported.get(key) is None]
    if missing:
        raise PluginError(
            "the agent loop did not say what the rewards may see",
            where=f"extra_fields of the agent loop output (uid {row.get('uid')})",
            got=f"no {missing}; keys {sorted(reported)}",
            expected="solution_str and latent, as grpo_latent.rewards.view.reward_view "
            "builds them",
            fix="Set actor_rollout_ref.rollout.agent.default_agent_loop to the agent loop "
            "of grpo_latent.",
        )
    extra_info = dict(row.get("extra_info") or {})
    extra_info["latent"] = reported["latent"]
    extra_info["num_turns"] = int(row.get("__num_turns__") or 0)
    return RewardItem(
        data_source=row["data_source"],
        solution_str=reported["solution_str"],
        ground_truth=row["reward_model"]["ground_truth"],
        extra_info=extra_info,
        where=f"group {row.get('uid')}, trajectory {row.get('session_id')} "
        f"(data source {row['data_source']!r}, row {extra_info.get('index')})",
    )
