"""The jsonl of metrics that verl's `file` logger writes, over a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

from grpo_latent.common.files import write_bytes
from grpo_latent.errors import DataError


def rewind_metrics(path: Path, step: int) -> None:
    """Drops the lines of steps after `step` from a jsonl of metrics; at step 0, all lines.

    A run that died after its last checkpoint has logged steps that the resumed run takes again.

    Raises:
        DataError: a line is no metrics of a step, and lines of committed steps follow it.
    """
    if not path.exists():
        return
    kept: list[bytes] = []
    broken = None
    for number, line in enumerate(path.read_bytes().splitlines() if step > 0 else [], 1):
        try:
            is_kept = json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError):
            # the line that the dying run was writing, of which a power cut leaves anything
            broken = broken or (number, line)
            continue
        if is_kept:
            if broken is not None:
                raise _not_metrics(path, *broken)
            kept.append(line + b"\n")
    write_bytes(path, b"".join(kept))


def _not_metrics(path: Path, number: int, line: bytes) -> DataError:
    return DataError(
        "not the metrics of a step",
        where=f"{path} line {number}",
        got=line[:80].decode(errors="replace"),
        expected="a line as verl's file logger wrote it: committed steps come after it",
        fix="Restore or delete the line: resuming keeps the others.",
    )


def metrics_path(project_name: str, experiment_name: str) -> Path:
    """Where verl's `file` logger writes."""
    explicit = os.environ.get("VERL_FILE_LOGGER_PATH")
    if explicit:
        return Path(explicit)
    root = os.path.expanduser(os.environ.get("VERL_FILE_LOGGER_ROOT", "."))
    return Path(root) / project_name / f"{experiment_name}.jsonl"
