"""Checkpoints in verl's layout that survive being killed half-way, and that load as latent models.

<default_local_dir>/
  latest_checkpointed_iteration.txt     written last, atomically: names the newest *complete* checkpoint
  global_step_N/
    data.pt                             position in the data
    actor/                              shards of model, optimizer, scheduler and generator states
    actor/huggingface/                  what `load_latent_model` and stage-2 runs read
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from grpo_latent.errors import CheckpointError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
STEP_PREFIX = "global_step_"


def read_tracker(root: str | Path) -> int | None:
    """Step of the newest complete checkpoint under `root`, None if there is none.

    Raises:
        CheckpointError: the tracker holds no step, or names a folder that is gone.
    """
    path = Path(root) / TRACKER_FILE
    if not path.is_file():
        return None
    text = path.read_text().strip()
    if not text.isdigit():
        raise CheckpointError("not a step", where=str(path), got=text, expected="a number", fix="Delete the file.")
    if not (Path(root) / f"{STEP_PREFIX}{text}").is_dir():
        raise CheckpointError(
            "the checkpoint is gone",
            where=str(path),
            got=f"{STEP_PREFIX}{text}",
            expected="a folder of that name",
            fix="Restore it, or write the step of another complete checkpoint into the file.",
        )
    return int(text)


def write_tracker(root: str | Path, step: int) -> None:
    """Points the tracker at `step`, atomically."""
    path = Path(root) / TRACKER_FILE
    partial = path.with_suffix(".partial")
    with open(partial, "w") as file:
        file.write(str(step))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def make_room(root: str | Path, step: int, resumed_from: int) -> None:
    """Removes what an earlier run left of `global_step_<step>`: half of a save, or a branch that is trained anew.

    If the tracker names that very folder, it is first pointed back to the checkpoint that this run resumed from, so that
    at no time it names an incomplete one.
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
            tracker.unlink()
    shutil.rmtree(folder)


def prune(root: str | Path, keep: int | None) -> None:
    """Removes the oldest checkpoints until `keep` are left; never the one that the tracker names."""
    if not keep or keep < 1:
        return
    latest = read_tracker(root)
    folders = {int(p.name.removeprefix(STEP_PREFIX)): p for p in Path(root).glob(f"{STEP_PREFIX}*") if p.is_dir()}
    for step in sorted(step for step in folders if latest is None or step < latest)[: max(0, len(folders) - keep)]:
        shutil.rmtree(folders[step])
