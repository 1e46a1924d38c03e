"""Combinations of options that latent training refuses at once.

verl would only find them out an hour in, or never.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, AutoTokenizer

from grpo_latent.common.settings import build
from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.eval.usage import UsageSettings
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.models.loading import tensor_names
from grpo_latent.rollout.vllm.skeleton import check_mechanism
from grpo_latent.verl_plugin.boot.layout import (
    check_layout,
    check_model,
    check_padding,
)
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.boot.registration import (
    ALGORITHM_NAME,
    ROLLOUT_NAME,
    VLLM_ROLLOUT_NAME,
)
from grpo_latent.verl_plugin.rewards.manager import reward_settings
from grpo_latent.verl_plugin.trainer.config_relations import check_relations, check_room
from grpo_latent.verl_plugin.trainer.config_schema import check_schema
from grpo_latent.verl_plugin.trainer.config_unsupported import (
    check_components,
    check_lora,
    check_unsupported,
    check_vllm,
)
from grpo_latent.verl_plugin.trainer.guards import check_guards
from grpo_latent.verl_plugin.trainer.wandb_board import check_board


def check_config(config: DictConfig) -> LatentOptions:
    """Raises `ConfigError` at the first unusable value, naming its key.

    Returns:
        the `latent:` group, parsed.
    """
    check_schema(config)
    options = LatentOptions.from_rollout(config.actor_rollout_ref.rollout)
    check_components(config)
    _check_dropping(config)
    check_unsupported(config)
    check_lora(config, options)
    _check_groups(config)
    _check_batches(config)
    _check_placement(config, options)
    check_layout(
        config.actor_rollout_ref.model, options.visibility, options.draw_temperature is not None
    )
    _check_treatment(config, options)
    check_relations(config)
    check_board(config)
    build(UsageSettings, options.usage, "latent.usage")
    check_guards(config, options)
    if config.actor_rollout_ref.rollout.name == VLLM_ROLLOUT_NAME:
        check_vllm(config, options)
    return options


def check_latents(config: DictConfig, latent: Mechanism) -> None:
    """Checks what rollout backend and layout ask of a checkpoint's latents, overrides applied.

    Raises:
        ConfigError: one of the two cannot run them.
    """
    check_room(config, latent)
    check_padding(latent.visibility, config.actor_rollout_ref.model.use_remove_padding)
    if config.actor_rollout_ref.rollout.name == VLLM_ROLLOUT_NAME:
        check_mechanism(latent)


def check_folder(config: DictConfig, options: LatentOptions) -> None:
    """What the checkpoint's folder tells without its weights, before any worker loads them.

    Raises:
        CheckpointError: a file of it cannot be read, no latents, or a tokenizer that disagrees.
        ConfigError: a model, latents or a treatment that this config cannot train.
    """
    folder = config.actor_rollout_ref.model.path
    hf_config = _read(folder, "config.json", AutoConfig.from_pretrained)
    latent = options.mechanism(
        folder, _read(folder, "the tokenizer", AutoTokenizer.from_pretrained)
    )
    options.treatment.check(latent)
    check_model(hf_config)
    check_latents(config, latent)
    _check_adapted(config)


def _check_adapted(config: DictConfig) -> None:
    """Raises `ConfigError` where adapters are asked for on modules that the folder has not.

    Only last names are compared: a file's names in front of them differ from the modules'. A text
    is a pattern of the modules' whole names, which the worker looks for.
    """
    model = config.actor_rollout_ref.model
    if not model.lora_rank or isinstance(model.target_modules, str):
        return
    modules = {name.rpartition(".")[0] for name in tensor_names(model.path)}
    ends = {module.rpartition(".")[2] for module in modules}
    for name in model.target_modules:
        if ends and name.rpartition(".")[2] not in ends:
            raise ConfigError(
                "no such module in the model",
                where="actor_rollout_ref.model.target_modules",
                got=name,
                expected=f"all-linear, or among {sorted(e for e in ends if not e.isdigit())}",
            )


def _read(folder: str, what: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(folder)
    # OSError, ValueError, KeyError, and a bare Exception of the tokenizers library
    except Exception as error:
        raise CheckpointError(
            f"{what} cannot be read",
            where=folder,
            got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            expected="the files that grpo_latent.sft has written",
            fix="Copy the folder again, or run SFT again.",
        ) from error


def _check_dropping(config: DictConfig) -> None:
    """Refuses an estimator that knows no dropped trajectories where rewards may drop some."""
    dropping = reward_settings(config).get("on_error") == "drop"
    if dropping and not str(config.algorithm.adv_estimator).startswith(ALGORITHM_NAME):
        raise ConfigError(
            "a dropped trajectory would count as reward 0",
            where="algorithm.adv_estimator",
            got=config.algorithm.adv_estimator,
            expected=f"{ALGORITHM_NAME} or {ALGORITHM_NAME}_rloo with latent.reward.on_error=drop",
        )


def _check_groups(config: DictConfig) -> None:
    group_size = config.actor_rollout_ref.rollout.n
    if group_size < 2:
        raise ConfigError(
            "a group of one has no baseline",
            where="actor_rollout_ref.rollout.n",
            got=group_size,
            expected=">= 2",
            fix="verl would give the only trajectory of a group its raw reward as advantage.",
        )
    temperature = config.actor_rollout_ref.rollout.temperature
    if not temperature > 0:
        raise ConfigError(
            "greedy rollouts make equal trajectories",
            where="actor_rollout_ref.rollout.temperature",
            got=temperature,
            expected="> 0",
        )


def _check_batches(config: DictConfig) -> None:
    """verl pads a batch that does not divide with synthetic rows, which have no latents."""
    actor, group_size = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    world_size = config.trainer.n_gpus_per_node * config.trainer.nnodes
    prompts, mini = config.data.train_batch_size, actor.ppo_mini_batch_size
    generated = config.data.get("gen_batch_size", None) or prompts
    checks = [
        ("data.train_batch_size", prompts, "actor_rollout_ref.actor.ppo_mini_batch_size", mini),
        (
            "actor_rollout_ref.actor.ppo_mini_batch_size * rollout.n",
            mini * group_size,
            "the number of ranks",
            world_size,
        ),
        ("data.train_batch_size", prompts, "data.gen_batch_size", generated),
    ]
    if not actor.use_dynamic_bsz:
        rows_of_rank = mini * group_size // world_size
        micro = actor.ppo_micro_batch_size_per_gpu
        log_prob_micro = config.actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu
        checks += [
            (
                "rows of a mini-batch a rank",
                rows_of_rank,
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
                micro,
            ),
            (
                "rows of a batch a rank",
                prompts * group_size // world_size,
                "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu",
                log_prob_micro,
            ),
        ]
        if actor.use_kl_loss or config.algorithm.use_kl_in_reward:
            ref_key = "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu"
            ref_micro = OmegaConf.select(config, ref_key)
            checks.append(
                ("rows of a batch a rank", prompts * group_size // world_size, ref_key, ref_micro)
            )
    for what, number, divisor_key, divisor in checks:
        if divisor is None:
            raise ConfigError(
                "not set", where=divisor_key, expected=f"a divisor of {what}={number}"
            )
        if number % divisor:
            raise ConfigError(
                f"does not divide {what}",
                where=divisor_key,
                got=divisor,
                expected=f"a divisor of {number}",
            )


def _check_placement(config: DictConfig, options: LatentOptions) -> None:
    """What rollout servers apart from trainers need."""
    rollout = config.actor_rollout_ref.rollout
    if options.placement == "beside":
        return
    refused = (
        ("name", rollout.name != ROLLOUT_NAME, rollout.name, f"{ROLLOUT_NAME} (engine hf)"),
        ("nnodes", rollout.nnodes < 1, rollout.nnodes, ">= 1, the nodes of the servers"),
    )
    for key, is_refused, got, expected in refused:
        if is_refused:
            raise ConfigError(
                "latent.placement=apart does not run with this",
                where=f"actor_rollout_ref.rollout.{key}",
                got=got,
                expected=expected,
                fix="Set it, or latent.placement=beside.",
            )


def _check_treatment(config: DictConfig, options: LatentOptions) -> None:
    """What a treatment needs of the rest of the config."""
    terms = options.terms
    has_reference = config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward
    for name, weight in options.treatment.reference_weights(terms).items():
        if weight and not has_reference:
            raise ConfigError(
                "there is no reference model",
                where=f"latent.treatment.{name}",
                got=weight,
                expected="actor_rollout_ref.actor.use_kl_loss=true",
                fix="Set it; actor_rollout_ref.actor.kl_loss_coef=0 leaves the text's KL out.",
            )
    if terms.kl_coef and not options.act_kinds:
        raise ConfigError(
            "latents without a density have no KL",
            where="latent.treatment.kl_coef",
            got=f"{terms.kl_coef} with {type(options.treatment).__name__}",
            expected="0, a treatment that acts (such as gaussian), or "
            "latent.selection=plackett_luce",
            fix="latent.treatment.anchor_weight holds the predictions of any treatment to "
            "the reference's.",
        )
    if options.act_kinds and not str(config.algorithm.adv_estimator).startswith(
        (ALGORITHM_NAME, "grpo", "rloo")
    ):
        raise ConfigError(
            "a latent takes its trajectory's advantage",
            where="algorithm.adv_estimator",
            got=config.algorithm.adv_estimator,
            expected="an estimator with one advantage a trajectory (grpo_latent, grpo, rloo)",
        )
