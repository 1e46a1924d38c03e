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
from grpo_latent.latent.treatments.registry import names_without_parameters
from grpo_latent.rollout.vllm.skeleton import check_mechanism
from grpo_latent.verl_plugin.boot.layout import (
    check_layout,
    check_model,
    check_padding,
)
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.boot.registration import (
    AGENT_LOOP_NAME,
    ALGORITHM_NAME,
    MANAGER_PATH,
    ROLLOUT_NAME,
    TRAINER_MODE,
    VLLM_ROLLOUT_NAME,
)
from grpo_latent.verl_plugin.rewards.manager import reward_settings
from grpo_latent.verl_plugin.trainer.config_relations import check_relations, check_room
from grpo_latent.verl_plugin.trainer.config_schema import check_schema
from grpo_latent.verl_plugin.trainer.guards import check_guards
from grpo_latent.verl_plugin.trainer.wandb_board import check_board

REWARD_MANAGER = "grpo_latent"


def check_config(config: DictConfig) -> LatentOptions:
    """Raises `ConfigError` at the first unusable value, naming its key.

    Returns:
        the `latent:` group, parsed.
    """
    check_schema(config)
    options = LatentOptions.from_rollout(config.actor_rollout_ref.rollout)
    _check_components(config)
    _check_dropping(config)
    _check_unsupported(config)
    _check_lora(config, options)
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
        _check_vllm(config, options)
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


def _require(
    config: DictConfig, key: str, allowed: tuple, what: str, fix: str | None = None
) -> Any:
    value = OmegaConf.select(config, key)
    if value not in allowed:
        raise ConfigError(
            what, where=key, got=value, expected=" or ".join(map(str, allowed)), fix=fix
        )
    return value


# verl's other modes, and why latents do not go through them
ASYNCHRONOUS = {
    "colocate_async": "it cuts trajectories off at each change of weights and goes on with their "
    "text, which has no latent vectors",
    "separate_async": "it cuts trajectories off at each change of weights and goes on with their "
    "text, which has no latent vectors, and trains with a worker that replays none",
}


def _check_components(config: DictConfig) -> None:
    """Requires that trainer mode, engine, rollout, agent loop and rewards belong together."""
    rollout = "actor_rollout_ref.rollout"
    modes = (TRAINER_MODE, "sync")  # the trainer itself poses as verl's sync
    mode = OmegaConf.select(config, "trainer.v1.trainer_mode")
    reason = ASYNCHRONOUS.get(mode)
    what = f"not a trainer for latents: {reason}" if reason else "not a trainer for latents"
    _require(
        config,
        "trainer.v1.trainer_mode",
        modes,
        what,
        f"Set trainer.v1.trainer_mode={TRAINER_MODE}.",
    )
    _require(config, "actor_rollout_ref.actor.strategy", ("fsdp2",), "the latent engine is FSDP2")
    if config.actor_rollout_ref.ref.strategy != config.actor_rollout_ref.actor.strategy:
        raise ConfigError(
            "actor and reference differ",
            where="actor_rollout_ref.ref.strategy",
            expected="the actor's strategy",
        )
    backends = (ROLLOUT_NAME, VLLM_ROLLOUT_NAME)
    required: tuple[tuple[str, tuple, str], ...] = (
        (f"{rollout}.name", backends, "not a rollout backend for latents"),
        (
            f"{rollout}.agent.default_agent_loop",
            (AGENT_LOOP_NAME,),
            "not an agent loop for latents",
        ),
        (
            f"{rollout}.agent.agent_loop_manager_class",
            (MANAGER_PATH,),
            "not a manager for latents",
        ),
        (f"{rollout}.tensor_model_parallel_size", (1,), "a rollout engine runs on one device"),
        (
            f"{rollout}.calculate_log_probs",
            (True,),
            "the replay gap needs the rollout's log-probs",
        ),
        ("reward.reward_manager.name", (REWARD_MANAGER,), "rewards must not see latent spans"),
    )
    for key, allowed, what in required:
        _require(config, key, allowed, what)


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


# options of verl's that must stay unset, and why
UNSUPPORTED = {
    "algorithm.filter_groups.enable": "refills depend on timing, so runs would not repeat",
    "trainer.v1.sampler.sync_refill_failed_groups": "failed rollouts stop the run",
    "actor_rollout_ref.actor.use_prefix_grouper": "rows are replayed one by one",
    "critic.enable": "advantages are group-relative",
    "algorithm.rollout_correction.bypass_mode": "old log-probs must be replayed, or the replay "
    "gap is always 0",
    "actor_rollout_ref.rollout.multi_turn.enable": "a trajectory is one completion",
    "actor_rollout_ref.rollout.ignore_eos": "a completion ends at EOS",
    "reward.reward_model.enable_resource_pool": "not tried with latents",
    # one without a pool of its own is colocated: verl sends it tokens, and neither text nor
    # ground truth
    "reward.reward_model.enable": "it would read placeholders of latents; a reward function can "
    "ask a judge",
    "distillation.enabled": "a teacher would score the placeholders of latents",
    "data.apply_chat_template_kwargs": "prompts are made as SFT makes them",
    "data.mm_processor_kwargs": "prompts are made as SFT makes them",
}


def _check_unsupported(config: DictConfig) -> None:
    """Refuses what verl offers and latent training has not."""
    for key, reason in UNSUPPORTED.items():
        got = OmegaConf.select(config, key, default=None)
        if got:
            raise ConfigError(
                "not supported with latents", where=key, got=got, expected=f"unset ({reason})"
            )
    ulysses = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
    if int(OmegaConf.select(config, ulysses, default=1)) > 1:
        raise ConfigError(
            "not supported with latents",
            where=ulysses,
            got=OmegaConf.select(config, ulysses),
            expected="1",
        )


def _check_lora(config: DictConfig, options: LatentOptions) -> None:
    """Refuses settings of adapters that verl's FSDP2 path would read otherwise, or not at all."""
    model, checkpoint = "actor_rollout_ref.model", "actor_rollout_ref.actor.checkpoint"

    def get(key: str) -> Any:
        return OmegaConf.select(config, key, default=None)

    has_lora = bool(get(f"{model}.lora_rank"))
    trains_more = bool(options.lora_trains) or options.treatment.has_parameters
    refused = (
        (
            f"{model}.lora.merge",
            has_lora and not get(f"{model}.lora.merge"),
            "True: rollout engines take merged weights only",
        ),
        (
            f"{model}.lora.rank",
            bool(get(f"{model}.lora.rank")),
            "0: that is Megatron's, FSDP2 reads model.lora_rank",
        ),
        (
            f"{model}.lora_adapter_path",
            get(f"{model}.lora_adapter_path") is not None,
            "null: the reference would be the model without it; begin from a folder with the "
            "adapter merged",
        ),
        (
            f"{model}.target_parameters",
            has_lora and bool(get(f"{model}.target_parameters")),
            "null: adapters stand on linear layers",
        ),
        (
            f"{checkpoint}.save_lora_only",
            has_lora and bool(get(f"{checkpoint}.save_lora_only")) and trains_more,
            "False, or nothing that trains beside the adapters (latent.lora_trains=[], a treatment "
            "without parameters): it would not be saved",
        ),
    )
    for where, is_refused, expected in refused:
        if is_refused:
            raise ConfigError(
                "not supported with latents", where=where, got=get(where), expected=expected
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


def _check_vllm(config: DictConfig, options: LatentOptions) -> None:
    """Refuses what engine vllm cannot do, as far as it shows without the checkpoint.

    `check_latents` has the rest.
    """
    treatment, rollout = options.treatment, config.actor_rollout_ref.rollout
    refused = (
        ("latent.visibility", options.visibility == "latents_only", options.visibility, "full"),
        ("latent.selection", options.draw_temperature is not None, options.selection, "top_k"),
        (
            "latent.treatment.name",
            treatment.has_parameters,
            type(treatment).__name__,
            f"one without parameters of its own ({names_without_parameters()})",
        ),
        (
            "actor_rollout_ref.rollout.data_parallel_size",
            rollout.data_parallel_size > 1,
            rollout.data_parallel_size,
            "1",
        ),
        ("actor_rollout_ref.rollout.load_format", rollout.load_format == "dummy", "dummy", "auto"),
    )
    for where, is_refused, got, expected in refused:
        if is_refused:
            fix = f"Use engine hf (actor_rollout_ref.rollout.name={ROLLOUT_NAME}), or set {where}."
            raise ConfigError(
                "engine vllm does not run this", where=where, got=got, expected=expected, fix=fix
            )
    if config.trainer.device == "cpu" and rollout.free_cache_engine:
        raise ConfigError(
            "vLLM's CPU worker does not sleep",
            where="actor_rollout_ref.rollout.free_cache_engine",
            got=True,
            expected="False on CPU, where trainer and rollout share the memory anyway",
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
