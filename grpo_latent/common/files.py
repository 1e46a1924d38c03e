"""Writes that survive a kill: a path has the whole old content or the whole new, never half.

All writers of the package go through here. Each writes beside the target, so that the rename stays
within one file system; syncs the content before the rename, because some file systems order the
two the other way round and a power cut would then leave an empty file under the right name; and
syncs the folder after it, because the rename itself lives there.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends.

    It vanishes if the block raises. Of several in one `with`, the last one named becomes visible
    first: name the file that makes the others count first.

        with replacing_file(index) as new_index, replacing_file(data) as new_data:
            ...

    Args:
        path: missing folders on the way to it are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own for each writer: two that share one would rename each other's half-written
    # file
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(path.parent)


def remove_unfinished(folder: str | Path) -> None:
    """Removes what killed writers left of files in a folder that has no other writer now."""
    for path in Path(folder).glob(".*.part"):
        if path.is_file():
            path.unlink()


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A new, empty folder to fill, which becomes `folder` when the block ends.

    It vanishes if the block raises. A folder cannot be renamed over a full one, so for an instant
    there is none. A process that dies in that instant leaves the old one beside it as
    `.<name>.old`; the next call puts it back before it begins.
    """
    folder = Path(folder)
    # fixed names, where files have random ones: what a killed process left is found again
    unfinished = folder.with_name(f".{folder.name}.part")
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            sync(path)
        if folder.exists():
            os.replace(folder, old)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes `content` as the whole of `path`, atomically."""
    with replacing_file(path) as unfinished:
        unfinished.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` in UTF-8 as the whole of `path`, atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Writes `value` as JSON with a newline at its end, atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes `tensors` as one safetensors file, atomically.

    They may have any shape and dtype, and need not be contiguous.
    """
    # here: it imports torch, which processes that only write text go without
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing_file(path) as unfinished:
        save_file(contiguous, unfinished, metadata)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # object stores mounted as folders know no such thing as a folder's entries
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
