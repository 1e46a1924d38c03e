"""Checkpoints in verl's layout that survive being killed half-way, and that load as latent models.

<default_local_dir>/
  latest_checkpointed_iteration.txt   written last, atomically: the newest *complete* checkpoint;
                                      -1 before there is one
  best_checkpoint.json                the one with the best held-out score
  global_step_N/
    manifest.json                     size and digest of each of the other files
    data.pt                           position in the data
    guards.json                       alarms, rollbacks, the best checkpoint: their state
    actor/                            shards of model, optimizer, scheduler and generator states
    actor/huggingface/                what `load_latent_model` and stage-2 runs read
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from omegaconf import DictConfig

from grpo_latent.common.best_checkpoint import STATE_FILE
from grpo_latent.common.files import write_text
from grpo_latent.common.step_folders import (
    NO_STEP,
    STEP_PREFIX,
    TRACKER_FILE,
    read_tracker,
    step_folders,
    step_of,
)
from grpo_latent.errors import ConfigError

__all__ = [
    "STEP_PREFIX",
    "TRACKER_FILE",
    "begin_tracker",
    "make_room",
    "prune",
    "read_tracker",
    "restored",
    "resume_folder",
    "write_tracker",
]


def write_tracker(root: str | Path, step: int) -> None:
    """Points the tracker at `step`, atomically."""
    write_text(Path(root) / TRACKER_FILE, str(step))


def begin_tracker(root: str | Path) -> None:
    """Says that there is no complete checkpoint yet, unless a tracker is there."""
    path = Path(root) / TRACKER_FILE
    if not path.is_file():
        write_text(path, NO_STEP)


def make_room(root: str | Path, step: int, resumed_from: int) -> None:
    """Removes what an earlier run left of `global_step_<step>`.

    That is half of a save, or a branch that is trained anew.

    If the tracker names that very folder, it is first pointed back to the checkpoint that this run
    resumed from, so that at no time it names an incomplete one.
    """
    root = Path(root)
    folder = root / f"{STEP_PREFIX}{step}"
    if not folder.exists():
        return
    tracker = root / TRACKER_FILE
    if tracker.is_file() and tracker.read_text().strip() == str(step):
        if (root / f"{STEP_PREFIX}{resumed_from}").is_dir() and resumed_from != step:
            write_tracker(root, resumed_from)
        else:
            write_text(tracker, NO_STEP)
    shutil.rmtree(folder)


def prune(root: str | Path, keep: int | None, pinned: Collection[int] = ()) -> None:
    """Removes old checkpoints but for the newest `keep`, `pinned` steps and the tracker's."""
    if not keep or keep < 1:
        return
    latest = read_tracker(root)
    folders = step_folders(root)
    # a later step than the tracker's is no older branch: it is what a kill left of a save, and
    # counts for nothing
    whole = [step for step in folders if latest is None or step <= latest]
    for step in whole[: max(0, len(whole) - keep)]:
        if step not in pinned and step != latest:
            shutil.rmtree(folders[step])


def resume_folder(trainer: DictConfig) -> Path | None:
    """The checkpoint that a run resumes from, None where it starts anew.

    Args:
        trainer: verl's group `trainer`.

    Raises:
        CheckpointError: the tracker is broken.
        ConfigError: `resume_from_path` is no folder `global_step_<n>`, of which verl would take
            the step.
    """
    if trainer.resume_mode == "auto":
        step = read_tracker(trainer.default_local_dir)
        return None if step is None else Path(trainer.default_local_dir) / f"{STEP_PREFIX}{step}"
    if trainer.resume_mode != "resume_path":
        return None
    given = trainer.resume_from_path
    if not isinstance(given, str) or step_of(given) is None or not Path(given).is_dir():
        raise ConfigError(
            "not a checkpoint of a step",
            where="trainer.resume_from_path",
            got=given,
            expected=f"an existing folder {STEP_PREFIX}<n>",
            fix="A checkpoint that was kept under another name has to get such a name back.",
        )
    return Path(given)


# what verl's names of a checkpoint's contents bring back
RESTORES = {
    "model": "weights",
    "optimizer": "optimizer",
    "extra": "learning-rate schedule and random states",
}


def restored(folder: Path, contents: Collection[str]) -> str:
    """Says what a run that goes on from a checkpoint takes from it.

    Args:
        contents: verl's `checkpoint.load_contents`.

    >>> restored(Path("runs/global_step_3"), ["model", "extra"])
    'weights, learning-rate schedule and random states, place in the data'
    """
    parts = [text for name, text in RESTORES.items() if name in contents]
    parts.append("place in the data")
    if (folder / STATE_FILE).is_file():
        parts.append("alarms and best score")
    return ", ".join(parts)
