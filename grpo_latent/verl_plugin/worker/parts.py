"""A rank's files of a checkpoint: digested where they are written, compared where loaded.

Ranks of several nodes may each see their own files only, and together they read faster than one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from grpo_latent.common.files import sync
from grpo_latent.common.manifest import (
    MANIFEST_FILE,
    Entries,
    digest,
    digests,
    files_below,
    write_manifest,
)
from grpo_latent.errors import CheckpointError

_RANK_FILE = re.compile(r"_rank_(\d+)\.pt$")
HF_FOLDER = "huggingface"
RANKS_FILE = "fsdp_config.json"


def rank_of(name: str) -> int:
    """The rank that writes a file below `actor`; those of no rank are rank 0's.

    >>> rank_of("optim_world_size_2_rank_1.pt"), rank_of("fsdp_config.json")
    (1, 0)
    """
    found = _RANK_FILE.search(name)
    return int(found[1]) if found else 0


def share_of(entries: Entries, rank: int, num_ranks: int) -> Entries:
    """What a rank compares: its own files, and a share of those of ranks that are no more.

    >>> sorted(share_of({"optim_world_size_4_rank_3.pt": None, "fsdp_config.json": None}, 1, 2))
    ['optim_world_size_4_rank_3.pt']
    """
    return {name: entry for name, entry in entries.items() if rank_of(name) % num_ranks == rank}


def part_name(stem: str, num_ranks: int, rank: int) -> str:
    """verl's name of a rank's file.

    >>> part_name("optim", 2, 1)
    'optim_world_size_2_rank_1.pt'
    """
    return f"{stem}_world_size_{num_ranks}_rank_{rank}.pt"


def saved_world_size(folder: str | Path) -> int:
    """The number of ranks that saved a folder `actor`.

    Raises:
        CheckpointError: no checkpoint, or one whose file of this number cannot be read.
    """
    path = Path(folder) / RANKS_FILE
    if not path.is_file():
        raise CheckpointError(
            "not a checkpoint", where=str(folder), got=f"no {RANKS_FILE}", expected="one"
        )
    try:
        return int(json.loads(path.read_bytes())["world_size"])
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(
            "the number of ranks cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            expected="the file as verl wrote it, with world_size",
            fix="Restore it, or resume from another checkpoint.",
        ) from error


def ranks_to_read(num_saved: int, num_ranks: int, rank: int) -> Iterable[int]:
    """The saved ranks whose files a rank loads: its own, or all where the numbers differ."""
    return [rank] if num_saved == num_ranks else range(num_saved)


def resharding_notes(folder: str | Path, num_ranks: int) -> list[str]:
    """Says what a run of so many ranks takes from a folder `actor`, where others have saved it.

    Raises:
        CheckpointError: as `saved_world_size`.
    """
    num_saved = saved_world_size(folder)
    if num_saved == num_ranks:
        return []
    both = min(num_saved, num_ranks)
    if num_saved > num_ranks:
        others = f"those of {_ranks(num_ranks, num_saved)} are left out"
    else:
        others = f"those of {_ranks(num_saved, num_ranks)} as this start made them"
    return [
        f"saved by {num_saved} rank{'s' * (num_saved > 1)}, goes on with {num_ranks}: weights, "
        "optimizer, learning-rate schedule and position in the data exactly; random generators of "
        f"{_ranks(0, both)} exactly, {others} (rollouts draw from seeds of their own); sums over "
        "ranks are rounded in another order"
    ]


def _ranks(first: int, end: int) -> str:
    return f"rank {first}" if end - first == 1 else f"ranks {first} to {end - 1}"


class PartDigests:
    """Digests of what a rank has just written, made beside what the rank does next."""

    def __init__(self, folder: str | Path, rank: int):
        pool = ThreadPoolExecutor(1)
        self._future: Future[Entries] = pool.submit(_digest_own, Path(folder), rank)
        pool.shutdown(wait=False)

    def result(self) -> Entries:
        """Waits for them; by path below `actor`."""
        return self._future.result()


def _digest_own(folder: Path, rank: int) -> Entries:
    """Digests files that are on the disk by then, and gives the model's folder its own manifest.

    That folder is also read alone: by evaluation, or by the next run.
    """
    names = [name for name in files_below(folder) if rank_of(name) == rank]
    names = [name for name in names if name != f"{HF_FOLDER}/{MANIFEST_FILE}"]
    for name in names:
        sync(folder / name)
    entries = digests(folder, names)
    prefix = f"{HF_FOLDER}/"
    of_model = {n.removeprefix(prefix): e for n, e in entries.items() if n.startswith(prefix)}
    if of_model:
        write_manifest(folder / HF_FOLDER, of_model)
        entries[prefix + MANIFEST_FILE] = digest(folder / HF_FOLDER / MANIFEST_FILE)
    return entries
