"""How a benchmark writes what it found: with the command as it was typed, machine, versions and date.

A figure of the documentation stands in such a file (tests/docs/test_figures.py).
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_latent.common.provenance import provenance

REPOSITORY = Path(__file__).resolve().parents[1]


def command_line() -> str:
    """The command of this process; paths inside the repository as seen from its root."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(REPOSITORY) if script.is_relative_to(REPOSITORY) else script.name
    return f"python {shlex.join([str(shown), *sys.argv[1:]])}"


def write_result(path: Path | None, found: Mapping[str, Any], seed: int | None = None) -> None:
    """Writes `found` as JSON, behind `command` and `provenance`; nothing without a path.

    Args:
        path: of the file, of which the folder is made; None where none was asked for.
        found: numbers, texts, lists and dictionaries of them.
        seed: of the run; None where it has none, or several that `found` names.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"command": command_line(), "provenance": provenance(seed)}
    path.write_text(json.dumps({**head, **found}, indent=1, default=str) + "\n")
