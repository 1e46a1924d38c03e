"""What is done to verl beyond its public registries.

That is registries without a register(), verl on CPU, and work-arounds of every verl bug that was
met.

`seams.SEAMS` lists all that is used; nothing private of verl is touched elsewhere but by the
subclasses that it names. `apply_patches` installs the work-arounds, once a process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from types import ModuleType

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

from grpo_latent.errors import ConfigError, PluginError
from grpo_latent.verl_plugin.boot import metrics_file
from grpo_latent.verl_plugin.boot.seams import FIX

SUPPORTED_VERL = ">=0.9.1,<0.10"  # as setup.py says


def check_verl_version() -> None:
    """Raises `PluginError` unless the installed verl is a supported one."""
    import importlib.metadata

    version = importlib.metadata.version("verl")
    # prereleases: those of 0.9.2 count, those of 0.9.1 and 0.10 are outside of the range anyway
    if not SpecifierSet(SUPPORTED_VERL).contains(version, prereleases=True):
        raise PluginError(
            "unsupported verl",
            where="verl.__version__",
            got=version,
            expected=SUPPORTED_VERL,
            fix=FIX,
        )


def select_platform(device: str) -> None:
    """Makes the driver's platform the configured one.

    Composing the config has imported verl before VERL_PLATFORM was set.
    """
    from verl.plugin.platform import PlatformRegistry, get_platform, set_platform

    if get_platform().device_name == device:
        return
    name = "cpu" if device == "cpu" else "nvidia"
    platform = PlatformRegistry.get(name)
    if platform is None:
        raise PluginError(
            "verl has no such platform",
            where=f"trainer.device={device}",
            got=sorted(PlatformRegistry.registered_names()),
            expected=name,
            fix=FIX,
        )
    set_platform(platform())


def is_cpu() -> bool:
    """Whether verl's platform in this process is the CPU."""
    from verl.utils.device import get_device_name

    return get_device_name() == "cpu"


# ---- registries without a public register() -----------------------------------------------------


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
        "engine": {
            key[1] for table in engines.values() for key in table if isinstance(key, tuple)
        },
        "rollout adapter": {name for name, _ in _ROLLOUT_REGISTRY},
        "rollout replica": set(RolloutReplicaRegistry._registry),
        "agent loop": set(_agent_loop_registry),
        "trainer": set(TRAINER_REGISTRY),
        "advantage": set(ADV_ESTIMATOR_REGISTRY),
        "policy loss": set(POLICY_LOSS_REGISTRY),
    }


# ---- classes that verl's methods name -----------------------------------------------------------


@contextmanager
def replaced(module: ModuleType, **values: object):
    """Runs a method of verl's with other values of its module's names (seam: trainer's parts)."""
    originals = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(module, name, value)


# ---- CPU ----------------------------------------------------------------------------------------


def init_cpu_process_group() -> None:
    """Starts gloo before verl, whose 'cpu:gloo,cpu:gloo' torch would refuse."""
    if torch.distributed.is_initialized() or not is_cpu():
        return
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.distributed.init_process_group("cpu:gloo", rank=rank, world_size=world_size)


@contextmanager
def without_pinned_offload(engine_config):
    """Builds a reference model on CPU without pinned memory, which needs an accelerator.

    verl gives every reference CPUOffloadPolicy(pin_memory=True) where `forward_only` is set.
    """
    forward_only = engine_config.forward_only
    if forward_only and is_cpu():
        engine_config.forward_only = False
    try:
        yield
    finally:
        engine_config.forward_only = forward_only


@contextmanager
def exporting(gather: Callable[[], dict[str, Tensor]]):
    """Has verl's save put what `gather` returns into the Hugging Face folder (seam: export).

    It would write an adapted model's weights under peft's names, which no program reads.
    """
    from verl.utils.checkpoint import fsdp_checkpoint_manager as module

    original = module.get_fsdp_full_state_dict
    _replace((module,), "get_fsdp_full_state_dict", lambda *args, **kwargs: gather())
    try:
        yield
    finally:
        _replace((module,), "get_fsdp_full_state_dict", original)


def cpu_pool_manager(manager):
    """The same pools as `manager`'s, of CPU bundles, a node for each (seam: pool manager).

    GPUs spread verl's groups over nodes, each of which has no more than one group needs; CPUs do
    not.
    """
    from verl.single_controller.ray import RayResourcePool, ResourcePoolManager

    class CPUResourcePool(RayResourcePool):
        pgs: list | None  # type: ignore[assignment]  # verl's says None only

        def get_placement_groups(self, strategy="STRICT_PACK", name=None, device_name="cpu"):
            if self.pgs is None:
                self.pgs = placement_groups(self.store, taken=[])
            return self.pgs

    class CPUResourcePoolManager(ResourcePoolManager):
        def create_resource_pool(self):
            for name, processes in self.resource_pool_spec.items():
                self.resource_pool_dict[name] = CPUResourcePool(
                    process_on_nodes=processes,
                    use_gpu=False,
                    max_colocate_count=1,
                    name_prefix=name,
                )

    return CPUResourcePoolManager(manager.resource_pool_spec, manager.mapping)


def placement_groups(counts: list[int], taken: list[str]) -> list:
    """Ray's placement groups of so many processes each, once they are there.

    Args:
        taken: nodes that are others', on CPU.
    """
    import ray
    from ray.util.placement_group import placement_group

    from grpo_latent.verl_plugin.boot.cluster_resources import training_nodes

    if is_cpu():
        nodes = training_nodes(len(counts), max(counts), "CPU", taken)
        groups = [
            placement_group(
                [{"CPU": 1}] * count,
                "STRICT_PACK",
                bundle_label_selector=[{"ray.io/node-id": node}] * count,
            )
            for node, count in zip(nodes, counts, strict=True)
        ]
    else:  # the GPUs that others hold are not theirs
        groups = [placement_group([{"CPU": 1, "GPU": 1}] * n, "STRICT_PACK") for n in counts]
    ray.get([group.ready() for group in groups])
    return groups


# ---- verl bugs ----------------------------------------------------------------------------------


def fix_position_ids(position_ids: Tensor) -> Tensor:
    """mRoPE position ids as nested rows [4, L], ragged in L, whatever way they arrived.

    verl 0.9.1 forces `_ragged_idx = 2` on what it is given. Rows of equal length arrive ragged in
    the 4 (torch picks the first dimension), or dense, and then fail later with a size mismatch.
    """
    from verl.utils import tensordict_utils as tu

    if position_ids.dim() != 3:
        return position_ids
    if not position_ids.is_nested:
        return tu.nested_tensor_from_tensor_list(list(position_ids), ragged_idx=2)
    values, offsets = position_ids.values(), offsets_of(position_ids)
    num_rows = offsets.shape[0] - 1
    num_components = values.shape[0] // num_rows
    if int(offsets[-1]) == values.shape[0] and set(offsets.diff().tolist()) == {num_components}:
        rows = values.reshape(num_rows, num_components, -1)
        return tu.nested_tensor_from_tensor_list(list(rows), ragged_idx=2)
    position_ids._ragged_idx = 2  # type: ignore[attr-defined]  # torch's own, as verl sets it
    return position_ids


def offsets_of(nested: Tensor) -> Tensor:
    """int64 [B + 1], where each row of a jagged tensor begins, and where the last one ends."""
    return nested.offsets()  # type: ignore[attr-defined]  # torch annotates none of its own


def _replace(modules: Iterable[ModuleType], name: str, value: object) -> None:
    """Puts `value` under `name` into each module: each has imported the old one by name."""
    for module in modules:
        setattr(module, name, value)


def _patch_position_ids() -> None:
    """`maybe_fix_3d_position_ids` breaks rows of equal length; see `fix_position_ids`."""
    from verl.utils import tensordict_utils
    from verl.workers import engine_workers
    from verl.workers.engine import base

    def maybe_fix_3d_position_ids(data) -> None:
        if "position_ids" in data.keys():
            data["position_ids"] = fix_position_ids(data["position_ids"])

    modules = (tensordict_utils, engine_workers, base)
    _replace(modules, "maybe_fix_3d_position_ids", maybe_fix_3d_position_ids)


def _patch_text_only_vision() -> None:
    """Lets a micro-batch without images through the towers of Qwen2-VL and Qwen2.5-VL.

    verl calls `.mean()` on what transformers >= 5 returns as an object.
    """
    from verl.models.transformers import qwen2_vl
    from verl.utils.transformers_compat import unpack_visual_output

    original = qwen2_vl._get_input_embeds

    def _get_input_embeds(
        model, input_ids, attention_mask=None, pixel_values=None, pixel_values_videos=None, *args
    ):
        if pixel_values is not None or pixel_values_videos is not None:
            return original(
                model, input_ids, attention_mask, pixel_values, pixel_values_videos, *args
            )
        inputs_embeds = model.get_input_embeddings()(input_ids)
        vision = model.config.vision_config
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        side = 2 * vision.spatial_merge_size
        pixels = torch.zeros(
            (side * side, patch_dim), dtype=inputs_embeds.dtype, device=inputs_embeds.device
        )
        grid = torch.tensor([[1, side, side]], device=inputs_embeds.device)
        # verl runs the vision tower on nothing, so that its parameters take part in every backward
        # and FSDP's collectives match across ranks
        image_embeds, _ = unpack_visual_output(model.visual(pixels, grid_thw=grid))
        return inputs_embeds + 0.0 * image_embeds.mean(), attention_mask

    _replace((qwen2_vl,), "_get_input_embeds", _get_input_embeds)


def _patch_processors() -> None:
    """Loads the processor of every family with a backbone.

    verl knows processors by a list of class names, and takes a model with any other for one
    without images, with no more than a warning.
    """
    from transformers import AutoProcessor
    from verl import utils
    from verl.utils import tokenizer as package
    from verl.utils.tokenizer import tokenizer
    from verl.workers.config import model

    from grpo_latent.backbones.registry import read_backbone

    original = tokenizer.hf_processor

    def hf_processor(name_or_path, **kwargs):
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Failed to create processor: Unsupported processor type"
            )
            processor = original(name_or_path, **kwargs)
        if processor is not None:
            return processor
        try:
            _, backbone = read_backbone(name_or_path)
        except ConfigError:
            return None  # a model beside ours, such as a judge: verl may do as it likes
        return (
            AutoProcessor.from_pretrained(name_or_path, **kwargs) if backbone.has_vision else None
        )

    _replace((utils, package, tokenizer, model), "hf_processor", hf_processor)


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

    _replace((tracking,), "FileLogger", AppendingFileLogger)


def _patch_reward_tokenizers() -> None:
    """verl's reward worker would run a folder's code for a tokenizer; here it cannot."""
    from verl.experimental.reward_loop import reward_loop

    original = reward_loop.hf_tokenizer

    def hf_tokenizer(name_or_path: str, **kwargs):
        return original(name_or_path, **kwargs | {"trust_remote_code": False})

    _replace((reward_loop,), "hf_tokenizer", hf_tokenizer)


_PATCHES = {
    "equal-length mRoPE rows": _patch_position_ids,
    "text-only micro-batch of a vision model": _patch_text_only_vision,
    "jsonl metrics on resume": _patch_file_logger,
    "processors of other families": _patch_processors,
    "code in the folder of a tokenizer": _patch_reward_tokenizers,
}
_applied: set[str] = set()


def apply_patches() -> None:
    """Installs the work-arounds in this process; idempotent."""
    for name, patch in _PATCHES.items():
        if name not in _applied:
            patch()
            _applied.add(name)
