"""verl's device layer for machines without an accelerator.

verl resolves one platform a process, on first use, and falls back to `nvidia` when it finds none.
Registered here, the CPU is found after the accelerators have been asked, so a GPU machine keeps
its GPU platform.
"""

from __future__ import annotations

import types
from contextlib import contextmanager

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

CPU_PLATFORM = "cpu"

_ZERO = ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved")
_NOTHING = ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device", "set_rng_state")
_SEEDS = ("manual_seed", "manual_seed_all")


class CPUDeviceModule(types.ModuleType):
    """`torch.cpu`, plus memory and seed calls that verl makes on each `torch.<device>` module."""

    def __init__(self):
        super().__init__("torch_cpu_for_verl")

    def __getattr__(self, name: str):
        if name in _ZERO:
            return lambda *args, **kwargs: 0
        if name in _NOTHING:
            return lambda *args, **kwargs: None
        if name in _SEEDS:
            return torch.manual_seed
        if name == "mem_get_info":
            return lambda *args, **kwargs: (0, 0)
        if name == "get_rng_state":
            return torch.get_rng_state
        if name == "get_device_name":
            return lambda *args, **kwargs: CPU_PLATFORM
        return getattr(torch.cpu, name)


_DEVICE_MODULE = CPUDeviceModule()


@PlatformRegistry.register(platform=CPU_PLATFORM)
class PlatformCPU(PlatformBase):
    """One CPU "device" a process; collectives over gloo."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> types.ModuleType:
        return _DEVICE_MODULE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # auto-detection only: with VERL_PLATFORM=cpu the CPU serves on GPU machines too
        return not torch.cuda.is_available()

    # verl says int and gives it to `.to()`, where an int is an accelerator
    def current_device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        # the name that verl's pools ask for; `ray_resource_options` requests none of it
        return "GPU"

    def ray_resource_options(self, num_gpus: float) -> dict:
        return {}

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None
