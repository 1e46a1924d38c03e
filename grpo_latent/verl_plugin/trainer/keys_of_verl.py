"""What each key of verl's config may hold, with ranges and choices.

A key without a row takes the kind of its default (`common.schema`). Rows that verl's config does
not list are keys that its code reads all the same.
"""

from __future__ import annotations

import math

from grpo_latent.common.dtypes import DTYPES
from grpo_latent.common.kinds import (
    Kind,
    anything,
    choice,
    entries,
    flag,
    is_number,
    null_or,
    number,
    one_or_some,
    only,
    seed,
    share,
    some,
    text,
    whole,
)

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
LOGGERS = (
    "file",
    "console",
    "wandb",
    "tensorboard",
    "mlflow",
    "swanlab",
    "vemlp_wandb",
    "clearml",
    "trackio",
    "rl_insight",
)
AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
_KL = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
# a + takes the gradient of k2; `full` needs logits, which no forward here keeps
KL_PENALTIES = (*_KL, *(f"{name}+" for name in _KL))
KL_LOSS_TYPES = (*KL_PENALTIES, "low_var_kl_unclamped")
CONTENTS = ("model", "optimizer", "extra", "hf_model")
DTYPE_NAMES = tuple(DTYPES)
REJECTIONS = "token_k1, seq_mean_k3, …, joined by commas"


def _is_positive(value: object) -> bool:
    """Whether a number, or each of a text's parts at _ and commas, is finite and > 0."""
    parts = value.replace("_", ",").split(",") if isinstance(value, str) else [value]
    try:
        return all(0 < float(part) < math.inf for part in parts)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


_THRESHOLD = Kind(
    "a number > 0, or a text low_high",
    lambda value: isinstance(value, str) or is_number(value),
    _is_positive,
)
PATH = text("a path")
_FILES = one_or_some(text("a path of a file"))
_NAME = Kind("a name", lambda value: isinstance(value, str | int) and not isinstance(value, bool))
SEED = seed()
_STEPS = whole(1, also=-1, why="-1: never")
_SPLIT = "rows a forward"
_BIG = number(above=0, why="a larger number than any norm clips nothing")

TRAINER: dict[str, Kind] = {
    "model_engine": only("dp", "the latent engine is FSDP2"),
    "trainer.total_epochs": whole(1),
    "trainer.total_training_steps": null_or(whole(1)),
    "trainer.project_name": _NAME,
    "trainer.experiment_name": _NAME,
    "trainer.logger": one_or_some(choice(*LOGGERS)),
    "trainer.log_val_generations": whole(0),
    "trainer.rollout_data_dir": null_or(PATH),
    "trainer.validation_data_dir": null_or(PATH),
    "trainer.nnodes": whole(1),
    "trainer.n_gpus_per_node": whole(1, why="processes a node, on CPU too"),
    "trainer.save_freq": _STEPS,
    "trainer.test_freq": _STEPS,
    "trainer.esi_redundant_time": number(at_least=0),
    "trainer.resume_mode": choice("auto", "disable", "resume_path"),
    "trainer.resume_from_path": null_or(PATH),
    "trainer.checkpoint_callback_class": null_or(text()),
    "trainer.critic_warmup": only(0, "there is no critic; the actor would stand still so long"),
    "trainer.default_hdfs_dir": null_or(PATH),
    "trainer.default_local_dir": PATH,
    "trainer.max_actor_ckpt_to_keep": null_or(whole(1)),
    "trainer.max_critic_ckpt_to_keep": null_or(whole(1)),
    "trainer.remove_previous_ckpt_in_save": flag(),
    "trainer.ray_wait_register_center_timeout": whole(1),
    "trainer.device": choice("cpu", "cuda"),
    "trainer.use_v1": only(True, "the latent trainer is one of verl's V1"),
    "trainer.wandb_proxy": null_or(text()),
    "trainer.v1.trainer_mode": text(),
    "trainer.v1.sampler.max_off_policy_strategy": choice("drop", "keep"),
    "trainer.v1.sampler.custom_sampler.*": null_or(text()),
}

DATA: dict[str, Kind] = {
    "data.tokenizer": null_or(text()),
    "data.train_files": _FILES,
    "data.val_files": _FILES,
    "data.train_max_samples": whole(1, also=-1, why="-1: all"),
    "data.val_max_samples": whole(1, also=-1, why="-1: all"),
    "data.prompt_key": text("a column's name"),
    "data.image_key": text("a column's name"),
    "data.video_key": text("a column's name"),
    "data.audio_key": text("a column's name"),
    "data.reward_fn_key": only("data_source", "the reward is told that column"),
    "data.max_prompt_length": whole(1),
    "data.max_response_length": whole(1),
    "data.train_batch_size": whole(1),
    "data.gen_batch_size": null_or(whole(1)),
    "data.val_batch_size": null_or(whole(1)),
    "data.seed": null_or(SEED),
    "data.dataloader_num_workers": whole(0),
    "data.filter_overlong_prompts_workers": whole(1),
    "data.image_patch_size": whole(1),
    "data.truncation": choice("error", "left", "right", "middle"),
    "data.tool_config_path": null_or(PATH),
    "data.function_tool_path": null_or(PATH),
    "data.cache_dir": text("a path"),
    "data.chat_template_func": null_or(text()),
    "data.need_tools_kwargs": flag(),
    "data.filter_prompts": flag(),
    "data.custom_cls.path": null_or(PATH),
    "data.custom_cls.name": null_or(text()),
}

_ACTOR = "actor_rollout_ref.actor"
ACTOR: dict[str, Kind] = {
    f"{_ACTOR}.rollout_n": whole(1),
    f"{_ACTOR}.ppo_mini_batch_size": whole(1),
    f"{_ACTOR}.ppo_micro_batch_size": only(None, "it counts over all ranks; set …_per_gpu"),
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu": null_or(whole(1, why=_SPLIT)),
    f"{_ACTOR}.ppo_max_token_len_per_gpu": whole(1),
    f"{_ACTOR}.clip_ratio": number(at_least=0),
    f"{_ACTOR}.clip_ratio_low": null_or(number(at_least=0)),
    f"{_ACTOR}.clip_ratio_high": null_or(number(at_least=0)),
    f"{_ACTOR}.clip_ratio_c": null_or(number(above=1)),
    f"{_ACTOR}.tau_*": number(above=0),
    f"{_ACTOR}.policy_loss.clip_cov_ratio": share(),
    f"{_ACTOR}.policy_loss.clip_cov_lb": number(),
    f"{_ACTOR}.policy_loss.clip_cov_ub": number(),
    f"{_ACTOR}.policy_loss.kl_cov_ratio": share(),
    f"{_ACTOR}.policy_loss.ppo_kl_coef": number(at_least=0),
    f"{_ACTOR}.policy_loss.dro_beta": null_or(number(above=0)),
    f"{_ACTOR}.policy_loss.rollout_correction": null_or(entries("verl's rollout correction")),
    f"{_ACTOR}.loss_agg_mode": choice(*AGG_MODES),
    f"{_ACTOR}.loss_scale_factor": null_or(whole(1)),
    f"{_ACTOR}.entropy_coeff": number(),
    f"{_ACTOR}.kl_loss_coef": number(at_least=0),
    f"{_ACTOR}.kl_loss_type": choice(*KL_LOSS_TYPES),
    f"{_ACTOR}.ppo_epochs": whole(1),
    f"{_ACTOR}.data_loader_seed": null_or(SEED),
    f"{_ACTOR}.use_rollout_log_probs": flag(),
    f"{_ACTOR}.grad_clip": only(1.0, "verl does not read it; set optim.clip_grad"),
    f"{_ACTOR}.checkpoint.save_contents": some(choice(*CONTENTS)),
    f"{_ACTOR}.checkpoint.load_contents": some(choice(*CONTENTS)),
    f"{_ACTOR}.checkpoint.save_lora_only": flag(),
    f"{_ACTOR}.entropy_from_logits_chunk_size": whole(1),
    f"{_ACTOR}.ulysses_sequence_parallel_size": whole(1),
    f"{_ACTOR}.optim.lr": number(at_least=0, at_most=1),
    f"{_ACTOR}.optim.lr_warmup_steps_ratio": share(),
    f"{_ACTOR}.optim.lr_warmup_steps": null_or(whole(0, also=-1)),
    f"{_ACTOR}.optim.total_training_steps": whole(1, also=-1),
    f"{_ACTOR}.optim.weight_decay": number(at_least=0, at_most=1),
    f"{_ACTOR}.optim.betas": some(number(at_least=0, below=1), exactly=2),
    f"{_ACTOR}.optim.clip_grad": _BIG,
    f"{_ACTOR}.optim.grad_clip": null_or(_BIG),
    f"{_ACTOR}.optim.min_lr_ratio": null_or(share()),
    f"{_ACTOR}.optim.num_cycles": number(above=0),
    f"{_ACTOR}.optim.lr_scheduler_type": choice("constant", "cosine"),
    f"{_ACTOR}.optim.warmup_style": null_or(choice("constant", "cosine")),
    f"{_ACTOR}.optim.override_optimizer_config": null_or(entries("the optimizer's arguments")),
    "actor_rollout_ref.*.fsdp_config.fsdp_size": whole(1, also=-1),
    "actor_rollout_ref.*.fsdp_config.model_dtype": choice(*DTYPE_NAMES),
    "actor_rollout_ref.*.fsdp_config.dtype": choice(*DTYPE_NAMES),
    "actor_rollout_ref.*.fsdp_config.seed": SEED,
    "actor_rollout_ref.*.fsdp_config.mixed_precision": null_or(entries("param_dtype, …")),
    "actor_rollout_ref.*.fsdp_config.mixed_precision.*_dtype": choice(*DTYPE_NAMES),
    "actor_rollout_ref.*.fsdp_config.pad_to_length_bucket": whole(1),
    "actor_rollout_ref.ref.log_prob_micro_batch_size": null_or(whole(1)),
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": null_or(whole(1, why=_SPLIT)),
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": whole(1),
}

_ROLLOUT = "actor_rollout_ref.rollout"
ROLLOUT: dict[str, Kind] = {
    "actor_rollout_ref.hybrid_engine": only(
        True, "latent.placement=apart separates actor and rollout"
    ),
    f"{_ROLLOUT}.mode": only("async", "verl has no other any more"),
    f"{_ROLLOUT}.nnodes": whole(0),
    f"{_ROLLOUT}.n_gpus_per_node": whole(1),
    f"{_ROLLOUT}.n": whole(1),
    f"{_ROLLOUT}.temperature": number(at_least=0),
    f"{_ROLLOUT}.top_k": whole(0, also=-1, why="-1: no bound"),
    f"{_ROLLOUT}.top_p": number(above=0, at_most=1),
    f"{_ROLLOUT}.do_sample": only(True, "greedy rollouts make equal trajectories"),
    f"{_ROLLOUT}.repetition_penalty": only(1.0, "the replay's log-probs know none"),
    f"{_ROLLOUT}.seed": SEED,
    f"{_ROLLOUT}.prompt_length": whole(1),
    f"{_ROLLOUT}.response_length": whole(1),
    f"{_ROLLOUT}.dtype": choice(*DTYPE_NAMES),
    f"{_ROLLOUT}.gpu_memory_utilization": number(above=0, at_most=1),
    f"{_ROLLOUT}.standalone_gpu_memory_utilization": null_or(number(above=0, at_most=1)),
    **{
        f"{_ROLLOUT}.{name}_parallel_size": whole(1)
        for name in ("tensor_model", "data", "expert", "pipeline_model", "moe_tensor")
    },
    f"{_ROLLOUT}.max_num_batched_tokens": whole(1),
    f"{_ROLLOUT}.max_model_len": null_or(whole(1)),
    f"{_ROLLOUT}.max_num_seqs": whole(1),
    f"{_ROLLOUT}.logprobs_mode": null_or(text()),
    f"{_ROLLOUT}.scheduling_policy": null_or(choice("fcfs", "priority")),
    f"{_ROLLOUT}.load_format": choice("auto", "dummy", "safetensors", "hf", "pt"),
    f"{_ROLLOUT}.cudagraph_capture_sizes": null_or(some(whole(1), at_least=0)),
    f"{_ROLLOUT}.log_prob_micro_batch_size": null_or(whole(1)),
    f"{_ROLLOUT}.log_prob_micro_batch_size_per_gpu": null_or(whole(1, why=_SPLIT)),
    f"{_ROLLOUT}.log_prob_max_token_len_per_gpu": whole(1),
    f"{_ROLLOUT}.over_sample_rate": number(at_least=0, below=1),
    f"{_ROLLOUT}.val_kwargs.temperature": number(at_least=0),
    f"{_ROLLOUT}.val_kwargs.top_k": whole(0, also=-1, why="-1: no bound"),
    f"{_ROLLOUT}.val_kwargs.top_p": number(above=0, at_most=1),
    f"{_ROLLOUT}.val_kwargs.n": whole(1),
    f"{_ROLLOUT}.agent.num_workers": whole(1),
    f"{_ROLLOUT}.agent.agent_loop_config_path": null_or(PATH),
    f"{_ROLLOUT}.agent.agent_loop_manager_class": null_or(text()),
    f"{_ROLLOUT}.checkpoint_engine.backend": null_or(text()),
    f"{_ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes": whole(1),
    f"{_ROLLOUT}.checkpoint_manager_class": null_or(text()),
    f"{_ROLLOUT}.trace.project_name": null_or(_NAME),
    f"{_ROLLOUT}.trace.experiment_name": null_or(_NAME),
    f"{_ROLLOUT}.trace.backend": null_or(choice("mlflow", "weave", "trackio")),
    f"{_ROLLOUT}.trace.max_samples_per_step_per_worker": null_or(whole(0)),
    f"{_ROLLOUT}.prometheus.served_model_name": null_or(text()),
    f"{_ROLLOUT}.profiler": anything(),
    f"{_ROLLOUT}.mtp": anything(),
    f"{_ROLLOUT}.qat": anything(),
    f"{_ROLLOUT}.custom": null_or(entries("further settings")),
    f"{_ROLLOUT}.server": entries("of SGLang's server"),
    f"{_ROLLOUT}.layer_name_map": entries("names of layers"),
    f"{_ROLLOUT}.sglang_engine_mode": text(),
    f"{_ROLLOUT}.limit_images": null_or(whole(0)),
    f"{_ROLLOUT}.enable_sleep_mode": flag(),
    "actor_rollout_ref.nccl_timeout": whole(1),
}

_MODEL = "actor_rollout_ref.model"
MODEL: dict[str, Kind] = {
    f"{_MODEL}.path": PATH,
    f"{_MODEL}.hf_config_path": null_or(PATH),
    f"{_MODEL}.tokenizer_path": null_or(PATH),
    f"{_MODEL}.trust_remote_code": only(False, "no code out of a model's folder is run"),
    f"{_MODEL}.override_config.attn_implementation": choice(*ATTENTION),
    f"{_MODEL}.lora_rank": whole(0),
    f"{_MODEL}.lora_alpha": whole(1),
    f"{_MODEL}.target_modules": one_or_some(text("a module's name")),
    f"{_MODEL}.target_parameters": null_or(some(text())),
    f"{_MODEL}.exclude_modules": null_or(one_or_some(text("a module's name"))),
    f"{_MODEL}.lora.dropout": share(),
    f"{_MODEL}.lora.rank": whole(0),
    f"{_MODEL}.tiled_mlp.num_shards": whole(1),
    f"{_MODEL}.model_type": text(),
    f"{_MODEL}.load_tokenizer": flag(),
    f"{_MODEL}.mtp": null_or(entries("of multi-token prediction")),
    "data.trust_remote_code": only(False, "no code out of a model's folder is run"),
}

ALGORITHM: dict[str, Kind] = {
    "algorithm.gamma": share(),
    "algorithm.lam": share(),
    "algorithm.adv_eps": number(at_least=0),
    "algorithm.kl_penalty": choice(*KL_PENALTIES),
    "algorithm.kl_ctrl.type": choice("fixed", "adaptive"),
    "algorithm.kl_ctrl.kl_coef": number(at_least=0),
    "algorithm.kl_ctrl.horizon": whole(1),
    "algorithm.kl_ctrl.target_kl": number(above=0),
    "algorithm.use_pf_ppo": only(False, "verl has it with GAE, which needs a critic"),
    "algorithm.filter_groups": null_or(entries("verl's filter of groups")),
    "algorithm.filter_groups.metric": null_or(text()),
    "algorithm.rollout_correction": null_or(entries("verl's rollout correction")),
    "algorithm.rollout_correction.rollout_is": null_or(choice("token", "sequence")),
    "algorithm.rollout_correction.rollout_is_threshold": null_or(_THRESHOLD),
    "algorithm.rollout_correction.rollout_rs": null_or(text(REJECTIONS)),
    "algorithm.rollout_correction.rollout_rs_threshold": null_or(_THRESHOLD),
    "algorithm.rollout_correction.loss_type": choice("ppo_clip", "reinforce"),
    "algorithm.gdpo_reward_keys": null_or(some(text())),
    "algorithm.gdpo_reward_weights": null_or(some(number())),
}

VERL: dict[str, Kind] = {**TRAINER, **DATA, **ACTOR, **ROLLOUT, **MODEL, **ALGORITHM}
