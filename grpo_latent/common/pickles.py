"""`torch.load` of a checkpoint's files without running code that they may hold.

A pickle can call any function when it is read. Torch's weights-only unpickler makes tensors,
containers, numbers and texts, and what is listed here; anything else is refused before it is
called.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import safe_globals

from grpo_latent.errors import CheckpointError

_METADATA_CLASSES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
# the state of numpy's generator is an array; torch's own list has DTensors and their meshes
ALLOWED = [
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]  # private, as pickles name it
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
]
# what `.metadata` of torch.distributed.checkpoint consists of, which torch reads by plain pickle
_DCP = "torch.distributed.checkpoint"
_METADATA_GLOBALS = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    *((f"{_DCP}.metadata", name) for name in _METADATA_CLASSES),
}
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# what torch raises on a file that is cut, changed or another program's
_UNREADABLE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, OSError)


@contextmanager
def without_code(is_trusted: bool = False) -> Iterator[None]:
    """Makes every `torch.load` of this process weights-only, whatever the caller asks for.

    verl asks for `weights_only=False`.

    Args:
        is_trusted: leaves it as it is.
    """
    if is_trusted:
        yield
        return
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with safe_globals(ALLOWED):
            yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def check_pickles(paths: Iterable[str | Path], is_trusted: bool, switch: str | None) -> None:
    """Reads the structure of `torch.save` files, no tensor's values and no code.

    Args:
        is_trusted: what would need code is let pass.
        switch: the setting that says so; None where there is none.

    Raises:
        CheckpointError: a file is missing or cannot be read, or holds something that only code
            could make.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise CheckpointError(
                "a part of the checkpoint is missing",
                where=str(path),
                expected="a file of torch.save",
                fix="Restore it, or resume from another checkpoint.",
            )
        if not is_trusted:
            _check_pickle(path, switch)


def _check_pickle(path: Path, switch: str | None) -> None:
    try:
        with without_code():
            torch.load(path, map_location="meta", mmap=True)
    except pickle.UnpicklingError as error:
        trust = f" If you trust who wrote the folder, set {switch}=true." if switch else ""
        raise CheckpointError(
            "the file holds more than tensors and plain values: reading it would run code",
            where=str(path),
            got=_culprit(error),
            expected="what torch loads weights-only",
            fix=f"Use a checkpoint that this program wrote.{trust}",
        ) from error
    except _UNREADABLE as error:
        lines = str(error).splitlines()
        raise CheckpointError(
            "not a readable file of torch.save",
            where=str(path),
            got=f"{type(error).__name__}: {lines[0] if lines else ''}",
            expected="a file as torch.save wrote it",
            fix="Restore it, or resume from another checkpoint.",
        ) from error


def _member(kind: object, name: object) -> Enum:
    """A member of an enumeration, which Python up to 3.11.3 pickles as getattr of its class."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[str(name)]
    raise pickle.UnpicklingError("GLOBAL builtins.getattr is not allowed but for enumerations")


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what a sharded checkpoint's index consists of, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")


def check_metadata(path: Path) -> None:
    """Reads the index of a checkpoint that torch.distributed has sharded, without code.

    Raises:
        CheckpointError: it cannot be read so.
    """
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, *_UNREADABLE) as error:
        raise CheckpointError(
            "not an index that can be read without running code",
            where=str(path),
            got=_culprit(error),
            expected="what torch.distributed.checkpoint writes",
            fix="Resume from another checkpoint, or start anew from the model's folder.",
        ) from error


def _culprit(error: Exception) -> str:
    """The line of torch's long message that names what is refused."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if "GLOBAL" in line or "nsupported" in line]
    return (named or lines or [type(error).__name__])[-1 if not named else 0]
