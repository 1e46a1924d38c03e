"""Puts this package into verl's registries, process by process, and checks that it is there.

verl imports entry points itself and swallows their errors at DEBUG level. So `grpo_latent.train`
names this package in VERL_USE_EXTERNAL_MODULES, whose errors verl does raise, and each of our
classes calls `verify` before it works.
"""

from __future__ import annotations

import importlib

from grpo_latent.errors import PluginError
from grpo_latent.verl_plugin.boot import compat
from grpo_latent.verl_plugin.boot.platform import CPU_PLATFORM

NAME = "latent"
ROLLOUT_NAME = "hf_latent"
VLLM_ROLLOUT_NAME = "vllm_latent"
AGENT_LOOP_NAME = "latent_agent"
# verl takes its manager by path, not out of a registry
MANAGER_PATH = "grpo_latent.verl_plugin.rollout.agent_loop.LatentAgentLoopManager"
TRAINER_MODE = "latent_sync"
ALGORITHM_NAME = "grpo_latent"

_PARTS = (
    "grpo_latent.backbones",
    "grpo_latent.verl_plugin.worker.algo",
    "grpo_latent.verl_plugin.worker.engine",
    "grpo_latent.verl_plugin.rollout.replica",
    "grpo_latent.verl_plugin.rollout.agent_loop",
    "grpo_latent.verl_plugin.trainer.trainer",
    "grpo_latent.verl_plugin.rewards.manager",
)
_EXPECTED = {
    "platform": {CPU_PLATFORM},
    "engine": {NAME},
    "rollout adapter": {ROLLOUT_NAME, VLLM_ROLLOUT_NAME},  # by name: neither entry imports vllm
    "rollout replica": {ROLLOUT_NAME, VLLM_ROLLOUT_NAME},
    "agent loop": {AGENT_LOOP_NAME},
    "trainer": {TRAINER_MODE},
    "advantage": {ALGORITHM_NAME},
    "policy loss": {ALGORITHM_NAME},
}


def register_all() -> None:
    """Imports every part, which registers it, and installs the work-arounds; idempotent."""
    compat.check_verl_version()
    compat.apply_patches()
    for part in _PARTS:
        importlib.import_module(part)
    from grpo_latent.backbones.registry import load_named_backbones

    load_named_backbones()  # before verl loads a processor, which may be one of theirs


def verify(process: str) -> None:
    """Registers what is missing in this process and checks all of it.

    Args:
        process: what to call this process in the message.

    Raises:
        PluginError: a registry of verl does not hold our entry, or verl settled on another device
            before we came.
    """
    register_all()
    registered = compat.registered_names()
    missing = {
        kind: sorted(absent)
        for kind, names in _EXPECTED.items()
        if (absent := names - registered[kind])
    }
    if missing:
        raise PluginError(
            "the verl plug-in is not loaded",
            where=process,
            got=f"no {missing}",
            expected="every entry of grpo_latent in verl's registries",
            fix="Set VERL_USE_EXTERNAL_MODULES=grpo_latent.verl_plugin in the environment "
            "of every process.",
        )


def verify_device(process: str, device: str) -> None:
    """Raises `PluginError` unless verl's platform in this process is the config's."""
    from verl.utils.device import get_device_name

    if get_device_name() != device:
        raise PluginError(
            "verl settled on another device",
            where=process,
            got=get_device_name(),
            expected=f"trainer.device={device}",
            fix=f"Set VERL_PLATFORM={'cpu' if device == 'cpu' else 'nvidia'} in the "
            "environment of every process.",
        )
