"""What this package uses of verl beyond its public registries, as a table.

`tests/verl_plugin/boot/test_compat_contract.py` compares it with the installed verl, so an upgrade
names the symbol that changed instead of failing somewhere inside a Ray worker. What is done with
the symbols: `compat`, and the subclasses of verl's classes in the rooms beside it.
"""

from __future__ import annotations

from grpo_latent.common.seams import FIXES, Seam

__all__ = ["FIX", "RAY_SEAMS", "SEAMS", "Seam"]

FIX = FIXES["verl"]
_WORKERS = "verl.workers.engine_workers"
_ENGINE = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead"
_TRAINER = "verl.trainer.ppo.v1.trainer_base:PPOTrainer"
_AGENT = "verl.experimental.agent_loop.agent_loop"

SEAMS = (
    Seam(
        "rollout adapter",
        "verl.workers.rollout.base:_ROLLOUT_REGISTRY",
        "a private dict: verl has no register() for adapters",
    ),
    Seam(
        "engine lookup",
        "verl.workers.engine:EngineRegistry.register",
        "the latent engine registers as vendor 'latent'",
        ("model_type", "backend", "device", "vendor"),
    ),
    Seam(
        "engine: build",
        f"{_ENGINE}._build_module",
        "head and hook are added before FSDP wraps",
        ("self",),
    ),
    Seam(
        "engine: wrap",
        f"{_ENGINE}._build_fsdp_module",
        "pinned-memory offload is avoided on CPU",
        ("self", "module"),
    ),
    Seam(
        "engine: inputs",
        f"{_ENGINE}.prepare_model_inputs",
        "latents and masks enter here",
        ("self", "micro_batch"),
    ),
    Seam(
        "engine: forward",
        f"{_ENGINE}.forward_step",
        "the injector is armed around it",
        ("self", "micro_batch", "loss_function", "forward_only"),
    ),
    Seam(
        "engine: outputs",
        f"{_ENGINE}.prepare_model_outputs",
        "log-densities enter log_probs",
        ("self", "output", "output_args", "micro_batch", "logits_processor_func"),
    ),
    Seam(
        "engine: batch",
        f"{_ENGINE}.forward_backward_batch",
        "latents are counted over the mini-batch, as verl counts tokens",
        ("self", "data", "loss_function", "forward_only"),
    ),
    Seam(
        "engine: weights",
        f"{_ENGINE}.get_per_tensor_param",
        "replaced: full precision, module names",
        ("self", "layered_summon", "base_sync_done", "kwargs"),
    ),
    Seam(
        "engine: save",
        f"{_ENGINE}.save_checkpoint",
        "latent_config.json joins the Hugging Face folder",
        ("self", "local_path", "hdfs_path", "global_step", "max_ckpt_to_keep", "kwargs"),
    ),
    Seam(
        "engine: moves",
        f"{_ENGINE}.to",
        "an offloaded optimizer goes back to the host after a load",
        ("self", "device", "model", "optimizer", "grad"),
    ),
    Seam(
        "engine: adapters",
        f"{_ENGINE}._build_lora_module",
        "replaced: adapters in the decoder alone, and what trains beside them",
        ("self", "module"),
    ),
    Seam(
        "engine: reference",
        f"{_ENGINE}.disable_adapter",
        "what trains beside the adapters goes back to its start, too",
        ("self",),
    ),
    Seam(
        "export",
        "verl.utils.checkpoint.fsdp_checkpoint_manager:get_fsdp_full_state_dict",
        "replaced while an adapted model is saved: merged, under the plain model's names",
        ("model", "offload_to_cpu", "rank0_only"),
    ),
    Seam(
        "training worker",
        f"{_WORKERS}:TrainingWorker.__init__",
        "gloo is initialised before it, engine options are set after it",
        ("self", "config"),
    ),
    Seam(
        "actor worker",
        f"{_WORKERS}:ActorRolloutRefWorker.__init__",
        "subclassed; `actor_worker_cls` and `ref_worker_cls` name the training worker",
        ("self", "config", "role", "distillation_config", "kwargs"),
    ),
    Seam(
        "actor's loss",
        f"{_WORKERS}:TrainingWorker.set_loss_fn",
        "latent terms around verl's",
        ("self", "loss_fn"),
    ),
    Seam(
        "text's KL",
        "verl.workers.utils.losses:kl_penalty",
        "replaced: one estimate more, `low_var_kl_unclamped`",
        ("logprob", "ref_logprob", "kl_penalty"),
    ),
    Seam(
        "actor's models",
        f"{_WORKERS}:ActorRolloutRefWorker.init_model",
        "the loss is set after it",
        ("self",),
    ),
    Seam(
        "process group",
        "verl.utils.distributed:initialize_global_process_group_ray",
        "skipped when a group exists, which is how 'cpu:gloo,cpu:gloo' is avoided",
        ("timeout_second", "backend"),
    ),
    Seam(
        "resource pools",
        f"{_TRAINER}._init_resource_pool_mgr",
        "worker classes and CPU pools are set here",
        ("self",),
    ),
    Seam(
        "pool manager",
        "verl.single_controller.ray:ResourcePoolManager.create_resource_pool",
        "hard-codes use_gpu=True; replaced on CPU",
        ("self",),
    ),
    Seam(
        "placement groups",
        "verl.single_controller.ray:RayResourcePool.get_placement_groups",
        "replaced on CPU, where nothing else gives each group a node of its own",
        ("self", "strategy", "name", "device_name"),
    ),
    Seam(
        "replay buffer",
        f"{_TRAINER}._build_replay_buffer",
        "swapped for one that polls fast and sorts",
        ("self",),
    ),
    Seam(
        "batch order",
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._materialize_batch",
        "keys leave it sorted instead of in order of arrival",
        ("self", "partition_id", "selected_prompt_uids", "partition_snapshot"),
    ),
    Seam(
        "batch over ranks",
        f"{_TRAINER}._balance_batch",
        "replaced where ranks can have whole groups, their number in `_dispatch_info`",
        ("self", "batch", "metrics", "logging_prefix", "keep_minibatch"),
    ),
    Seam(
        "rows of a batch",
        f"{_TRAINER}._get_required_batch_multiple",
        "a batch of another size is left to verl, which fills it up",
        ("self", "dp_size"),
    ),
    Seam(
        "number of ranks",
        "verl.single_controller.base.worker:Worker._query_dispatch_info",
        "asked before verl would",
        ("self", "mesh_name"),
    ),
    Seam(
        "metadata poll",
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._sync_metadata_from_transfer_queue",
        "failed groups are raised right after it",
        ("self",),
    ),
    Seam(
        "saving",
        f"{_TRAINER}._save_checkpoint",
        "replaced: the tracker file is written once the step is logged",
        ("self",),
    ),
    Seam(
        "logging",
        "verl.utils.tracking:Tracking.log",
        "the last thing of a step: its commit follows",
        ("self", "data", "step", "backend"),
    ),
    Seam(
        "loading shards",
        "verl.utils.checkpoint.fsdp_checkpoint_manager:FSDPCheckpointManager.load_checkpoint",
        "its torch.load of <part>_world_size_<n>_rank_<r>.pt is made weights-only",
        ("self", "local_path", "hdfs_path", "del_local_after_load"),
    ),
    Seam("resuming", f"{_TRAINER}._load_checkpoint", "sets global_steps", ("self",)),
    Seam(
        "old log-probs",
        f"{_TRAINER}._compute_old_log_prob",
        "the replay gap is measured after it",
        ("self", "batch", "metrics"),
    ),
    Seam(
        "reference log-probs",
        f"{_TRAINER}._compute_ref_log_prob",
        "workers are sent the columns that they read",
        ("self", "batch", "metrics"),
    ),
    Seam("update", f"{_TRAINER}._update_actor", "the same", ("self", "batch", "metrics")),
    Seam(
        "advantages",
        f"{_TRAINER}._compute_advantage",
        "dropped rows are masked before it",
        ("self", "batch", "metrics"),
    ),
    Seam(
        "metrics",
        f"{_TRAINER}._compute_metrics",
        "latent metrics join verl's",
        ("self", "batch", "metrics", "timing_raw", "global_steps", "epoch"),
    ),
    Seam("validation", f"{_TRAINER}._validate", "its metrics feed the console line", ("self",)),
    Seam(
        "validation metrics",
        f"{_TRAINER}._val_metrics_update",
        "dropped rows are left out of them",
        (
            "self",
            "data_sources",
            "sample_uids",
            "reward_extra_infos_dict",
            "sample_turns",
            "expected_acc_counts",
        ),
    ),
    Seam(
        "agent loop worker",
        "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ.__ray_actor_class__",
        "subclassed: verl decorates it with ray.remote",
    ),
    Seam(
        "agent loop: prompt",
        "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ.__ray_actor_class__._run_prompt",
        "replaced: one request a group",
        ("self", "prompt", "sampling_params", "trajectory", "trace"),
    ),
    Seam(
        "processor",
        "verl.utils.tokenizer.tokenizer:hf_processor",
        "returns None for a processor that is not in its list",
        ("name_or_path", "kwargs"),
    ),
    Seam(
        "trainer registry", "verl.trainer.ppo.v1.trainer_base:TRAINER_REGISTRY", "checked at start"
    ),
    Seam("agent registry", f"{_AGENT}:_agent_loop_registry", "checked at start"),
    Seam(
        "trainer's parts: rewards",
        "verl.trainer.ppo.v1.trainer_base:RewardLoopManager",
        "`_setup` makes it by this name",
        ("config", "rm_resource_pool"),
    ),
    Seam(
        "trainer's parts: servers",
        "verl.trainer.ppo.v1.trainer_base:LLMServerManager._init_global_load_balancer",
        "made empty: no request is balanced",
        ("self",),
    ),
    Seam(
        "agent loop: workers",
        "verl.trainer.ppo.v1:AgentLoopManagerTQ._init_agent_loop_workers",
        "replaced: they start before the manager",
        ("self",),
    ),
    Seam(
        "task runner",
        "verl.trainer.main_ppo:TaskRunnerV1.__ray_actor_class__.run",
        "started by us",
        ("self", "config"),
    ),
)
# of Ray's `_private`, for `actor_watch`
RAY_SEAMS = (
    Seam(
        "watching actors",
        "ray._private.state:actors",
        "dead actors of this job are asked for",
        ("actor_id", "job_id", "actor_state_name"),
    ),
    Seam("node of the driver", "ray._private.worker:_global_node", "where a run's logs lie"),
)
