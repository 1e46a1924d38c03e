"""Values that are fine by themselves and not together, and names that something must stand behind.

Each is asked before any worker starts; `config_schema` has seen types and ranges before.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Collection
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from grpo_latent.common.kinds import as_list
from grpo_latent.common.paths import check_output_folder, is_remote
from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.verl_plugin.trainer.checkpoint import resume_folder

CLIP_DEFAULT = 0.2  # verl's, of all three keys
# logger -> package that verl imports for it
LOGGER_PACKAGES = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "vemlp_wandb": "volcengine_ml_platform",
    "clearml": "clearml",
    "trackio": "trackio",
    "rl_insight": "rl_insight",
}
ATTENTION_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}
# estimator -> what it needs that no run of latents has
NO_ESTIMATORS = {
    "gae": "a critic; advantages are group-relative",
    "remax": "a greedy rollout beside each group",
}


def check_relations(config: DictConfig) -> None:
    """Raises `ConfigError` at the first pair that does not go together."""
    _check_paths(config)
    _check_names(config)
    _check_loss(config)
    _check_lengths(config)
    _check_resume(config)
    _check_packages(config)


def check_room(config: DictConfig, latent: Mechanism) -> None:
    """Raises `ConfigError` where latents of one span, or the slots, fill the whole response."""
    length = config.data.max_response_length
    num_positions = latent.num_slots(None) * (1 + latent.top_k_image) or latent.steps
    if num_positions < length:
        return
    raise ConfigError(
        "no room for text beside the latents",
        where="latent.steps",
        got=f"{num_positions} positions of latents, data.max_response_length={length}",
        expected=f"fewer than {length}",
        fix="Raise data.max_response_length, or lower latent.steps.",
    )


def _check_paths(config: DictConfig) -> None:
    for key in ("latent.output_dir", "latent.dump_dir", "trainer.default_local_dir"):
        path = OmegaConf.select(config, key)
        if path is not None:
            check_output_folder(path, key)
    for key in ("data.custom_cls.path", "actor_rollout_ref.rollout.agent.agent_loop_config_path"):
        path = OmegaConf.select(config, key)
        if path is not None and not is_remote(path) and not Path(path).expanduser().is_file():
            raise ConfigError(
                "no such file", where=key, got=path, expected="a file", fix="Check the path."
            )


def _check_names(config: DictConfig) -> None:
    """Estimators and losses, which may be a user's own, by verl's registries."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

    from grpo_latent.verl_plugin.worker import algo  # noqa: F401  (registers ours)

    _among(
        "algorithm.adv_estimator",
        config.algorithm.adv_estimator,
        [str(getattr(name, "value", name)) for name in ADV_ESTIMATOR_REGISTRY],
    )
    loss_mode = config.actor_rollout_ref.actor.policy_loss.loss_mode
    _among("actor_rollout_ref.actor.policy_loss.loss_mode", loss_mode, POLICY_LOSS_REGISTRY)
    if loss_mode == "bypass_mode":
        raise ConfigError(
            "not supported with latents",
            where="actor_rollout_ref.actor.policy_loss.loss_mode",
            got=loss_mode,
            expected="a loss of replayed log-probs, such as grpo_latent",
        )
    optimizer = config.actor_rollout_ref.actor.optim
    key = "actor_rollout_ref.actor.optim.optimizer"
    try:
        module = importlib.import_module(optimizer.optimizer_impl)
    except ImportError as error:
        raise ConfigError(
            "no such module",
            where=f"{key}_impl",
            got=f"{optimizer.optimizer_impl} ({error})",
            expected="a module with optimizers, such as torch.optim",
            fix="Install it, or take torch.optim.",
        ) from error
    classes = [name for name, value in vars(module).items() if isinstance(value, type)]
    _among(key, optimizer.optimizer, classes)


def _among(key: str, got: str, names: Collection[str]) -> None:
    if got in names:
        return
    near = difflib.get_close_matches(str(got), list(names), 1)
    raise ConfigError(
        "unknown value",
        where=key,
        got=got,
        expected=", ".join(sorted(names)),
        fix=f"Set {key}={near[0]}, the nearest spelling."
        if near
        else "One of your own has to be registered by a module of VERL_USE_EXTERNAL_MODULES.",
    )


def _check_loss(config: DictConfig) -> None:
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    key, estimator = "actor_rollout_ref.actor", algorithm.adv_estimator
    bounds = (actor.clip_ratio_low, actor.clip_ratio_high)
    if actor.clip_ratio != CLIP_DEFAULT and None not in bounds and {*bounds} != {actor.clip_ratio}:
        raise ConfigError(
            "not read where the two bounds are set",
            where=f"{key}.clip_ratio",
            got=f"{actor.clip_ratio}, clip_ratio_low and clip_ratio_high {bounds}",
            expected="the bounds' value, or null bounds",
            fix=f"Set {key}.clip_ratio_low and {key}.clip_ratio_high.",
        )
    wants_length = actor.loss_agg_mode == "seq-mean-token-sum-norm"
    needed = (
        (
            actor.policy_loss.loss_mode == "dro",
            f"{key}.policy_loss.dro_beta",
            "with loss_mode=dro",
        ),
        (wants_length, f"{key}.loss_scale_factor", f"with loss_agg_mode={actor.loss_agg_mode}"),
        (
            OmegaConf.select(config, "algorithm.rollout_correction.rollout_rs") is not None,
            "algorithm.rollout_correction.rollout_rs_threshold",
            "with rollout_rs",
        ),
        (estimator == "gdpo", "algorithm.gdpo_reward_keys", "with adv_estimator=gdpo"),
    )
    for is_needed, needed_key, why in needed:
        if is_needed and OmegaConf.select(config, needed_key) is None:
            raise ConfigError(
                "not set",
                where=needed_key,
                got="null",
                expected=f"a value {why}",
                fix=f"Set {needed_key}=….",
            )
    if estimator in NO_ESTIMATORS:
        raise ConfigError(
            "not supported with latents",
            where="algorithm.adv_estimator",
            got=estimator,
            expected=f"grpo_latent, or another without {NO_ESTIMATORS[estimator]}",
            fix="Set algorithm.adv_estimator=grpo_latent.",
        )
    if "optimal_token_baseline" in estimator and not actor.calculate_sum_pi_squared:
        raise ConfigError(
            "the estimator reads sums over the vocabulary",
            where=f"{key}.calculate_sum_pi_squared",
            got=False,
            expected=f"True with algorithm.adv_estimator={estimator}",
            fix=f"Set {key}.calculate_sum_pi_squared=true.",
        )


def _check_lengths(config: DictConfig) -> None:
    """A rollout's lengths are the data's: rewards, dumps and usage know no others."""
    rollout = config.actor_rollout_ref.rollout
    for name in ("prompt_length", "response_length"):
        key, data_key = f"actor_rollout_ref.rollout.{name}", f"data.max_{name}"
        expected = OmegaConf.select(config, data_key)
        if rollout[name] != expected:
            raise ConfigError(
                "two lengths for one thing",
                where=key,
                got=rollout[name],
                expected=f"{data_key}={expected}",
                fix=f"Set {data_key} only.",
            )
    num_positions = config.data.max_prompt_length + config.data.max_response_length
    if rollout.max_model_len is not None and rollout.max_model_len < num_positions:
        raise ConfigError(
            "shorter than a prompt and its response",
            where="actor_rollout_ref.rollout.max_model_len",
            got=rollout.max_model_len,
            expected=f">= data.max_prompt_length + data.max_response_length = {num_positions}",
            fix="Leave it out.",
        )
    steps, length = OmegaConf.select(config, "latent.steps"), config.data.max_response_length
    if steps is not None and steps >= length:
        raise ConfigError(
            "a span longer than the response",
            where="latent.steps",
            got=f"{steps}, data.max_response_length={length}",
            expected=f"fewer than {length}",
            fix="Raise data.max_response_length, or lower latent.steps.",
        )


def _check_resume(config: DictConfig) -> None:
    trainer = config.trainer
    if trainer.resume_from_path and trainer.resume_mode != "resume_path":
        raise ConfigError(
            "not read",
            where="trainer.resume_from_path",
            got=f"{trainer.resume_from_path} with trainer.resume_mode={trainer.resume_mode}",
            expected="null, or trainer.resume_mode=resume_path",
            fix="Set trainer.resume_mode=resume_path.",
        )
    if trainer.resume_mode == "resume_path":
        resume_folder(trainer)


def _check_packages(config: DictConfig) -> None:
    """What a name asks for is installed, and runs on this device."""
    for name in as_list(config.trainer.logger):
        _check_installed("trainer.logger", name, LOGGER_PACKAGES.get(name))
    key = "actor_rollout_ref.model.override_config.attn_implementation"
    attention = OmegaConf.select(config, key)
    package = ATTENTION_PACKAGES.get(attention)
    if package and config.trainer.device == "cpu":
        raise ConfigError(
            "kernels for GPUs only",
            where=key,
            got=f"{attention} with trainer.device=cpu",
            expected="sdpa or eager",
            fix=f"Set {key}=sdpa.",
        )
    _check_installed(key, attention, package)
    key = "actor_rollout_ref.model.external_lib"
    for name in as_list(OmegaConf.select(config, key) or []):
        _check_installed(key, name, name.partition(".")[0])


def _check_installed(key: str, name: str, package: str | None) -> None:
    if package is None or importlib.util.find_spec(package) is not None:
        return
    raise ConfigError(
        "not installed",
        where=key,
        got=f"{name}, which needs the package {package}",
        expected="a package that is installed",
        fix=f"Install {package}, or take {name} out of {key}.",
    )
