"""Which checkpoint an SFT run goes on from, and whether it may."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_latent.common.manifest import DCP_INDEX, check_whole
from grpo_latent.common.pickles import check_metadata, check_pickles
from grpo_latent.common.step_folders import step_folders, step_of
from grpo_latent.errors import ConfigError
from grpo_latent.sft.settings import SFTSettings

_WORLD_SIZE = "world_size"
_SHARDED = "trainer.fsdp"
_ACCUMULATION = "trainer.gradient_accumulation_steps"
# a resumed run may differ in these: how long it goes on, and what it writes
_FREE_ON_RESUME = {
    "model.save_path",
    "resume",
    "trainer.max_steps",
    "trainer.num_train_epochs",
    "trainer.output_dir",
    "trainer.save_steps",
    "trainer.save_strategy",
    "trainer.save_total_limit",
}


def find_checkpoint(settings: SFTSettings, output_dir: Path, world_size: int) -> Path | None:
    """Finds the checkpoint to resume.

    `auto` takes the last complete one of `output_dir`, a path that folder, null none.

    Raises:
        ConfigError: the run in `output_dir` had other settings, or the path is no complete
            checkpoint.
        CheckpointError: it is damaged, or loading it would run code.
    """
    if settings.resume is None:
        return None
    if settings.resume != "auto":
        checkpoint = Path(settings.resume)
        if not is_complete(checkpoint):
            raise ConfigError(
                "not a complete checkpoint",
                where="trainer.resume_from_checkpoint",
                got=settings.resume,
                expected="auto, null, or a folder checkpoint-N",
            )
        return checked(checkpoint, settings.model.verify_digests)
    checkpoints = [
        folder
        for folder in step_folders(output_dir, "checkpoint-").values()
        if is_complete(folder)
    ]
    if not checkpoints:
        return None
    check_same_run(settings, output_dir, world_size)
    return checked(checkpoints[-1], settings.model.verify_digests)


def checked(checkpoint: Path, verify_digests: bool) -> Path:
    """Returns a checkpoint whose files are whole, and need no code of theirs to be loaded.

    Raises:
        CheckpointError: names the file that is missing, changed or more than tensors and values.
    """
    check_whole(checkpoint, verify_digests)
    # transformers loads them weights-only in any case, and then says less
    pickles = sorted(path for end in ("*.pt", "*.pth") for path in checkpoint.glob(end))
    check_pickles(pickles, is_trusted=False, switch=None)
    for index in checkpoint.rglob(DCP_INDEX):
        check_metadata(index)
    return checkpoint


def is_complete(checkpoint: Path) -> bool:
    """Says whether saving it ended: the Trainer writes its state after everything else."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return step_of(checkpoint, "checkpoint-") is not None


def check_same_run(settings: SFTSettings, output_dir: Path, world_size: int) -> None:
    """Raises `ConfigError` if `output_dir` holds a run whose settings may not change now.

    Processes and accumulation of a sharded run may, where a step has as many batches as before.
    """
    path = output_dir / "settings.json"
    try:
        before = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        before = {}
    now = as_dict(settings, world_size)
    # as older releases wrote it
    before = {_WORLD_SIZE: world_size, _SHARDED: False} | before
    free = set(_FREE_ON_RESUME)
    if now.get(_SHARDED) and _batches_of_step(before) == _batches_of_step(now):
        free |= {_WORLD_SIZE, _ACCUMULATION}
    changed = sorted(
        name
        for name in before.keys() | now.keys()
        if before.get(name) != now.get(name) and name not in free
    )
    if changed:
        raise ConfigError(
            "the run to resume had other settings",
            where=str(path),
            got={name: (before.get(name), now.get(name)) for name in changed[:5]},
            expected="the same settings, and as many batches a step (world_size times "
            f"{_ACCUMULATION})",
            fix="Set trainer.resume_from_checkpoint=null to begin anew, or another "
            "trainer.output_dir.",
        )


def _batches_of_step(values: Mapping[str, Any]) -> int:
    return values[_WORLD_SIZE] * values.get(_ACCUMULATION, 1)


def as_dict(settings: SFTSettings, world_size: int) -> dict:
    """Flattens the settings to what JSON holds: {"model.path": …, "world_size": 8}."""

    def flatten(value: object, prefix: str) -> dict:
        if isinstance(value, dict) and value:
            items = (
                flatten(item, f"{prefix}.{name}" if prefix else name)
                for name, item in value.items()
            )
            return {name: item for below in items for name, item in below.items()}
        return {prefix: list(value) if isinstance(value, tuple) else value}

    values = flatten(json.loads(json.dumps(dataclasses.asdict(settings))), "")
    return values | {_WORLD_SIZE: world_size}
