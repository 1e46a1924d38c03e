"""The jsonl of metrics that verl's `file` logger writes, over a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

from grpo_latent.common.files import write_bytes


def rewind_metrics(path: Path, step: int) -> None:
    """Drops the lines of steps after `step` from a jsonl of metrics; at step 0, all lines.

    A run that died after its last checkpoint has logged steps that the resumed run takes again.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines() if step > 0 else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        # the line that the dying run was writing, of which a power cut leaves anything
        except (ValueError, TypeError, KeyError):
            continue
    write_bytes(path, b"".join(kept))


def metrics_path(project_name: str, experiment_name: str) -> Path:
    """Where verl's `file` logger writes."""
    explicit = os.environ.get("VERL_FILE_LOGGER_PATH")
    if explicit:
        return Path(explicit)
    root = os.path.expanduser(os.environ.get("VERL_FILE_LOGGER_ROOT", "."))
    return Path(root) / project_name / f"{experiment_name}.jsonl"
