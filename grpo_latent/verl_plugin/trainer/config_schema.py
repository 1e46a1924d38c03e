"""The training config against what verl and we read: `keys_of_ours` over the configs as shipped.

Which keys there are, verl says itself: the flat config that it ships, and ours over it.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grpo_latent.common.references import references
from grpo_latent.common.schema import Schema, resolved
from grpo_latent.errors import ConfigError, PluginError
from grpo_latent.verl_plugin.boot.seams import FIX
from grpo_latent.verl_plugin.trainer.keys_of_ours import CLASSES, FREE, KEYS

FLAT_CONFIG = "_generated_ppo_trainer.yaml"
OURS = ("grpo.yaml", "device/cpu.yaml")
CUSTOM = "actor_rollout_ref.rollout.custom"

# groups of verl before 0.7, which its own command moves, and what they are called now
LEGACY = {
    "custom_reward_function": "reward.custom_reward_function",
    "reward_model": "reward.reward_manager, reward.reward_model or reward.num_workers",
    "sandbox_fusion": "reward.sandbox_fusion",
}


def check_schema(config: DictConfig) -> None:
    """Raises `ConfigError` at an unknown key, or a value of another type, range or name."""
    written: Any = OmegaConf.to_container(config, resolve=False)
    schema().check_sections(written)
    values = _plain(config)
    _check_legacy(values)
    schema().check(values, references(written))


@functools.cache
def schema() -> Schema:
    """Table and reference; the files are read once a process."""
    folders = [_folder("verl.trainer.config"), _folder("grpo_latent.config")]
    verl, *ours = (
        OmegaConf.load(folder / name)
        for folder, name in [(folders[0], FLAT_CONFIG), *((folders[1], name) for name in OURS)]
    )
    merged = OmegaConf.unsafe_merge(verl, *ours)
    assert isinstance(merged, DictConfig), "the files hold sections"
    for name in ("defaults", "hydra"):
        merged.pop(name, None)
    reference = resolved(merged)
    reference["actor_rollout_ref"]["rollout"]["custom"] = {}  # a copy of `latent`, and others' own
    return Schema(KEYS, reference, FREE, CLASSES)


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PluginError(
            "no configs", where=package, got=spec, expected="a package with YAML files", fix=FIX
        )
    return Path(spec.submodule_search_locations[0])


def _plain(config: DictConfig) -> dict[str, Any]:
    """The config as plain values; stock verl's with `latent` where ours has it."""
    values = resolved(config)
    custom = OmegaConf.select(config, CUSTOM)
    if "latent" not in values and OmegaConf.is_dict(custom) and "latent" in custom:
        values["latent"] = resolved(custom)["latent"]
    return values


def _check_legacy(values: dict[str, Any]) -> None:
    """Refuses groups that nothing would read: verl's command moves them, ours is not verl's."""
    for group, now in LEGACY.items():
        given = [f"{group}.{key}" for key in _set(values.pop(group, None) or {})]
        if given:
            raise ConfigError(
                "a group of older releases, which is not read",
                where=given[0],
                got=given,
                expected=now,
                fix=f"Set the same under {now}.",
            )


def _set(section: dict[str, Any], where: str = "") -> list[str]:
    """Keys that are not null."""
    found = []
    for name, value in section.items():
        key = f"{where}.{name}" if where else name
        if isinstance(value, dict):
            found += _set(value, key)
        elif value is not None:
            found.append(key)
    return found
