"""What one machine sees of a run's files: the same as the driver's, or which differ.

    driver    digest of its package, prints of what is read, a mark in each folder that is written
              │ FileRequest
              ▼
    each node the same package? the same files? the mark there, and room to write beside it?

Each node runs it before workers start, so it imports no more than the standard library.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpo_latent
from grpo_latent.common.paths import is_remote

PART_BYTES = 1 << 16  # read of each end of a file: weights are not read whole, small files are


@dataclass(frozen=True)
class FileRequest:
    """What the driver sees.

    Attributes:
        package: digest of its source of this package.
        read: prints of files and folders that the run reads; None where the driver has none.
        written: folders that the run writes to, each with the name of a file that the driver has
            put there; None for one that need not be the driver's own.
    """

    package: str
    read: dict[str, str | None] = field(default_factory=dict)
    written: dict[str, str | None] = field(default_factory=dict)


def package_digest() -> str:
    """Of this package's Python and YAML files."""
    return print_of(Path(grpo_latent.__file__).parent, suffixes=(".py", ".yaml")) or ""


def print_of(path: str | Path, suffixes: tuple[str, ...] = ()) -> str | None:
    """A digest of names, sizes and both ends of the files at `path`; None where nothing is.

    Args:
        suffixes: of the files to take; all by default.
    """
    path = Path(path)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(found for found in path.rglob("*") if found.is_file())
    else:
        return None
    digest = hashlib.sha256()
    for file in files:
        if suffixes and file.suffix not in suffixes:
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(PART_BYTES))
            opened.seek(max(PART_BYTES, size - PART_BYTES))
            digest.update(opened.read())
    return digest.hexdigest()


@contextmanager
def marked(read: Iterable[str], written: Iterable[str], shared: bool) -> Iterator[FileRequest]:
    """What this process sees; its marks in the written folders vanish with the block.

    Args:
        shared: the written folders have to be the same on all nodes.
    """
    marks: dict[str, str | None] = {}
    try:
        for folder in written:
            if is_remote(folder):
                continue
            marks[folder] = name = f".seen_by_all_nodes.{secrets.token_hex(8)}" if shared else None
            if name is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
                Path(folder, name).touch()
        prints = {path: print_of(path) for path in read if not is_remote(path)}
        yield FileRequest(package_digest(), prints, marks)
    finally:
        for folder, name in marks.items():
            if name is not None:
                Path(folder, name).unlink(missing_ok=True)


def problems_here(request: FileRequest) -> list[str]:
    """What of the request does not hold on this machine, in words."""
    problems = []
    if package_digest() != request.package:
        problems.append(
            f"grpo_latent in {Path(grpo_latent.__file__).parent} is not the driver's "
            f"(version {grpo_latent.__version__})"
        )
    for path, expected in request.read.items():
        found = print_of(path)
        if found is None:
            problems.append(f"no such file: {path} (cwd {os.getcwd()})")
        elif expected is not None and found != expected:
            problems.append(f"not the driver's content: {path} (cwd {os.getcwd()})")
    for folder, mark in request.written.items():
        problems += _problems_of_folder(folder, mark)
    return problems


def _problems_of_folder(folder: str, mark: str | None) -> list[str]:
    if mark is not None and not Path(folder, mark).exists():
        return [
            f"output folder {folder} is not the driver's: what is written here would stay here"
        ]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return [f"output folder {folder} is not writable: {error}"]
    return []
