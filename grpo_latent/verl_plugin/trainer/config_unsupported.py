"""What verl offers and latents do not go through: its other components, options, adapters, vLLM.

Each reason stands beside what it refuses.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from grpo_latent.errors import ConfigError
from grpo_latent.latent.treatments.registry import names_without_parameters
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.boot.registration import (
    AGENT_LOOP_NAME,
    MANAGER_PATH,
    ROLLOUT_NAME,
    TRAINER_MODE,
    VLLM_ROLLOUT_NAME,
)

REWARD_MANAGER = "grpo_latent"


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


def check_components(config: DictConfig) -> None:
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
    "actor_rollout_ref.model.custom_chat_template": "prompts are made as SFT makes them, by the "
    "template in the model's folder",
    "actor_rollout_ref.model.tokenizer_path": "the tokenizer is the one in the model's folder",
}


def check_unsupported(config: DictConfig) -> None:
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


def check_lora(config: DictConfig, options: LatentOptions) -> None:
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
            "False, or nothing that trains beside the adapters (latent.lora_trains=[], a "
            "treatment without parameters): it would not be saved",
        ),
    )
    for where, is_refused, expected in refused:
        if is_refused:
            raise ConfigError(
                "not supported with latents", where=where, got=get(where), expected=expected
            )


def check_vllm(config: DictConfig, options: LatentOptions) -> None:
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
