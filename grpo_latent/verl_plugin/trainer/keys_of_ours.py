"""What `latent:`, rewards, Ray and TransferQueue may hold, and the table of all keys."""

from __future__ import annotations

from grpo_latent.common.kinds import (
    Kind,
    anything,
    choice,
    entries,
    flag,
    null_or,
    number,
    only,
    share,
    some,
    text,
    whole,
)
from grpo_latent.verl_plugin.trainer.keys_of_verl import PATH, SEED, VERL

# of ray.init, beside those of its options that begin with an underscore
RAY_INIT = (
    "address",
    "num_cpus",
    "num_gpus",
    "resources",
    "labels",
    "object_store_memory",
    "local_mode",
    "ignore_reinit_error",
    "include_dashboard",
    "dashboard_host",
    "dashboard_port",
    "job_config",
    "configure_logging",
    "logging_level",
    "logging_format",
    "logging_config",
    "log_to_driver",
    "namespace",
    "runtime_env",
    "enable_resource_isolation",
    "cgroup_path",
    "system_reserved_cpu",
    "system_reserved_memory",
    "proxy_server_url",
)

LATENT: dict[str, Kind] = {
    "latent.output_dir": PATH,
    "latent.seed": SEED,
    "latent.visibility": null_or(choice("full", "latents_only")),
    "latent.steps": null_or(whole(0)),
    "latent.exit": null_or(choice("steps", "end_token", "latent_end")),
    "latent.max_spans": null_or(whole(0)),
    "latent.start_is_action": null_or(flag()),
    "latent.selection": choice("top_k", "plackett_luce"),
    "latent.selection_temperature": number(above=0),
    "latent.replay_logp_gap_bound": null_or(number(above=0)),
    "latent.dump_every": whole(0, why="0: never"),
    "latent.dump_dir": PATH,
    "latent.cpu_threads": whole(1),
    "latent.placement": choice("beside", "apart"),
    "latent.max_batch_rows": whole(1),
    "latent.max_latents": null_or(whole(1)),
    "latent.max_skipped_updates": whole(1),
    "latent.lora_trains": some(choice("latents", "lm_head"), at_least=0),
    "latent.rollout_timeout_s": number(above=0),
    "latent.preflight.num_prompts": whole(0, why="0: none"),
    "latent.preflight.min_emission_rate": share(),
    "latent.usage.num_prompts": whole(0, why="0: none"),
    "latent.usage.prompts_per_batch": whole(1),
    "latent.usage.margin": number(above=0, below=1),
    "latent.usage.chance": number(at_least=0, below=1),
    "latent.alarm.patience": whole(1),
    "latent.alarm.min_frac_rollouts": share(),
    "latent.reward.functions": some(entries("{path, name, weight, term, kwargs}"), at_least=0),
    "latent.reward.timeout_s": number(above=0),
    "latent.reward.on_error": choice("raise", "drop", "score"),
    "latent.reward.error_score": number(),
    "latent.reward.num_processes": whole(1),
}

REWARD: dict[str, Kind] = {
    "reward.num_workers": whole(1),
    "reward.timeout": number(above=0),
    "reward.reward_kwargs": entries("arguments of a reward manager of verl's"),
    "reward.custom_reward_function.path": null_or(PATH),
    "reward.custom_reward_function.name": null_or(text("a function's name")),
    "reward.custom_reward_function.reward_kwargs": null_or(entries("arguments of the function")),
    "reward.reward_manager.source": only("register", "the manager of latents is registered"),
    "reward.reward_manager.module": null_or(entries("of a manager of your own")),
    "reward.reward_manager.module.*": null_or(text()),
    "reward.sandbox_fusion.max_concurrent": whole(1),
    "reward.sandbox_fusion.memory_limit_mb": whole(1),
}

RUN: dict[str, Kind] = {
    "transfer_queue.backend.SimpleStorage.total_storage_size": whole(1),
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": whole(1),
    "transfer_queue.metrics.port": whole(0),
    "ray_kwargs.timeline_json_file": null_or(PATH),
    **{f"ray_kwargs.ray_init.{name}": anything() for name in RAY_INIT},
    "ray_kwargs.ray_init._*": anything(),
    "ray_kwargs.ray_init.num_cpus": null_or(whole(1)),
    "ray_kwargs.ray_init.num_gpus": null_or(whole(0)),
    "ray_kwargs.ray_init.object_store_memory": null_or(whole(80_000_000, why="Ray's least")),
    "ray_kwargs.ray_init.include_dashboard": null_or(flag()),
    "actor_rollout_ref.*.profiler.save_path": null_or(PATH),
    "global_profiler.steps": null_or(some(whole(0), at_least=0)),
    "global_profiler.save_path": null_or(PATH),
    "critic.enable": null_or(flag()),
}

KEYS: dict[str, Kind] = {
    **VERL,
    **LATENT,
    **REWARD,
    **RUN,
}

# what is below them is somebody else's: a model's, an engine's, Ray's
FREE = frozenset(
    {
        "actor_rollout_ref.model.override_config",
        "actor_rollout_ref.rollout.engine_kwargs",
        "actor_rollout_ref.rollout.custom",
        "actor_rollout_ref.rollout.server",
        "actor_rollout_ref.rollout.layer_name_map",
        "actor_rollout_ref.actor.profiler",
        "actor_rollout_ref.ref.profiler",
        "actor_rollout_ref.rollout.profiler",
        "ray_kwargs.ray_init.runtime_env",
        "distillation.teacher_models",
        "reward.reward_kwargs",
        "global_profiler.global_tool_config",
    }
)
# each has a class of its own, which says what its keys are and may hold
CLASSES = frozenset({"latent.treatment", "latent.usage", "latent.alarm", "latent.settings"})
