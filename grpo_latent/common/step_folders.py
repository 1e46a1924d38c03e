"""Folders that are named after training steps, and the tracker that names the newest complete one.

Beside `global_step_20` people keep `global_step_20_best`, and a root may lie in a folder
`global_step_5`: only a name that is the prefix and a number, and nothing else, is a step's.
"""

from __future__ import annotations

import re
from pathlib import Path

from grpo_latent.common.manifest import MANIFEST_FILE
from grpo_latent.errors import CheckpointError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
# in the tracker before the first complete checkpoint, so that a lost tracker is told from none
# yet; verl reads it as a number, finds no such folder and starts anew
NO_STEP = "-1"
STEP_PREFIX = "global_step_"


def parse_step(text: str) -> int | None:
    """The step that a text is, None where it is something else.

    >>> parse_step("20"), parse_step("20_best"), parse_step("020"), parse_step("²")
    (20, None, None, None)
    """
    # ASCII digits: `str.isdigit` takes "²", which `int` refuses. 020 would be a second name of 20
    return int(text) if re.fullmatch("0|[1-9][0-9]*", text) else None


def step_of(folder: str | Path, prefix: str = STEP_PREFIX) -> int | None:
    """The step in the folder's own name, None where it is no step's; parents are not looked at."""
    name = Path(folder).name
    return parse_step(name.removeprefix(prefix)) if name.startswith(prefix) else None


def step_folders(root: str | Path, prefix: str = STEP_PREFIX) -> dict[int, Path]:
    """Folders of steps below `root` by step, ascending; {} where `root` is none."""
    found = {
        step_of(path, prefix): path for path in Path(root).glob(f"{prefix}*") if path.is_dir()
    }
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


def read_tracker(root: str | Path) -> int | None:
    """Step of the newest complete checkpoint under `root`, None if there is none.

    Raises:
        CheckpointError: the tracker holds no step, or names a folder that is gone, or is gone
            itself where there is a complete checkpoint.
    """
    path = Path(root) / TRACKER_FILE
    if not path.is_file():
        _check_none_is_complete(path)
        return None
    text = path.read_text(errors="replace").strip()
    if text == NO_STEP:
        return None
    step = parse_step(text)
    if step is None:
        raise CheckpointError(
            "not a step", where=str(path), got=text, expected="a number", fix="Delete the file."
        )
    if not (Path(root) / f"{STEP_PREFIX}{step}").is_dir():
        raise CheckpointError(
            "the checkpoint is gone",
            where=str(path),
            got=f"{STEP_PREFIX}{step}",
            expected="a folder of that name",
            fix="Restore it, or write the step of another complete checkpoint into the file.",
        )
    return step


def _check_none_is_complete(tracker: Path) -> None:
    """Raises `CheckpointError` where training would start anew over checkpoints that it has."""
    complete = [
        step
        for step, folder in step_folders(tracker.parent).items()
        if (folder / MANIFEST_FILE).is_file()
    ]
    if complete:
        raise CheckpointError(
            "the file that names the newest checkpoint is gone",
            where=str(tracker),
            got=f"checkpoints of steps {complete[-5:]}",
            expected="the step of the newest complete one",
            fix=f"Write {complete[-1]} into it, or set trainer.resume_mode=disable to begin anew.",
        )
