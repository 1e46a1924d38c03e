"""Every symbol of vLLM that this package relies on: the one place that a release may change.

`since` and `before` say which releases have a symbol under that name; `contract` checks them.
"""

from __future__ import annotations

from dataclasses import dataclass

Release = tuple[int, int]  # of vLLM: 0.27 is (0, 27)


@dataclass(frozen=True)
class Symbol:
    """A module's class, function, method or constant.

    Attributes:
        parameters: that we pass to it, or, of a class, fields that we read.
        mentions: text that its source must hold.
        since, before: releases that have it: from `since` on, and before `before`; None for all.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    since: Release | None = None
    before: Release | None = None

    def is_in(self, release: Release) -> bool:
        """Whether a release has the symbol.

        >>> Symbol("vllm.x", "f", since=(0, 29)).is_in((0, 28))
        False
        """
        return (self.since is None or release >= self.since) and (
            self.before is None or release < self.before
        )


_V1 = "vllm.v1.worker.gpu_model_runner"
_V2 = "vllm.v1.worker.gpu.model_runner"
_STATE = "vllm.v1.worker.gpu.model_states"
_SAMPLER = "vllm.v1.worker.gpu.sample"
COMMON = (
    Symbol("vllm.v1.worker.gpu_worker", "Worker.__init__", (), ("self.use_v2_model_runner =",)),
    Symbol("vllm.v1.worker.gpu_worker", "Worker.init_device", (), ("self.model_runner",)),
    Symbol(
        "vllm.v1.worker.gpu_worker", "Worker.load_model", (), ("_maybe_get_memory_pool_context",)
    ),
    # our classes stand between vLLM's two: the CPU's must derive from the GPU's
    Symbol("vllm.v1.worker.cpu_worker", "CPUWorker", (), ("class CPUWorker(Worker)",)),
    Symbol("vllm.v1.worker.cpu_worker", "CPUWorker.init_device", (), ("self.model_runner",)),
    Symbol("vllm.v1.outputs", "LogprobsTensors", ("logprob_token_ids", "logprobs")),
    Symbol(
        "vllm.v1.core.sched.output",
        "NewRequestData",
        ("req_id", "prompt_token_ids", "sampling_params"),
    ),
    Symbol(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        ("num_scheduled_tokens", "finished_req_ids"),
    ),
    Symbol("vllm.v1.core.sched.scheduler", "Scheduler.__init__", (), ("self.kv_cache_manager",)),
    Symbol(
        "vllm.v1.core.sched.async_scheduler",
        "AsyncScheduler",
        (),
        ("class AsyncScheduler(Scheduler)",),
    ),
    Symbol("vllm.v1.core.kv_cache_manager", "KVCacheManager", (), ("coordinator.cache_blocks",)),
    Symbol(
        "vllm.v1.core.kv_cache_coordinator",
        "KVCacheCoordinator.cache_blocks",
        ("request", "num_computed_tokens"),
    ),
    Symbol("vllm.v1.request", "Request", (), ("self.num_prompt_tokens", "self.all_token_ids")),
    Symbol("vllm.model_executor.model_loader.utils", "_MODEL_ARCH_BY_HASH"),
    Symbol(
        "vllm.model_executor.models.registry",
        "_ModelRegistry.register_model",
        ("model_arch", "model_cls"),
    ),
    Symbol(
        "vllm.sampling_params",
        "SamplingParams",
        ("extra_args", "ignore_eos", "stop_token_ids", "detokenize"),
    ),
    Symbol(
        "vllm.v1.engine.llm_engine", "LLMEngine.add_request", ("request_id", "prompt", "params")
    ),
    Symbol("vllm.v1.engine.llm_engine", "LLMEngine.abort_request", ("request_ids",)),
    Symbol("vllm.engine.arg_utils", "EngineArgs", ("mm_device_do_normalize",), since=(0, 28)),
    Symbol("vllm.v1.engine.llm_engine", "LLMEngine.reset_prefix_cache"),
    Symbol("vllm.v1.engine.llm_engine", "LLMEngine.reset_encoder_cache"),
    Symbol(
        "vllm.entrypoints.openai.api_server",
        "init_app_state",
        (),
        ("state.vllm_config = vllm_config",),
        before=(0, 29),
    ),
    Symbol(
        "vllm.entrypoints.launchers.api_server.app_state",
        "init_app_state",
        (),
        ("state.vllm_config = vllm_config",),
        since=(0, 29),
    ),
    Symbol(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.add_request",
        ("request_id", "prompt", "params"),
        ("EngineInput",),
    ),
    Symbol(
        "vllm.v1.engine.async_llm", "AsyncLLM.pause_generation", ("mode", "clear_cache"), ("keep",)
    ),
    Symbol("vllm.v1.engine.async_llm", "AsyncLLM.resume_generation"),
    Symbol("vllm.v1.engine.async_llm", "AsyncLLM.abort", ("request_id",)),
    Symbol("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc", ("method", "kwargs")),
    Symbol("vllm.v1.engine.output_processor", "RequestOutputCollector.get"),
    Symbol("vllm.sampling_params", "RequestOutputKind", (), ("FINAL_ONLY",)),
    Symbol("vllm.inputs.engine", "tokens_input", ("prompt_token_ids",)),
    Symbol(
        "vllm.inputs.engine",
        "mm_input",
        ("prompt_token_ids", "mm_kwargs", "mm_hashes", "mm_placeholders"),
    ),
    Symbol("vllm.multimodal.inputs", "PlaceholderRange", ("offset", "length")),
    Symbol(
        "vllm.multimodal.inputs",
        "MultiModalKwargsItems.from_hf_inputs",
        ("hf_inputs", "config_by_key"),
    ),
    Symbol(
        "vllm.multimodal.inputs",
        "MultiModalFieldConfig.flat_from_sizes",
        ("modality", "size_per_item"),
    ),
    Symbol("vllm.multimodal.inputs", "MultiModalFieldConfig.batched", ("modality", "keep_on_cpu")),
)
V1_RUNNER = (
    Symbol(
        "vllm.v1.worker.cpu_model_runner",
        "CPUModelRunner",
        (),
        ("class CPUModelRunner(GPUModelRunner)",),
    ),
    Symbol(
        _V1,
        "GPUModelRunner.__init__",
        (),
        ("self.enable_prompt_embeds = model_config.enable_prompt_embeds",),
    ),
    Symbol(
        _V1,
        "GPUModelRunner._update_states",
        ("scheduler_output",),
        ("finished_req_ids", "scheduled_new_reqs"),
    ),
    Symbol(
        _V1,
        "GPUModelRunner._preprocess",
        ("scheduler_output", "num_input_tokens"),
        ("inputs_embeds",),
    ),
    Symbol(
        _V1, "GPUModelRunner._sample", ("logits", "spec_decode_metadata"), ("sampling_metadata",)
    ),
    Symbol(_V1, "GPUModelRunner.sample_tokens", (), ("self._sample(logits",)),
    Symbol(
        _V1,
        "GPUModelRunner.execute_model",
        (),
        ("hidden_states[logits_indices]", "compute_logits(sample_hidden_states)"),
    ),
    Symbol(
        _V1,
        "GPUModelRunner._prepare_inputs",
        (),
        ("discard_request_mask", "optimistic_seq_lens_cpu"),
    ),
    Symbol(_V1, "GPUModelRunner.reload_weights", ("weights_iterator",), ("load_weights",)),
    Symbol(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch",
        (),
        ("num_computed_tokens_cpu", "sampling_metadata"),
    ),
    Symbol("vllm.v1.sample.metadata", "SamplingMetadata", ("max_num_logprobs",)),
    Symbol("vllm.v1.outputs", "SamplerOutput", ("sampled_token_ids", "logprobs_tensors")),
)
V2_RUNNER = (
    Symbol(
        "vllm.v1.worker.cpu.model_runner",
        "CPUModelRunner",
        (),
        ("class CPUModelRunner(GPUModelRunner)",),
    ),
    Symbol(
        _V2, "GPUModelRunner.load_model", (), ("init_model_state(", "custom_sampler(self.sampler)")
    ),
    Symbol(
        _V2,
        "GPUModelRunner.finish_requests",
        ("scheduler_output",),
        ("finished_req_ids", "preempted_req_ids"),
    ),
    Symbol(
        _V2,
        "GPUModelRunner.add_requests",
        (),
        ("self.model_state.add_request(req_index, new_req_data)",),
    ),
    Symbol(_V2, "GPUModelRunner.execute_model", (), ("**self.model_state.prepare_inputs(",)),
    Symbol(
        _V2,
        "GPUModelRunner.execute_model",
        (),
        ("self.model_state.get_mm_embeddings(",),
        before=(0, 29),
    ),
    Symbol(
        _V2,
        "GPUModelRunner.execute_model",
        (),
        ("self.model_state.prepare_inputs_embeds(",),
        since=(0, 29),
    ),
    Symbol(
        _V2,
        "GPUModelRunner.sample",
        (),
        ("compute_logits(sample_hidden_states)", "self.sampler(logits, input_batch"),
    ),
    Symbol(_V2, "GPUModelRunner.reload_weights", (), ("GPUModelRunnerV1.reload_weights",)),
    Symbol(
        _STATE,
        "init_model_state",
        (),
        ("cls(vllm_config, model, encoder_cache, device)",),
    ),
    Symbol(_STATE, "init_model_state", (), ("get_model_state_cls()",), before=(0, 29)),
    Symbol(_STATE, "resolve_model_state_cls", (), ("get_model_state_cls()",), since=(0, 29)),
    Symbol(
        f"{_STATE}.default",
        "DefaultModelState.__init__",
        ("vllm_config", "model", "encoder_cache", "device"),
    ),
    Symbol(f"{_STATE}.default", "DefaultModelState.add_request", ("req_index", "new_req_data")),
    Symbol(
        f"{_STATE}.default",
        "DefaultModelState.get_mm_embeddings",
        ("scheduled_encoder_inputs", "input_batch"),
        before=(0, 29),
    ),
    Symbol(
        f"{_STATE}.default",
        "DefaultModelState.prepare_inputs_embeds",
        ("scheduled_encoder_inputs", "input_batch"),
        since=(0, 29),
    ),
    Symbol(f"{_STATE}.default", "DefaultModelState.prepare_inputs", ("input_batch", "req_states")),
    Symbol(
        f"{_STATE}.default", "DefaultModelState.prepare_dummy_inputs", ("num_reqs", "num_tokens")
    ),
    Symbol(f"{_STATE}.interface", "ModelState.custom_sampler", ("sampler",)),
    Symbol(f"{_SAMPLER}.sampler", "Sampler.__call__", ("logits", "input_batch")),
    Symbol(f"{_SAMPLER}.output", "SamplerOutput", ("sampled_token_ids", "logprobs_tensors")),
    Symbol(
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        (
            "req_ids",
            "num_tokens",
            "num_tokens_after_padding",
            "num_scheduled_tokens",
            "num_computed_tokens_np",
        )
        + ("prefill_len_np", "input_ids"),
    ),
)


def symbols_of(is_v2: bool, release: Release) -> list[Symbol]:
    """What a release must have for one of its two model runners."""
    runner = V2_RUNNER if is_v2 else V1_RUNNER
    return [symbol for symbol in COMMON + runner if symbol.is_in(release)]
