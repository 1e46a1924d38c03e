"""`latent_config.json` beside a checkpoint's weights.

    version 2   {"version": 2, "mechanism": name or package.module:Class, <setting>: <value>, …}
    version 1   flat, the same keys for every mechanism, with what is now fixed for each spelled
                out; still read

A mechanism of a user's own must be importable where its checkpoint is read.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from grpo_latent.common.settings import build
from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.latent.mechanisms.protocol import LATENT_CONFIG_FILE, VERSION, Mechanism
from grpo_latent.latent.mechanisms.registry import MECHANISMS

# keys of version 1 that are no setting of some mechanism, with the only value that it may have
# there: see `_fixed`
_V1_OPTIONAL = {
    "exit": "steps",
    "head": "none",
    "max_spans": None,
    "visibility": "full",
    "start_is_action": None,
    "top_k_image": 0,
    "latent_end_token": None,
    "latent_end_id": None,
    "latent_end_threshold": None,
}


def load_mechanism(folder: str | Path) -> Mechanism:
    """Reads `latent_config.json` of a checkpoint folder.

    Raises:
        CheckpointError: the file is missing, is no JSON, or its fields do not match.
    """
    path = Path(folder) / LATENT_CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            "no latent_config.json",
            where=str(folder),
            expected="a folder written by grpo_latent.sft",
            fix="Run SFT first: a plain Hugging Face model has no latents "
            "(evaluate takes one with model.plain=true).",
        )
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(
            "not valid JSON", where=str(path), got=str(error), expected="a JSON object"
        ) from error
    return from_dict(values, where=str(path))


def from_dict(values: Any, where: str) -> Mechanism:
    """The mechanism of what `Mechanism.to_dict` gave, or of a file of version 1.

    Raises:
        CheckpointError: an unknown version or mechanism, or fields that do not match it.
    """
    if not isinstance(values, dict):
        raise CheckpointError("not a JSON object", where=where, got=values, expected="an object")
    version = values.get("version")
    if version not in (1, VERSION):
        raise CheckpointError(
            "unknown version of latent_config.json",
            where=where,
            got=version,
            expected=f"1 or {VERSION}",
            fix="Use the release of grpo_latent that wrote it, or write the file anew.",
        )
    settings = {
        name: value for name, value in values.items() if name not in ("version", "mechanism")
    }
    try:
        # the first files of version 1 knew LVR only and did not say so
        name = values.get("mechanism", "lvr" if version == 1 else None)
        cls = MECHANISMS.find(name, "latent.mechanism")
        settings = _of_version_1(cls, settings) if version == 1 else settings
        return build(
            cls,
            settings,
            where,
            note=f", the settings of mechanism {cls.key()}",
            error=CheckpointError,
        )
    except ConfigError as error:
        raise CheckpointError(
            error.what,
            where=f"{where}: {error.where}",
            got=error.got,
            expected=error.expected,
            fix=error.fix,
        ) from error


def _of_version_1(cls: type[Mechanism], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of `cls`, without the keys of version 1 that only other mechanisms have.

    Raises:
        ConfigError: one of these has a value that `cls` cannot have.
    """
    own = {field.name for field in dataclasses.fields(cls)}
    fixed = _V1_OPTIONAL | {
        "positions": cls.positions,
        "trigger": "prompt_slots" if cls.has_slots else "emitted",
    }
    kept = {}
    for name, value in settings.items():
        if name in own or name not in fixed:
            kept[name] = value
        elif name not in ("latent_end_threshold", "start_is_action") and value != fixed[name]:
            raise ConfigError(
                "fixed for this mechanism",
                where=f"latent.{name}",
                got=value,
                expected=f"{fixed[name]!r}, as {cls.key()} has it",
            )
    return kept
