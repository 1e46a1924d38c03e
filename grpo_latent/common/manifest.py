"""Digests of a folder's files in one manifest, so that damage is named before anything is loaded.

<folder>/manifest.json    {"files": {"<path>": {"num_bytes": …, "sha256": "…"}, …},
                           "seal": "<sha256 of the above>"}

It tells damage, not a forger, who can write a manifest too: against him files are loaded without
code (`common.pickles`). sha256 is what `sha256sum` prints, and needs no further package.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from grpo_latent.common.files import write_text
from grpo_latent.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
DCP_INDEX = ".metadata"  # of torch.distributed.checkpoint
MAX_THREADS = 8
# what transformers, verl and this package read of a folder by name: such a file that nobody has
# listed would be loaded with the others
LOADED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.pt",
    "*.pth",
    "*.bin",
    "*.bin.index.json",
    "*.distcp",
    DCP_INDEX,
    "config.json",
    "*_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "trainer_state.json",
    "guards.json",
)
_said: set[str] = set()


@dataclass(frozen=True)
class Entry:
    """Size and digest of a file."""

    num_bytes: int
    sha256: str


# by path below the folder, with slashes
Entries = dict[str, Entry]


def digest(path: str | Path) -> Entry:
    """Reads a file once, in pieces."""
    with Path(path).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Entry(file.tell(), sha256)


def digests(folder: str | Path, names: Iterable[str] | None = None) -> Entries:
    """Reads files of a folder, several at a time; None takes all of them but its manifest."""
    folder = Path(folder)
    names = sorted(files_below(folder) if names is None else names)
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: digest(folder / name), names), strict=True))


def files_below(folder: str | Path) -> Iterator[str]:
    """Lists files of a folder and those below it.

    Left out are the folder's manifest and hidden files: what kills and downloads leave.
    """
    for path in sorted(Path(folder).rglob("*")):
        below = path.relative_to(folder)
        hidden = [part for part in below.parts if part.startswith(".") and part != DCP_INDEX]
        if path.is_file() and not hidden:
            if below.as_posix() != MANIFEST_FILE:
                yield below.as_posix()


def model_files(folder: str | Path) -> list[str]:
    """Lists files of a model's folder that are loaded, none below it: it may lie among others."""
    names = [path.name for path in Path(folder).iterdir() if path.is_file()]
    return sorted(name for name in names if _is_loaded(name))


def _is_loaded(name: str) -> bool:
    base = PurePosixPath(name).name
    return any(fnmatch(base, pattern) for pattern in LOADED)


def write_manifest(folder: str | Path, entries: Entries | None = None) -> None:
    """Writes a folder's manifest; None digests all of its files now."""
    write_text(
        Path(folder) / MANIFEST_FILE, _text(digests(folder) if entries is None else entries)
    )


def _text(entries: Entries) -> str:
    values = {"files": {name: asdict(entries[name]) for name in sorted(entries)}}
    return json.dumps(values | {"seal": seal(values)}, indent=2) + "\n"


def seal(values: Any) -> str:
    """Digests what JSON holds, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_model_manifest(folder: str | Path) -> None:
    """Writes the manifest of a model's folder; called last, when all that it lists is there."""
    write_manifest(folder, digests(folder, model_files(folder)))


def read_manifest(folder: str | Path) -> Entries | None:
    """Reads a folder's manifest, None without one.

    Raises:
        CheckpointError: the manifest itself is damaged.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        text = path.read_bytes().decode()
        entries = {name: Entry(**values) for name, values in json.loads(text)["files"].items()}
        # its own digest is compared with the text: a change that JSON does not see is one, too
        is_whole = text == _text(entries)
    except (ValueError, TypeError, LookupError, AttributeError):
        is_whole = False
    if not is_whole:
        raise CheckpointError(
            "the manifest is damaged",
            where=str(path),
            got=f"{path.stat().st_size} bytes that its own digest does not fit",
            expected="the file as it was written",
            fix="Copy the folder again. Without the file nothing is compared, and that is said.",
        )
    return entries


def check_folder(folder: str | Path, verify_digests: bool = True) -> list[str]:
    """Compares a folder with its manifest before anything of it is loaded.

    Args:
        verify_digests: False compares names and sizes alone.

    Returns:
        what the user should know: that there is no manifest, or that digests were not compared.

    Raises:
        CheckpointError: a file is missing, changed, or not listed where it would be loaded.
    """
    entries = read_manifest(folder)
    if entries is None:
        return [no_manifest(folder)]
    check_files(folder, entries, verify_digests)
    check_unlisted(folder, entries)
    if not verify_digests:
        return [not_compared(folder)]
    return []


def check_whole(folder: str | Path, verify_digests: bool = True) -> None:
    """Compares a model's folder with its manifest, and says once where that cannot be done.

    Raises:
        CheckpointError: a file is missing or changed.
    """
    say_once(check_folder(folder, verify_digests))


def no_manifest(folder: str | Path) -> str:
    """Says that a folder of an older release, or of another program, cannot be compared."""
    return f"{folder} has no {MANIFEST_FILE}: whether its files are whole is not known"


def not_compared(folder: str | Path) -> str:
    """Says that the user has switched it off."""
    return f"verify_digests=false: of {folder} only names and sizes are compared"


def check_files(folder: str | Path, entries: Entries, verify_digests: bool = True) -> None:
    """Raises `CheckpointError` at the first of the listed files that is missing or changed."""
    folder = Path(folder)
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise _changed(folder, name, "is missing", "no such file", entry)
        size = path.stat().st_size
        if size != entry.num_bytes:
            raise _changed(folder, name, "has another size", f"{size} bytes", entry)
    if not verify_digests:
        return
    for name, found in digests(folder, entries).items():
        if found != entries[name]:
            raise _changed(folder, name, "has changed", f"sha256 {found.sha256}", entries[name])


def check_unlisted(folder: str | Path, entries: Entries) -> None:
    """Raises `CheckpointError` at a file that would be loaded and that the manifest lacks.

    It stands beside one that the manifest lists: what lies below is another's.
    """
    places = {PurePosixPath(name).parent for name in entries}
    for name in files_below(folder):
        is_beside = PurePosixPath(name).parent in places
        if is_beside and name not in entries and _is_loaded(name):
            raise CheckpointError(
                "a file that is no part of this checkpoint",
                where=str(Path(folder) / name),
                got="a name that is loaded",
                expected=f"what {MANIFEST_FILE} lists",
                fix=f"Remove it. If you put it there, delete {Path(folder) / MANIFEST_FILE}.",
            )


def _changed(folder: Path, name: str, what: str, got: str, entry: Entry) -> CheckpointError:
    return CheckpointError(
        f"a part of the checkpoint {what}",
        where=str(folder / name),
        got=got,
        expected=f"{entry.num_bytes} bytes, sha256 {entry.sha256}, as {MANIFEST_FILE} lists it",
        fix="Restore the file, or take another checkpoint. If you changed it on purpose, delete "
        f"{folder / MANIFEST_FILE}.",
    )


def say_once(notes: Iterable[str]) -> None:
    """Prints each note to stderr, once a process."""
    for note in notes:
        if note not in _said:
            _said.add(note)
            print(f"note: {note}", file=sys.stderr, flush=True)
