"""Which checkpoint of a training had the best held-out score, in a file beside the tracker.

The file is for people and shell scripts: what counts is the same record in the state of the newest
checkpoint, which its manifest vouches for, and which is there first when a run is killed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpo_latent.common import manifest
from grpo_latent.common.files import write_json
from grpo_latent.common.step_folders import STEP_PREFIX, read_tracker
from grpo_latent.errors import CheckpointError

BEST_FILE = "best_checkpoint.json"
STATE_FILE = "guards.json"  # in a checkpoint, with the key `best`


@dataclass(frozen=True)
class Best:
    """The best checkpoint.

    Attributes:
        step: 0 where no step was better than the start.
        score: held-out, of the validation during training.
        metric: names of the log that the score is the mean of.
        folder: `global_step_<n>` beside the file; at step 0 the model that training began with.
    """

    step: int
    score: float
    metric: str
    folder: str

    @classmethod
    def of_step(cls, step: int, score: float, metric: str) -> Best:
        """Of a checkpoint of training."""
        return cls(step, score, metric, f"{STEP_PREFIX}{step}")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Best:
        """Takes what `as_json` gave.

        Raises:
            ValueError, TypeError: it is no such thing.
        """
        best = cls(**values)
        types = [type(value) for value in asdict(best).values()]
        if types != [int, float, str, str] or best.step < 0 or not math.isfinite(best.score):
            raise ValueError(f"best checkpoint {dict(values)}")
        return best

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def model_folder(self, root: str | Path) -> Path:
        """The Hugging Face folder to load; `root` is the one of the checkpoints."""
        folder = Path(root) / self.folder
        return folder / "actor" / "huggingface" if self.step else Path(self.folder)


def write_best(root: str | Path, best: Best | None) -> None:
    """Names the best checkpoint of `root`, or none."""
    path = Path(root) / BEST_FILE
    if best is None:
        path.unlink(missing_ok=True)
    else:
        write_json(path, best.as_json() | {"seal": manifest.seal(best.as_json())})


def read_best(root: str | Path) -> Best | None:
    """The best checkpoint of `root`, None where none is named.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = Path(root) / BEST_FILE
    named = _read_named(path) if path.is_file() else None
    kept = _read_kept(Path(root))
    is_there = kept is not None and (not kept.step or (Path(root) / kept.folder).is_dir())
    return kept if is_there else named


def _read_kept(root: Path) -> Best | None:
    """Reads the record of the newest checkpoint; None where there is none."""
    step = read_tracker(root)
    path = root / f"{STEP_PREFIX}{step}" / STATE_FILE
    if step is None or not path.is_file():
        return None
    entry = (manifest.read_manifest(path.parent) or {}).get(STATE_FILE)
    if entry is not None:
        manifest.check_files(path.parent, {STATE_FILE: entry})
    try:
        values = json.loads(path.read_bytes())["best"]
        return None if values is None else Best.from_json(values)
    except (ValueError, TypeError, LookupError) as error:
        raise _unreadable(path, error) from error


def _read_named(path: Path) -> Best:
    try:
        values = json.loads(path.read_bytes())
        sealed = values.pop("seal", None)  # older releases wrote none
        if sealed is not None and sealed != manifest.seal(values):
            raise ValueError(f"another digest than that of {values}")
        return Best.from_json(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "no best checkpoint",
        where=str(path),
        got=f"{type(error).__name__}: {error}",
        expected="step, score, metric and folder",
        fix="Delete the file; training writes it again.",
    )
