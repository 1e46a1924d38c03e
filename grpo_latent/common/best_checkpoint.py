"""Which checkpoint of a training had the best held-out score, in a file beside the last one's name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpo_latent.common.files import write_json
from grpo_latent.common.manifest import seal
from grpo_latent.common.step_folders import STEP_PREFIX
from grpo_latent.errors import CheckpointError

BEST_FILE = "best_checkpoint.json"


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
        write_json(path, best.as_json() | {"seal": seal(best.as_json())})


def read_best(root: str | Path) -> Best | None:
    """The best checkpoint of `root`, None where none is named.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = Path(root) / BEST_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        sealed = values.pop("seal", None)  # older releases wrote none
        if sealed is not None and sealed != seal(values):
            raise ValueError(f"another digest than that of {values}")
        return Best.from_json(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "no best checkpoint",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            expected="step, score, metric and folder",
            fix="Delete the file; training writes it again.",
        ) from error
