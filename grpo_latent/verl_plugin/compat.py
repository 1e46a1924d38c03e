"""Every place where this package leans on verl beyond its public registries, and every verl bug that it works around.

Nothing private of verl is touched outside this file. `SEAMS` lists what is used (symbol, parameters, reason);
`tests/verl_plugin/test_compat_contract.py` compares it with the installed verl, so an upgrade names the symbol that
changed instead of failing somewhere inside a Ray worker. `apply_patches` installs the work-arounds, once a process.
"""

from __future__ import annotations

import importlib
import inspect
import os
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_latent.errors import PluginError
from grpo_latent.verl_plugin import metrics_file

SUPPORTED_VERL = ("0.9",)


@dataclass(frozen=True)
class Seam:
    """One thing of verl that is not a public extension point.

    Attributes:
        name: of the use, for messages.
        symbol: `module:attribute.attribute`.
        why: what breaks here when it changes.
        parameters: of its signature, in order; None where it is no callable of interest.
    """

    name: str
    symbol: str
    why: str
    parameters: tuple[str, ...] | None = None

    def resolve(self) -> object:
        """The verl object.

        Raises:
            PluginError: it is gone.
        """
        module_name, path = self.symbol.split(":")
        try:
            value = importlib.import_module(module_name)
            for attribute in path.split("."):
                value = getattr(value, attribute)
        except (ImportError, AttributeError) as error:
            raise PluginError(
                f"verl changed under {self.name}", where=self.symbol, got=str(error), expected=self.why, fix=_FIX
            ) from error
        return value

    def check(self) -> None:
        """Raises `PluginError` if the symbol is gone or has other parameters."""
        value = self.resolve()
        if self.parameters is None:
            return
        # Ray's tracing adds a parameter to the methods of actor classes
        found = tuple(name for name in inspect.signature(value).parameters if name != "_ray_trace_ctx")
        if found != self.parameters:
            raise PluginError(
                f"verl changed under {self.name}",
                where=self.symbol,
                got=f"parameters {found}",
                expected=f"{self.parameters} ({self.why})",
                fix=_FIX,
            )


_FIX = "Install verl>=0.9.1,<0.10, or adapt grpo_latent/verl_plugin/compat.py."
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
    Seam("engine: build", f"{_ENGINE}._build_module", "head and hook are added before FSDP wraps", ("self",)),
    Seam(
        "engine: wrap", f"{_ENGINE}._build_fsdp_module", "pinned-memory offload is avoided on CPU", ("self", "module")
    ),
    Seam("engine: inputs", f"{_ENGINE}.prepare_model_inputs", "latents and masks enter here", ("self", "micro_batch")),
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
    Seam("LoRA merge", "verl.utils.fsdp_utils:merged_lora_context", "weights of a merged adapter are read inside it"),
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
    Seam("actor's loss", f"{_WORKERS}:TrainingWorker.set_loss_fn", "latent terms around verl's", ("self", "loss_fn")),
    Seam("actor's models", f"{_WORKERS}:ActorRolloutRefWorker.init_model", "the loss is set after it", ("self",)),
    Seam(
        "process group",
        "verl.utils.distributed:initialize_global_process_group_ray",
        "skipped when a group exists, which is how 'cpu:gloo,cpu:gloo' is avoided",
        ("timeout_second", "backend"),
    ),
    Seam(
        "resource pools", f"{_TRAINER}._init_resource_pool_mgr", "worker classes and CPU pools are set here", ("self",)
    ),
    Seam(
        "pool manager",
        "verl.single_controller.ray:ResourcePoolManager.create_resource_pool",
        "hard-codes use_gpu=True; replaced on CPU",
        ("self",),
    ),
    Seam("replay buffer", f"{_TRAINER}._build_replay_buffer", "swapped for one that polls fast and sorts", ("self",)),
    Seam(
        "batch order",
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._materialize_batch",
        "keys leave it sorted instead of in order of arrival",
        ("self", "partition_id", "selected_prompt_uids", "partition_snapshot"),
    ),
    Seam(
        "metadata poll",
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._sync_metadata_from_transfer_queue",
        "failed groups are raised right after it",
        ("self",),
    ),
    Seam(
        "saving", f"{_TRAINER}._save_checkpoint", "wrapped: the tracker file is written last and atomically", ("self",)
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
        ("self", "data_sources", "sample_uids", "reward_extra_infos_dict", "sample_turns", "expected_acc_counts"),
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
    Seam("trainer registry", "verl.trainer.ppo.v1.trainer_base:TRAINER_REGISTRY", "checked at start"),
    Seam("agent registry", f"{_AGENT}:_agent_loop_registry", "checked at start"),
    Seam(
        "task runner", "verl.trainer.main_ppo:TaskRunnerV1.__ray_actor_class__.run", "started by us", ("self", "config")
    ),
)


def check_verl_version() -> None:
    """Raises `PluginError` unless the installed verl is a supported one."""
    import importlib.metadata

    version = importlib.metadata.version("verl")
    if not version.startswith(tuple(f"{prefix}." for prefix in SUPPORTED_VERL)):
        raise PluginError("unsupported verl", where="verl.__version__", got=version, expected="0.9.x", fix=_FIX)


def select_platform(device: str) -> None:
    """Makes the driver's platform the configured one; composing the config imported verl before VERL_PLATFORM was set."""
    from verl.plugin.platform import PlatformRegistry, get_platform, set_platform

    if get_platform().device_name != device:
        set_platform(PlatformRegistry.get("cpu" if device == "cpu" else "nvidia")())


def is_cpu() -> bool:
    from verl.utils.device import get_device_name

    return get_device_name() == "cpu"


# ---- registries without a public register() -------------------------------------------------------------------------


def register_rollout_adapter(name: str, fqn: str) -> None:
    """Makes `rollout.name=<name>` find an adapter class (seam: rollout adapter)."""
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY

    _ROLLOUT_REGISTRY[(name, "async")] = fqn


def registered_names() -> dict[str, set[str]]:
    """What verl's registries hold in this process, for `registration.verify`."""
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.plugin.platform import PlatformRegistry
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
    from verl.workers.engine import EngineRegistry
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    engines = EngineRegistry._engines.get("language_model", {})
    return {
        "platform": set(PlatformRegistry.registered_names()),
        "engine": {key[1] for table in engines.values() for key in table if isinstance(key, tuple)},
        "rollout adapter": {name for name, _ in _ROLLOUT_REGISTRY},
        "rollout replica": set(RolloutReplicaRegistry._registry),
        "agent loop": set(_agent_loop_registry),
        "trainer": set(TRAINER_REGISTRY),
        "advantage": set(ADV_ESTIMATOR_REGISTRY),
        "policy loss": set(POLICY_LOSS_REGISTRY),
    }


# ---- CPU ------------------------------------------------------------------------------------------------------------


def init_cpu_process_group() -> None:
    """gloo before verl's own call, which would ask for 'cpu:gloo,cpu:gloo' and be refused by torch."""
    if torch.distributed.is_initialized() or not is_cpu():
        return
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.distributed.init_process_group("cpu:gloo", rank=rank, world_size=world_size)


@contextmanager
def without_pinned_offload(engine_config):
    """Builds a reference model on CPU: verl gives it CPUOffloadPolicy(pin_memory=True), which needs an accelerator."""
    forward_only = engine_config.forward_only
    if forward_only and is_cpu():
        engine_config.forward_only = False
    try:
        yield
    finally:
        engine_config.forward_only = forward_only


def cpu_pool_manager(manager):
    """The same pools as `manager`'s, of CPU bundles (seam: pool manager)."""
    from verl.single_controller.ray import RayResourcePool, ResourcePoolManager

    class CPUResourcePoolManager(ResourcePoolManager):
        def create_resource_pool(self):
            for name, processes in self.resource_pool_spec.items():
                self.resource_pool_dict[name] = RayResourcePool(
                    process_on_nodes=processes, use_gpu=False, max_colocate_count=1, name_prefix=name
                )

    return CPUResourcePoolManager(manager.resource_pool_spec, manager.mapping)


# ---- verl bugs ------------------------------------------------------------------------------------------------------


def fix_position_ids(position_ids: Tensor) -> Tensor:
    """mRoPE position ids as nested rows [4, L], ragged in L, whatever way they arrived.

    verl 0.9.1 forces `_ragged_idx = 2` on what it is given. Rows of equal length arrive ragged in the 4 (torch picks the
    first dimension), or dense, and then fail later with a size mismatch.
    """
    from verl.utils import tensordict_utils as tu

    if position_ids.dim() != 3:
        return position_ids
    if not position_ids.is_nested:
        return tu.nested_tensor_from_tensor_list(list(position_ids), ragged_idx=2)
    values, offsets = position_ids.values(), position_ids.offsets()
    num_rows = offsets.shape[0] - 1
    num_components = values.shape[0] // num_rows
    if int(offsets[-1]) == values.shape[0] and set(offsets.diff().tolist()) == {num_components}:
        rows = values.reshape(num_rows, num_components, -1)
        return tu.nested_tensor_from_tensor_list(list(rows), ragged_idx=2)
    position_ids._ragged_idx = 2
    return position_ids


def _patch_position_ids() -> None:
    """`maybe_fix_3d_position_ids` breaks rows of equal length; see `fix_position_ids`."""
    from verl.utils import tensordict_utils
    from verl.workers import engine_workers
    from verl.workers.engine import base

    def maybe_fix_3d_position_ids(data) -> None:
        if "position_ids" in data.keys():
            data["position_ids"] = fix_position_ids(data["position_ids"])

    for module in (tensordict_utils, engine_workers, base):
        module.maybe_fix_3d_position_ids = maybe_fix_3d_position_ids


def _patch_text_only_vision() -> None:
    """A micro-batch without images: verl calls `.mean()` on what transformers >= 5 returns as an object."""
    from verl.models.transformers import qwen2_vl
    from verl.utils.transformers_compat import unpack_visual_output

    original = qwen2_vl._get_input_embeds

    def _get_input_embeds(model, input_ids, attention_mask=None, pixel_values=None, pixel_values_videos=None, *args):
        if pixel_values is not None or pixel_values_videos is not None:
            return original(model, input_ids, attention_mask, pixel_values, pixel_values_videos, *args)
        inputs_embeds = model.get_input_embeddings()(input_ids)
        vision = model.config.vision_config
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        side = 2 * vision.spatial_merge_size
        pixels = torch.zeros((side * side, patch_dim), dtype=inputs_embeds.dtype, device=inputs_embeds.device)
        grid = torch.tensor([[1, side, side]], device=inputs_embeds.device)
        # verl runs the vision tower on nothing, so that its parameters take part in every backward and FSDP's
        # collectives match across ranks
        image_embeds, _ = unpack_visual_output(model.visual(pixels, grid_thw=grid))
        return inputs_embeds + 0.0 * image_embeds.mean(), attention_mask

    qwen2_vl._get_input_embeds = _get_input_embeds


def _patch_file_logger() -> None:
    """verl opens its jsonl with "wb", so a resumed run erases its history; here it appends."""
    from verl.utils import tracking

    class AppendingFileLogger(tracking.FileLogger):
        def __init__(self, project_name: str, experiment_name: str):
            self.project_name, self.experiment_name = project_name, experiment_name
            path = metrics_file.metrics_path(project_name, experiment_name)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.filepath = str(path)
            self.fp = open(path, "ab", buffering=0)

    tracking.FileLogger = AppendingFileLogger


_PATCHES = {
    "equal-length mRoPE rows": _patch_position_ids,
    "text-only micro-batch of a vision model": _patch_text_only_vision,
    "jsonl metrics on resume": _patch_file_logger,
}
_applied: set[str] = set()


def apply_patches() -> None:
    """Installs the work-arounds in this process; idempotent."""
    for name, patch in _PATCHES.items():
        if name not in _applied:
            patch()
            _applied.add(name)
